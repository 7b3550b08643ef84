"""GGUF in and out.

    convert_gguf(Path("model.gguf"), Path("model"), on_progress=lambda done, total: ...)
    write_gguf(Path("model"), Path("model-f16.gguf"), kind="f16")        # or "q8_0": what llama.cpp loads

Reading dequantises to 16 bits into a model directory. Both directions go through `config.json`'s terms and
`formats.maps`, hold one tensor at a time, and show their result only when it is whole. What one side cannot express
(llama.cpp has no sliding window in arch "llama", bimo no mixture of experts) is refused by name.
Metadata names: ggml's docs/gguf.md; tensor layouts: llama.cpp's conversion scripts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bimo.errors import BimoError, CorruptModelError, UnsupportedModelError, UsageError
from bimo.formats.config_json import config_from_hf, config_to_hf
from bimo.formats.gguf_file import GgufFile
from bimo.formats.gguf_tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from bimo.formats.huggingface import load_weights, read_config, save_directory
from bimo.formats.maps import GGUF_FAMILIES, Entry, GgufFamily, tensor_plan
from bimo.models.config import DecoderConfig, RopeConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["convert_gguf", "gguf_family", "write_gguf"]

ROPE_FREQS = "rope_freqs.weight"
UNUSED_TOKEN = 5  # tokenizer.ggml.token_type of rows without a token
CHUNK = 1 << 22  # elements quantised at once, so that a large embedding is never in float32 as a whole
# Metadata that changes the computation -> the values bimo computes; any other key of the architecture must be known.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}
# Metadata with no part in the computation, or checked against the tensors instead.
NEUTRAL = {"vocab_size", "attention.value_length", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type",
           "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
           "rope.scaling.attn_factor", "pooling_type"}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- in
def convert_gguf(file: Path, directory: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Convert a GGUF file into a model directory with its tokenizer, chat template and generation settings.

    Weights become bfloat16 when the file has bfloat16 tensors, float16 otherwise. `on_progress(done, total)` counts
    bytes of tensor data. Raises CorruptModelError (cut off, not GGUF, damaged) and UnsupportedModelError (architecture,
    number type or setting), naming the file; `directory` then stays as it was.
    """
    import torch
    from gguf import GGMLQuantizationType

    gguf = GgufFile(Path(file))
    family = gguf_family(gguf)
    config = _read_config(gguf, family)
    plan = tensor_plan(config, family.tensors)
    _check_tensors(gguf, plan)
    has_bfloat16 = any(tensor.type == GGMLQuantizationType.BF16 for tensor in gguf.tensors.values())
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    total = sum(gguf.tensors[piece.name].nbytes for entry in plan.values() for piece in entry.pieces)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(done, total)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in plan.items():
            yield name, entry.merge([gguf.read(piece.name, dtype, advance) for piece in entry.pieces])

    lineage = {
        "converted_from": Path(file).name,
        "source": {
            key: value
            for key, value in gguf.metadata.items()
            if key.startswith("general.") and isinstance(value, str | int | float | bool)
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer_from_gguf(gguf.metadata, Path(folder))
        except (CorruptModelError, UnsupportedModelError) as error:  # it sees only the metadata: name the file here
            raise type(error)(f"{file}: {error}") from None
        save_directory(Path(directory), config, tensors(), source=Path(folder), lineage=lineage)


def gguf_family(gguf: GgufFile) -> GgufFamily:
    """How the file's architecture is read; UnsupportedModelError for one that bimo does not know."""
    return _family(gguf.metadata.get("general.architecture"), str(gguf.file))


def _family(architecture: Any, where: str) -> GgufFamily:
    if architecture not in GGUF_FAMILIES:
        raise UnsupportedModelError(
            f"{where}: bimo does not read GGUF architecture {architecture!r:.80}, only {', '.join(GGUF_FAMILIES)}; "
            f"serve it with llama.cpp, or fetch the model in Hugging Face's layout"
        )
    return GGUF_FAMILIES[architecture]


def _read_config(gguf: GgufFile, family: GgufFamily) -> DecoderConfig:
    """GGUF metadata in config.json's terms, so that both formats pass the same checks."""
    where, architecture = str(gguf.file), gguf.metadata["general.architecture"]
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    _refuse_unknown(values, family, where)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise CorruptModelError(f"{where} has no tensor token_embd.weight; fetch it again")
    raw: dict[str, Any] = {
        "model_type": family.family,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **{hf: values[key] for key, hf in family.keys.items() if key in values},
    }
    for key in ("context_length", "feed_forward_length"):
        if key not in values:
            raise CorruptModelError(f"{where}: {prefix}{key} is missing; fetch the file again")
    if "head_dim" in family.keys.values():
        heads, width = values.get("attention.head_count"), values.get("embedding_length")
        if "head_dim" not in raw and isinstance(heads, int) and heads > 0 and isinstance(width, int):
            raw["head_dim"] = width // heads
        for key in ("rope.dimension_count", "attention.value_length"):
            if values.get(key, raw.get("head_dim")) != raw.get("head_dim"):
                raise UnsupportedModelError(
                    f"{where}: {prefix}{key} is {values[key]}, bimo needs it to be the head size {raw.get('head_dim')}"
                )
        raw["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        raw["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
        raw["rope_scaling"] = _read_rope_scaling(values)
    config = config_from_hf(raw, where=where)
    if ROPE_FREQS in gguf.tensors:
        config = dataclasses.replace(config, rope=_rope_from_factors(gguf, config))
    return config


def _refuse_unknown(values: Mapping[str, Any], family: GgufFamily, where: str) -> None:
    for key, value in values.items():
        if key in ONLY and value not in ONLY[key]:
            raise UnsupportedModelError(
                f"{where}: {key} is {value!r:.80}, bimo computes only {ONLY[key][0]!r}; serve this file with llama.cpp"
            )
        if key not in ONLY and key not in NEUTRAL and key not in family.keys:
            raise UnsupportedModelError(f"{where}: the setting {key} = {value!r:.80} is unknown to bimo")


def _read_rope_scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope.scaling.*` as a `rope_scaling` object; llama.cpp takes a factor without a type as linear."""
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    kind = values.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if (original := values.get("rope.scaling.original_context_length")) is not None:
            scaling["original_max_position_embeddings"] = original
        # llama.cpp multiplies yarn's own factor, 0.1 ln(s) + 1, by this one; config.json holds the product.
        if (extra := values.get("rope.scaling.attn_factor", 1.0)) != 1.0 and isinstance(factor, float) and factor > 0:
            scaling["attention_factor"] = extra * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def _check_tensors(gguf: GgufFile, plan: Mapping[str, Entry]) -> None:
    pieces = {piece.name: piece for entry in plan.values() for piece in entry.pieces}
    if missing := [name for name in pieces if name not in gguf.tensors]:
        raise CorruptModelError(f"{gguf.file} lacks {len(missing)} tensors ({', '.join(missing[:3])}); fetch it again")
    if unknown := sorted(set(gguf.tensors) - set(pieces) - {ROPE_FREQS}):
        raise UnsupportedModelError(
            f"{gguf.file} has {len(unknown)} tensors unknown to bimo for this architecture "
            f"({', '.join(unknown[:3])}); serve it with llama.cpp"
        )
    for name, piece in pieces.items():
        if (shape := gguf.tensors[name].shape) != piece.shape:
            raise CorruptModelError(f"{gguf.file}: {name} has the shape {shape}, the metadata ask for {piece.shape}")


def _llama3_factors(config: DecoderConfig, rope: RopeConfig) -> torch.Tensor:
    """What each rotary frequency is divided by, (head_dim / 2,): GGUF's only trace of Llama 3's scaling rule."""
    from bimo.models.layers import rope_frequencies

    plain, _ = rope_frequencies(config.head_dim, RopeConfig(theta=rope.theta), config.max_positions)
    scaled, _ = rope_frequencies(config.head_dim, rope, config.max_positions)
    return plain / scaled


def _rope_from_factors(gguf: GgufFile, config: DecoderConfig) -> RopeConfig:
    """Find the Llama 3 setting whose factors the file holds; they come from four numbers, two of them never varied."""
    import torch

    tensor = gguf.tensors[ROPE_FREQS]
    refusal = UnsupportedModelError(
        f"{gguf.file}: {ROPE_FREQS} {tensor.shape} does not follow Llama 3's rule, bimo has no other frequency table; "
        f"serve it with llama.cpp"
    )
    if tensor.shape != (config.head_dim // 2,) or config.rope.kind != "default":
        raise refusal
    factors = gguf.read(ROPE_FREQS, torch.float32)
    if torch.equal(factors, torch.ones_like(factors)):
        return config.rope
    for original in (8192, *(2**power for power in range(4, 21))):
        rope = RopeConfig(
            theta=config.rope.theta,
            kind="llama3",
            factor=round(float(factors.max()), 4),
            original_max_positions=original,
        )
        if torch.allclose(_llama3_factors(config, rope), factors, rtol=1e-4):
            return rope
    raise refusal


# ------------------------------------------------------------------------------------------------------------ out
def write_gguf(directory: Path, file: Path, kind: Literal["f16", "q8_0"] = "f16") -> None:
    """Write a model directory as one GGUF file that llama.cpp loads, tokenizer and chat template included.

    Matrices become F16, or Q8_0 (8.5 bits a weight; those whose rows are not made of 32s stay F16); norms, biases and
    position embeddings stay F32. Raises UnsupportedModelError for what llama.cpp's architectures cannot express and
    UsageError for another `kind`; the file appears when it is complete.
    """
    if kind not in ("f16", "q8_0"):
        raise UsageError(f"GGUF kind {kind!r} is not one bimo writes: choose f16 or q8_0", param="kind")
    config = read_config(directory)
    architecture, family = _architecture(config)
    metadata = {
        "general.type": "model",
        "general.name": Path(directory).absolute().name,
        **{f"{architecture}.{key}": value for key, value in _metadata(config, family).items()},
        **_padded_tokenizer(tokenizer_to_gguf(Path(directory)), config.vocab_size, directory),
    }
    file = Path(file).absolute()
    partial: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
        os.close(handle)
        _write(Path(partial), architecture, metadata, config, family, Path(directory), kind)
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except OSError as error:
        raise BimoError(f"could not write {file}: {error.strerror or error}; nothing was changed") from error
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)


def _architecture(config: DecoderConfig) -> tuple[str, GgufFamily]:
    """The architecture to write a model as, checked to compute the same."""
    found = [name for name, family in GGUF_FAMILIES.items() if config.family in family.written_from]
    if not found:
        known = ", ".join(name for family in GGUF_FAMILIES.values() for name in family.written_from)
        raise UnsupportedModelError(f"llama.cpp has no architecture for family {config.family}; GGUF holds {known}")
    architecture, family = found[0], GGUF_FAMILIES[found[0]]
    config_to_hf(config)  # refuses what even the family cannot say
    refused = {
        name: value for name, values in family.writable.items() if (value := getattr(config, name)) not in values
    }
    if any(window is not None and window < config.max_positions for window in config.windows):
        refused["windows"] = config.windows
    if architecture == "qwen2" and config.head_dim * config.num_heads != config.hidden_size:
        refused["head_dim"] = config.head_dim
    if config.rope.kind == "llama3" and architecture != "llama":
        refused["rope.kind"] = "llama3"
    plain = RopeConfig(theta=config.rope.theta, kind=config.rope.kind, factor=config.rope.factor)
    for item in dataclasses.fields(RopeConfig):
        value = getattr(config.rope, item.name)
        if item.name != "original_max_positions" and value != getattr(plain, item.name):
            refused[f"rope.{item.name}"] = value
    if refused:
        shown = ", ".join(f"{name} = {value!r:.60}" for name, value in refused.items())
        raise UnsupportedModelError(f"llama.cpp's architecture {architecture} does not compute {shown}")
    return architecture, family


def _metadata(config: DecoderConfig, family: GgufFamily) -> dict[str, Any]:
    raw = {**config_to_hf(config), "head_dim": config.head_dim}
    values = {key: raw[hf] for key, hf in family.keys.items()}
    values["vocab_size"] = config.vocab_size
    if config.position == "rotary":
        values |= {"attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim}
        if config.rope.kind in ("linear", "yarn"):
            values |= {"rope.scaling.type": config.rope.kind, "rope.scaling.factor": config.rope.factor}
        if config.rope.kind == "yarn":
            values["rope.scaling.original_context_length"] = config.rope.original_max_positions
    return values


def _padded_tokenizer(tokenizer: dict[str, Any], vocab_size: int, directory: Path) -> dict[str, Any]:
    """llama.cpp wants one token a row of the embedding, so rows beyond the tokenizer get names of unused tokens."""
    tokens = tokenizer["tokenizer.ggml.tokens"]
    padding = vocab_size - len(tokens)
    if padding < 0:
        raise CorruptModelError(
            f"{directory}: tokenizer.json has {len(tokens)} tokens, the embedding only {vocab_size} rows"
        )
    fillers: dict[str, list[Any]] = {
        "tokens": [f"[PAD{len(tokens) + i}]" for i in range(padding)],
        "token_type": [UNUSED_TOKEN] * padding,
        "scores": [-1000.0] * padding,
    }
    padded = {
        key: [*tokenizer[key], *filler]
        for name, filler in fillers.items()
        if (key := f"tokenizer.ggml.{name}") in tokenizer
    }
    return {**tokenizer, **padded}


def _write(
    file: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    config: DecoderConfig,
    family: GgufFamily,
    directory: Path,
    kind: str,
) -> None:
    import gguf
    import torch

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add(writer, key, value)

    plan = tensor_plan(config, family.tensors)
    shapes = {piece.name: piece.shape for entry in plan.values() for piece in entry.pieces}
    rope_freqs = {ROPE_FREQS: _llama3_factors(config, config.rope)} if config.rope.kind == "llama3" else {}
    for name, shape in {**{name: tuple(tensor.shape) for name, tensor in rope_freqs.items()}, **shapes}.items():
        number_type = _number_type(name, shape, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[number_type]
        nbytes = math.prod(shape) // block * block_bytes
        # The number type of the array matters to the writer only when it is not told the raw type.
        writer.add_tensor_info(name, shape, torch.zeros(0).numpy().dtype, nbytes, raw_dtype=number_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in rope_freqs.items():
            writer.write_tensor_data(_encode(name, tensor, kind))
        for name, tensor in load_weights(directory, config):
            for piece_name, piece in plan[name].split(tensor):
                writer.write_tensor_data(_encode(piece_name, piece, kind))
    finally:
        writer.close()


def _number_type(name: str, shape: tuple[int, ...], kind: str) -> Any:
    from gguf import GGMLQuantizationType

    if len(shape) == 1 or name == "position_embd.weight":
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q8_0 if kind == "q8_0" and shape[-1] % 32 == 0 else GGMLQuantizationType.F16


def _encode(name: str, tensor: torch.Tensor, kind: str) -> np.ndarray:
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    number_type = _number_type(name, tuple(tensor.shape), kind)
    chunks = tensor.split(max(1, CHUNK // tensor[0].numel()))
    with np.errstate(over="ignore"):
        encoded = np.concatenate([quantize(chunk.float().numpy(), number_type) for chunk in chunks])
    if number_type == GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise UnsupportedModelError(f"{name} has values beyond float16's range of 65504, which GGUF's F16 cannot hold")
    return encoded


def _add(writer: Any, key: str, value: Any) -> None:
    """llama.cpp insists on unsigned counts and ids; lists take the type of their items."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
