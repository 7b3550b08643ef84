"""The model directory: Hugging Face's layout, read and written tensor by tensor.

    config = read_config(directory)
    for name, tensor in load_weights(directory, config):         # bimo's names, one tensor in memory at a time
        decoder.get_parameter(name).data.copy_(tensor)
    save_directory(new, config, decoder.named_parameters(), source=directory, lineage={"recipe": "..."})
    model = load_model(directory)                                # any architecture: what config.json says it is
    encoder = load_encoder(directory)                            # BERT and its heads

transformers, vLLM and llama.cpp's converter read what `save_directory` writes, with equal logits. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.errors import BimoError, CorruptModelError, ModelNotFoundError, UnsupportedModelError, UsageError
from bimo.formats.config_json import config_from_hf, config_to_hf
from bimo.formats.encoder_maps import encoder_from_hf, encoder_keys, encoder_to_hf
from bimo.formats.lstm import LSTM_TYPE, lstm_from_raw, lstm_plan, lstm_to_raw
from bimo.formats.maps import FAMILIES, Entry, KeyMap, tensor_plan
from bimo.formats.seq2seq_maps import SEQ2SEQ, seq2seq_from_hf, seq2seq_keys, seq2seq_to_hf
from bimo.models.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

    from bimo.models.decoder import Decoder
    from bimo.models.encoder import Encoder
    from bimo.models.recurrent import LSTMLanguageModel
    from bimo.models.seq2seq import EncoderDecoder

__all__ = [
    "is_encoder",
    "load_encoder",
    "load_model",
    "load_weights",
    "read_config",
    "read_encoder_config",
    "read_json",
    "read_model_config",
    "save_directory",
    "staged_directory",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
# Everything beside config and weights that a model directory may need to speak: copied from the source when saving.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# ---------------------------------------------------------------------------------------------------------- reading
def read_json(file: Path) -> Any:
    """A JSON file of a model; CorruptModelError names the file when it is missing, not UTF-8 JSON, or holds NaN."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(file.read_bytes().decode("utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise CorruptModelError(f"{file} is missing: fetch the model again") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: broken UTF-8, broken JSON, huge integers
        reason = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CorruptModelError(f"{file} is not readable JSON ({reason}): fetch the model again") from None


def read_config(directory: Path) -> DecoderConfig:
    """The decoder in `directory`/config.json (errors: `formats.config_json.config_from_hf`)."""
    file = _config_file(directory)
    return config_from_hf(read_json(file), where=str(file))


def read_encoder_config(directory: Path) -> EncoderConfig:
    """The encoder in `directory`, with the heads its weights hold (errors: `encoder_maps.encoder_from_hf`)."""
    file = _config_file(directory)
    return encoder_from_hf(read_json(file), _tensor_names(file.parent), where=str(file))


def read_model_config(directory: Path) -> ModelConfig:
    """The model in `directory`, whatever its architecture, by config.json's `model_type`.

    Errors: those of `config_from_hf`, `encoder_from_hf`, `seq2seq_from_hf` and `lstm_from_raw`. The weights of encoders
    and encoder-decoders have to be there: config.json alone does not say which heads they have.
    """
    file = _config_file(directory)
    raw = read_json(file)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind == "bert":
        return encoder_from_hf(raw, _tensor_names(file.parent), where=str(file))
    if isinstance(kind, str) and kind in SEQ2SEQ:
        return seq2seq_from_hf(raw, _tensor_names(file.parent), where=str(file))
    if kind == LSTM_TYPE:
        return lstm_from_raw(raw, where=str(file))
    return config_from_hf(raw, where=str(file))


def is_encoder(directory: Path) -> bool:
    """Whether it holds an encoder, by its config.json alone."""
    raw = read_json(_config_file(directory))
    return isinstance(raw, dict) and raw.get("model_type") == "bert"


