"""From a model directory and the user's wishes to a runner: which weights, in which precision, by which loops.

    quant     weights                                    by the kernels          by plain torch
    "int8"    8 bits, a scale a row (quant.weights)      the whole step          rounded, then widened again
    "int4"    4 bits, a scale every 32; the head 8       the whole step          the same
    "file"    as the GGUF file has them                  the whole step          the same
    "none"    bfloat16, float32 or float16 (`dtype`)     attention and norms     oneDNN's products

An encoder-decoder and an LSTM are computed by plain torch as they are ("none"), the LSTM in float32: it adds up its
state over a whole text.

On a CPU the default is int8 where the kernels run: it is the fastest, and costs smollm2 less than 1 % of perplexity
(LOG.md). A `dtype` that is asked for means "none".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.backends.adapters import adapted_weights, attach_adapter, unmerged
from bimo.backends.packed import PackedFile
from bimo.engine.cache import NUMBER_BYTES, bytes_per_block
from bimo.engine.fused import FusedDecoder, FusedWeights, can_fuse
from bimo.engine.runner import ModelRunner
from bimo.errors import CorruptModelError, UnsupportedModelError, UsageError
from bimo.formats.hub import gguf_source
from bimo.formats.huggingface import load_model, load_weights, read_json, read_model_config
from bimo.models.catalog import QUANT_BITS
from bimo.models.config import DecoderConfig, EncoderConfig, LSTMConfig, Seq2SeqConfig
from bimo.runtime import available_memory, dtype_name, return_free_memory

if TYPE_CHECKING:
    import torch

    from bimo.engine.low_rank import Change
    from bimo.models.decoder import Decoder
    from bimo.models.recurrent import LSTMLanguageModel
    from bimo.models.seq2seq import EncoderDecoder

    Writer = Decoder | EncoderDecoder | LSTMLanguageModel | FusedDecoder

__all__ = [
    "BLOCK_SIZE",
    "CACHE_DTYPES",
    "QUANTS",
    "AnswerRules",
    "Precision",
    "build_model",
    "build_runner",
    "choose_precision",
    "load_decoder",
    "read_rules",
    "read_writer_config",
]

WriterConfig = DecoderConfig | Seq2SeqConfig | LSTMConfig  # of what writes text
QUANTS = ("int8", "int4", "file", "none")
CACHE_DTYPES = ("auto", "int8", "bfloat16")
BLOCK_SIZE = 16  # tokens a cache block; smaller shares more of a prefix, larger gathers faster
KV_CACHE_BYTES = 192 << 20  # default size of the KV cache, if that much memory is free
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """What is computed with: `quant` of the weights, `dtype` of activations and cache ("none") or of the cache.
    Number types by name, so that a fused model needs no torch."""

    quant: str
    dtype: str
    cache_dtype: str
    fused: bool  # the whole step by the kernels
    why: str

    @property
    def name(self) -> str:
        """For people: "int8", "the file's own bits", "bfloat16", "int8 widened to bfloat16"."""
        if self.quant == "none":
            return self.dtype
        weights = "the file's own bits" if self.quant == "file" else self.quant
        return weights if self.fused else f"{weights} widened to {self.dtype}"


@dataclass(frozen=True)
class AnswerRules:
    """What a model's generation_config.json says of every answer: the token it begins with, those it never has."""

    first_token_id: int | None = None
    banned_token_ids: tuple[int, ...] = ()


def read_writer_config(reference: str, directory: Path) -> WriterConfig:
    """The config of a model that writes text. Raises UnsupportedModelError for an encoder, which only reads it."""
    config = read_model_config(directory)
    if isinstance(config, EncoderConfig):
        raise UnsupportedModelError(
            f"{reference} is an encoder ({config.family}), which reads text and does not write it: open it with "
            "bimo.formats.huggingface.load_encoder, for embeddings, classes and masked words; a decoder or an "
            "encoder-decoder writes"
        )
    return config