def load_encoder(directory: Path, dtype: torch.dtype | None = None) -> Encoder:
    """The encoder in `directory`, in `dtype` or the file's own, ready to use: dropout is off until `.train()`."""
    encoder: Encoder = _load(directory, read_encoder_config(directory), dtype)
    return encoder


def load_model(
    directory: Path, dtype: torch.dtype | None = None
) -> Decoder | Encoder | EncoderDecoder | LSTMLanguageModel:
    """The model in `directory`, whatever it is, as `load_encoder` gives an encoder."""
    model: Decoder | Encoder | EncoderDecoder | LSTMLanguageModel = _load(
        directory, read_model_config(directory), dtype
    )
    return model


def _load(directory: Path, config: ModelConfig, dtype: torch.dtype | None) -> Any:
    from bimo.models.empty import empty_model

    model = empty_model(config)
    for name, tensor in load_weights(directory, config):
        model.load_state_dict({name: tensor.to(dtype, copy=True)}, strict=False, assign=True)
    if isinstance(config, DecoderConfig):
        model.reset_rope()
    return model.eval()


def _tensor_names(directory: Path) -> set[str]:
    with ExitStack() as stack:
        handles = [stack.enter_context(_open(weights)) for weights in _weight_files(directory)]
        return {name for handle in handles for name in handle.keys()}  # noqa: SIM118 not a dict


def _config_file(directory: Path) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelNotFoundError(str(directory), [], "no such model directory")
    return directory / "config.json"


def load_weights(directory: Path, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """All of the model's parameters as (bimo name, tensor) in the file's own number type, one after the other.

    Files are mapped, not read: a tensor may be a view of the mapping, so copy it into the model and let it go. Names,
    shapes and number types of the whole model are checked before the first tensor is given out.
    Raises CorruptModelError (a file missing, truncated, of a wrong shape; tensors missing or unknown) and
    UnsupportedModelError (pickled or quantised weights), each naming the file.
    """
    directory = Path(directory)
    keys, plan = _plan(config)
    files = _weight_files(directory)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in files}
        where = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118 not a dict
        found = _check_tensors(directory, config, keys, plan, where)
        stack.pop_all()
    return _stream(plan, found, where)


def _plan(config: ModelConfig) -> tuple[KeyMap, dict[str, Entry]]:
    if isinstance(config, DecoderConfig):
        keys = FAMILIES[config.family].tensors
    elif isinstance(config, EncoderConfig):
        keys = encoder_keys(config)
    elif isinstance(config, Seq2SeqConfig):
        keys = seq2seq_keys(config)
    else:
        return KeyMap({}), lstm_plan(config)
    return keys, tensor_plan(config, keys)


def _config_json(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config, DecoderConfig):
        return config_to_hf(config)
    if isinstance(config, EncoderConfig):
        return encoder_to_hf(config)
    return seq2seq_to_hf(config) if isinstance(config, Seq2SeqConfig) else lstm_to_raw(config)