def read_rules(directory: Path, config: WriterConfig) -> AnswerRules:
    """An encoder-decoder's rules: it never writes padding nor the token that starts every target, which it was never
    taught, nor single `bad_words_ids`; and `forced_bos_token_id` comes first (mBART's language, BART's <s>)."""
    if not isinstance(config, Seq2SeqConfig):
        return AnswerRules()
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):  # older models have them in the first
        if (directory / name).is_file():
            found = read_json(directory / name)
            settings.update({k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else {})
    first, bad = settings.get("forced_bos_token_id"), settings.get("bad_words_ids", [])
    words = bad if isinstance(bad, list) else [bad]
    single = [word[0] for word in words if isinstance(word, list) and len(word) == 1]
    for token in [*single, *([] if first is None else [first])]:
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise CorruptModelError(
                f"{directory / 'generation_config.json'} forces or forbids the token {token!r}, ids are 0 to "
                f"{config.vocab_size - 1}: fetch the model again"
            )
    banned = {config.pad_token_id, config.decoder_start_token_id, *single} - {config.eos_token_id, first}
    return AnswerRules(first, tuple(sorted(banned)))


def choose_precision(
    config: WriterConfig,
    *,
    quant: str | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    device: str = "cpu",
    obstacle: str | None = None,
) -> Precision:
    """Settle what was left open; `obstacle`: why the kernels cannot run the model, whatever its config says. Raises
    UsageError for wishes that exclude each other."""
    if quant is not None and quant not in QUANTS:
        raise UsageError(f"quant must be one of {', '.join(QUANTS)}, not {quant!r}", "quant")
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        raise UsageError(
            f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {cache_dtype!r}", "kv_cache_dtype"
        )
    wished = None if dtype == "auto" else dtype
    if wished is not None and quant not in (None, "none"):
        raise UsageError(f'dtype is for unquantised weights: give quant="none" or leave dtype={wished!r} out', "dtype")
    if not isinstance(config, DecoderConfig):
        return _as_it_is(config, quant, dtype, cache_dtype, device)
    obstacle = obstacle or (can_fuse(config) if device == "cpu" else f"the device is {device}")
    why = "asked for"
    if quant is None:
        quant = "none" if wished is not None or obstacle else "int8"
        why = {
            "int8": "the fastest here, within 1 % of float32's perplexity",
            "none": f"dtype {wished} was asked for" if wished else f"int8 would not be faster: {obstacle}",
        }[quant]
    fused = quant != "none" and obstacle is None
    number_type = "bfloat16" if fused else dtype_name(dtype, device)
    if cache_dtype not in (None, "auto") and not fused:
        raise UsageError(
            f"a cache in {cache_dtype} needs quantised weights and the kernels ({obstacle or 'quant is none'}): leave "
            "kv_cache_dtype out",
            "kv_cache_dtype",
        )
    # half the memory to hold and to read; beside int8 weights it costs no perplexity that could be measured
    narrow = fused and cache_dtype != "bfloat16"
    return Precision(quant, number_type, "int8" if narrow else number_type, fused, why)


def _as_it_is(
    config: Seq2SeqConfig | LSTMConfig, quant: str | None, dtype: str | None, cache_dtype: str | None, device: str
) -> Precision:
    """Precision of what has no quantised weights."""
    kind = "an encoder-decoder" if isinstance(config, Seq2SeqConfig) else "an LSTM"
    if quant not in (None, "none"):
        raise UsageError(
            f"quant {quant!r} is for decoders, {config.family} is {kind} and computed as it is: leave quant out",
            "quant",
        )
    if cache_dtype not in (None, "auto"):
        raise UsageError(
            f"kv_cache_dtype is for quantised decoders, {config.family} is {kind}: leave it out", "kv_cache_dtype"
        )
    if dtype is None and not isinstance(config, Seq2SeqConfig):
        dtype = "float32"
    name = dtype_name(dtype, device)
    return Precision("none", name, name, False, f"{kind} is computed as it is")


def load_decoder(
    directory: Any, config: DecoderConfig, dtype: torch.dtype, device: str = "cpu", weights: Any = None
) -> Decoder:
    """Build the model without memory, then let each weight arrive in its number type: peak = weights + one tensor."""
    from bimo.models.empty import empty_model

    model: Decoder = empty_model(config)
    for name, tensor in weights or load_weights(directory, config):
        model.load_state_dict({name: tensor.to(device, dtype)}, strict=False, assign=True)
    model.reset_rope()
    return model.eval().requires_grad_(False)


def build_runner(
    reference: str,
    directory: Path,
    config: WriterConfig,
    precision: Precision,
    *,
    device: str = "cpu",
    kv_cache_tokens: int | None = None,
    context_length: int | None = None,
    adapter: Path | None = None,
    changes: Mapping[str, Change] | None = None,
) -> ModelRunner:
    """Load the weights and make the runner; for `adapter` and `changes` see `build_model`. Raises UsageError when the
    memory does not hold them, with the mend."""
    model = build_model(
        reference, directory, config, precision, device=device, adapter=adapter, changes=dict(changes or {})
    )
    num_blocks = _num_blocks(config, precision.cache_dtype, kv_cache_tokens, context_length or config.max_positions)
    return ModelRunner(model, num_blocks=num_blocks, block_size=BLOCK_SIZE)


def build_model(
    reference: str,
    directory: Path,
    config: WriterConfig,
    precision: Precision,
    *,
    device: str = "cpu",
    adapter: Path | None = None,
    changes: dict[str, Change] | None = None,
) -> Writer:
    """Load the weights into the loops that `precision` names.

    adapter: the folder of one that the model is to have; merged into the weights where it can be. changes: adapters
    that are computed beside each other, for requests to choose from (decoders only).
    """
    need_memory(config, precision)
    model: Writer
    if not isinstance(config, DecoderConfig):
        model = _load_as_it_is(directory, precision, device, adapter)
    elif precision.fused:
        model = _load_fused(reference, directory, config, precision, adapter, changes or {})
    else:
        import torch

        from bimo.engine.packing import pack_linear_layers

        weights = _weights(directory, config, precision, _source(reference, directory, precision))
        can_merge = adapter is not None and unmerged(adapter) is None
        if adapter is not None and can_merge:
            weights = adapted_weights(weights, config, adapter)
        dtype = getattr(torch, precision.dtype)
        model = load_decoder(directory, config, dtype, device, _dequantised(weights, precision, config.tied_embeddings))
        if adapter is not None and not can_merge:
            attach_adapter(model, adapter, dtype, merge=False)
        if changes:
            from bimo.engine.adapted import attach_changes

            attach_changes(model, changes)
        pack_linear_layers(model)
    return_free_memory()
    return model


def _load_as_it_is(
    directory: Path, precision: Precision, device: str, adapter: Path | None
) -> EncoderDecoder | LSTMLanguageModel:
    import torch

    from bimo.engine.packing import pack_linear_layers
    from bimo.models.recurrent import LSTMLanguageModel
    from bimo.models.seq2seq import EncoderDecoder

    dtype = getattr(torch, precision.dtype)
    model = load_model(directory, dtype).to(device).requires_grad_(False)
    if adapter is not None:
        attach_adapter(model, adapter, dtype, merge=unmerged(adapter) is None)
    assert isinstance(model, EncoderDecoder | LSTMLanguageModel)
    if isinstance(model, EncoderDecoder):
        pack_linear_layers(model)
    return model


def _load_fused(
    reference: str,
    directory: Path,
    config: DecoderConfig,
    precision: Precision,
    adapter: Path | None,
    changes: dict[str, Change],
) -> FusedDecoder:
    """From the weights as they were packed once, else from the model's own, which takes ten times as long. With an
    adapter merged into them they are packed each time: nothing says when its base's files change."""
    source = _source(reference, directory, precision)
    if adapter is not None:
        weights = adapted_weights(_weights(directory, config, precision, source), config, adapter)
        return _fused(config, _fuse(config, weights, precision), precision, changes)
    file = PackedFile(directory, source, precision.quant)
    if (packed := file.read()) is not None:
        try:
            return _fused(config, packed, precision, changes)
        except (ValueError, KeyError) as error:  # whole, and not this model's: somebody changed it
            log.warning("%s cannot be used (%s): it is made again", file.path, error)
    packed = _fuse(config, _weights(directory, config, precision, source), precision)
    file.write(packed)
    return _fused(config, packed, precision, changes)


def _fuse(config: DecoderConfig, weights: Iterator[Any], precision: Precision) -> FusedWeights:
    from bimo.engine.fusing import fuse_weights

    return fuse_weights(config, weights, precision.quant)


def _fused(
    config: DecoderConfig, weights: FusedWeights, precision: Precision, changes: dict[str, Change]
) -> FusedDecoder:
    parts = {}
    if changes:
        from bimo.engine.fusing import pack_change

        parts = {name: pack_change(config, change, weights) for name, change in changes.items()}
    return FusedDecoder(config, weights, adapters=parts, cache_dtype=precision.cache_dtype)


def need_memory(config: WriterConfig, precision: Precision) -> None:
    """Refuse a model whose weights do not fit into the free memory: need, have, and what would help."""
    bits = QUANT_BITS[precision.quant] if precision.fused else 8.0 * NUMBER_BYTES[precision.dtype]
    largest = config.vocab_size * config.hidden_size * 4 * 2  # a tensor on its way, plain and quantised
    needed, free = int(config.num_parameters * bits / 8) + largest, available_memory()
    if free is None or needed <= free:
        return
    mend = "end other programs, or take a smaller model (`bimo models`)"
    can_shrink = isinstance(config, DecoderConfig) and precision.quant != "int4"
    if can_shrink and config.num_parameters * QUANT_BITS["int4"] / 8 + largest <= free:
        mend = 'give --quant int4 (quant="int4" in Python), or ' + mend
    raise UsageError(
        f"the model's {config.num_parameters / 1e9:.2f} billion weights need {needed >> 20} MB in {precision.name}, "
        f"{free >> 20} MB are free: {mend}",
        "model",
    )


def _source(reference: str, directory: Path, precision: Precision) -> Path:
    """Where the weights are: the model's directory, or for "file" its GGUF file."""
    if precision.quant != "file":
        return directory
    file = gguf_source(reference, directory)
    if file is None:
        raise UsageError(
            f'quant "file" uses the weights as a GGUF file has them, and {reference} is none: give the .gguf file, or '
            'quant "int8" or "int4"',
            "quant",
        )
    return file


def _weights(directory: Path, config: DecoderConfig, precision: Precision, source: Path) -> Iterator[Any]:
    if precision.quant != "file":
        return load_weights(directory, config)
    from bimo.formats.gguf_blocks import load_gguf_weights

    return load_gguf_weights(source, config)


def _dequantised(weights: Iterator[Any], precision: Precision, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Plain tensors, rounded as asked: the values a fused model computes with, for plain torch."""
    import torch

    from bimo.quant.weights import QuantisedWeight, round_weight

    dtype = getattr(torch, precision.dtype)
    for name, weight in weights:
        if precision.quant != "none":
            weight = round_weight(name, weight, precision.quant, tied=tied)
        yield name, weight.dequantise(dtype) if isinstance(weight, QuantisedWeight) else weight


def _num_blocks(config: WriterConfig, dtype: str, tokens: int | None, context: int) -> int:
    """Blocks of KV cache. Asked for: exactly that. Else what KV_CACHE_BYTES holds, within half of the free memory,
    and no more than 64 full contexts (of an encoder-decoder: sources and answers) could use."""
    per_block = bytes_per_block(config, dtype, BLOCK_SIZE)
    contexts = 128 if isinstance(config, Seq2SeqConfig) else 64
    if tokens is not None:
        if tokens < BLOCK_SIZE:
            raise UsageError(f"kv_cache_tokens must be at least {BLOCK_SIZE}, not {tokens}", "kv_cache_tokens")
        needed, free = -(-tokens // BLOCK_SIZE) * per_block, available_memory()
        if free is not None and needed > free:
            raise UsageError(
                f"a KV cache of {tokens} tokens needs {needed >> 20} MB, {free >> 20} MB are free: lower "
                "kv_cache_tokens",
                "kv_cache_tokens",
            )
        return -(-tokens // BLOCK_SIZE)
    budget = min(KV_CACHE_BYTES, (available_memory() or KV_CACHE_BYTES * 2) // 2)
    return max(min(budget // per_block, contexts * -(-context // BLOCK_SIZE)), 4)