def _stream(plan: Mapping[str, Entry], found: Mapping[str, str], where: Mapping[str, Any]) -> Iterator[Any]:
    dtype = None
    for name, entry in sorted(plan.items(), key=lambda item: item[1].row):  # rows last: zeros are of the others' type
        if entry.row and entry.pieces[0].name not in found:
            import torch

            yield name, torch.zeros(entry.shape, dtype=dtype)
            continue
        tensor = entry.merge([where[found[piece.name]].get_tensor(found[piece.name]) for piece in entry.pieces])
        dtype = dtype or tensor.dtype
        yield name, tensor


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors file, or the shards an index names."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptModelError(f'{index} has no "weight_map" of tensor names to files: fetch the model again')
        shards = sorted(set(map(str, weight_map.values())))
        for shard in shards:
            if Path(shard).name != shard:
                raise CorruptModelError(f"{index} names {shard!r}, a shard must be a file in the same directory")
            if not (directory / shard).is_file():
                raise CorruptModelError(f"{index} names the shard {shard}, which is missing: fetch the model again")
        return [directory / shard for shard in shards]
    if pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]):
        raise UnsupportedModelError(
            f"{pickles[0]} is a pickle, which can run code when read, so bimo reads only safetensors; convert it once "
            f'where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise CorruptModelError(f"{directory} has no {WEIGHTS} (or {INDEX}): fetch the model again")


def _open(file: Path) -> safe_open:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as stream:
            if stream.read(24).startswith(b"version https://git-lfs"):
                raise CorruptModelError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`") from None
        raise CorruptModelError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file ({error}): fetch the model again"
        ) from None


def _check_tensors(
    directory: Path, config: ModelConfig, keys: KeyMap, plan: Mapping[str, Entry], where: Mapping[str, Any]
) -> dict[str, str]:
    """Match the plan against what the files hold; {name in the plan: name in the file}."""
    pieces = {piece.name: piece for entry in plan.values() for piece in entry.pieces}
    optional = {entry.pieces[0].name for entry in plan.values() if entry.row}
    found: dict[str, str] = {}
    for name in pieces:
        if spelling := next((spelling for spelling in keys.spellings(name) if spelling in where), None):
            found[name] = spelling
    if missing := [name for name in pieces if name not in found and name not in optional]:
        raise CorruptModelError(
            f"{directory} lacks {len(missing)} of {len(pieces)} tensors of this {config.family} model "
            f"({_some(missing)}): config.json and weights do not belong together, or the download is incomplete"
        )
    ignored = re.compile(keys.ignored)
    unknown = set(where) - set(found.values()) - set(keys.copies)
    if unknown := {name for name in unknown if not ignored.fullmatch(name)}:
        raise CorruptModelError(
            f"{directory} has {len(unknown)} tensors that a {config.family} model of this config.json does not use "
            f"({_some(sorted(unknown))}): config.json and weights do not belong together"
        )
    for name, piece in pieces.items():
        if name not in found:
            continue
        view = where[found[name]].get_slice(found[name])
        shape = tuple(view.get_shape())
        if shape != piece.shape:
            raise CorruptModelError(
                f"{directory}: {found[name]} has the shape {shape}, config.json asks for {piece.shape}"
            )
        if view.get_dtype() not in FLOATS:
            raise UnsupportedModelError(
                f"{directory}: {found[name]} is stored as {view.get_dtype()}, bimo reads {', '.join(sorted(FLOATS))}; "
                f'serve quantised weights with backend = "vllm"'
            )
    for copy, name in keys.copies.items():
        if copy in where and copy not in found.values() and name in plan:
            _check_copy(directory, copy, found[plan[name].pieces[0].name], where)
    return found


def _check_copy(directory: Path, copy: str, original: str, where: Mapping[str, Any]) -> None:
    """Some tools write the tied head too; as a copy it is redundant, otherwise config.json is wrong about the tie."""
    import torch

    if not torch.equal(where[copy].get_tensor(copy), where[original].get_tensor(original)):
        untie = ', or set "tie_word_embeddings": false if both are meant' if copy.startswith("lm_head") else ""
        raise CorruptModelError(
            f"{directory}: config.json ties {copy} to {original}, the file has two different ones: fetch the model "
            f"again{untie}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------- writing
def save_directory(
    directory: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    source: Path | None = None,
    max_shard_bytes: int = 2 * 1024**3,
    lineage: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory: config.json, safetensors (sharded above `max_shard_bytes`), companions, bimo.json.

    Args:
        tensors: (bimo name, tensor) pairs in any order, number types kept; one shard of them is in memory at a time.
        source: directory whose tokenizer, chat template and generation settings are copied, and whose token ids go
            into config.json.
        lineage: where the model comes from; becomes bimo.json.

    An existing model directory is replaced; all of it appears at once, by a rename, or (a full disk, an error of
    `tensors`) nothing changes. Raises UsageError for tensors that are not this model's.
    """
    raw, (_, plan) = _config_json(config), _plan(config)
    with staged_directory(Path(directory)) as stage:
        dtype = _write_shards(stage, plan, tensors, max_shard_bytes)
        token_ids = _copy_companions(stage, source) if source is not None else {}
        ids = {key: raw.get(key, token_ids.get(key)) for key in TOKEN_IDS}
        _write_json(stage / "config.json", {**raw, **ids, "torch_dtype": dtype})
        _write_json(stage / "bimo.json", {"format": 1, **(lineage or {})})


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A temporary sibling that takes `directory`'s place when the block ends well, and vanishes when it does not."""
    directory = directory.absolute()
    known = any((directory / name).exists() for name in ("config.json", "adapter_config.json"))
    if directory.exists() and not known and any(directory.iterdir()):
        raise UsageError(f"{directory} exists and is not a model directory: name another one, or remove it first")
    stage: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        stage.chmod(0o755)
        yield stage
        if directory.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".old", dir=directory.parent))
            directory.rename(old)  # an empty directory may be renamed over
            stage.rename(directory)
            shutil.rmtree(old, ignore_errors=True)
        else:
            stage.rename(directory)
    except OSError as error:
        raise BimoError(f"could not write {directory}: {error.strerror or error}; nothing was changed") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _write_shards(stage: Path, plan: Mapping[str, Entry], tensors: Iterable[Any], max_shard_bytes: int) -> str:
    """Write the weights; returns the number type most bytes have, for config.json."""
    left, sizes = dict(plan), dict[str, int]()
    shards: list[list[str]] = []
    shard, shard_bytes, total_bytes, total_parameters = dict[str, Any](), 0, 0, 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        _save_shard(shard, stage / f"shard-{len(shards)}")
        shards.append(list(shard))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        entry = left.pop(name, None)
        if entry is None:
            raise UsageError(f"tensor {name!r} came twice or is not one of this model's {len(plan)}")
        if tuple(tensor.shape) != entry.shape:
            raise UsageError(f"tensor {name!r} has the shape {tuple(tensor.shape)}, the model's is {entry.shape}")
        for piece_name, piece in entry.split(tensor.detach().to("cpu")):
            if shard and shard_bytes + piece.nbytes > max_shard_bytes:
                flush()
            shard[piece_name] = piece
            shard_bytes, total_bytes = shard_bytes + piece.nbytes, total_bytes + piece.nbytes
            total_parameters += piece.numel()
            dtype = str(piece.dtype).removeprefix("torch.")
            sizes[dtype] = sizes.get(dtype, 0) + piece.nbytes
    if left:
        raise UsageError(f"{len(left)} tensors of the model were not given: {_some(list(left))}")
    flush()
    _name_shards(stage, shards, {"total_size": total_bytes, "total_parameters": total_parameters})
    return max(sizes, key=lambda dtype: sizes[dtype])


def _save_shard(shard: Mapping[str, torch.Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # transformers refuses files without this metadata.
        save_file(dict(shard), file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's word for an OSError
        raise OSError(str(error)) from error
    file.chmod(0o644)  # the library makes it readable by its owner only
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _name_shards(stage: Path, shards: list[list[str]], metadata: Mapping[str, int]) -> None:
    """Names carry the number of shards, known only now."""
    if len(shards) == 1:
        (stage / "shard-0").rename(stage / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (stage / f"shard-{number}").rename(stage / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(stage / INDEX, {"metadata": dict(metadata), "weight_map": dict(sorted(weight_map.items()))})


def _copy_companions(stage: Path, source: Path) -> dict[str, Any]:
    """Copy tokenizer and generation files; returns the token ids, generation_config.json before config.json."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)
    token_ids: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            raw = read_json(source / name)
            token_ids |= {key: raw[key] for key in TOKEN_IDS if isinstance(raw, dict) and raw.get(key) is not None}
    return token_ids


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
