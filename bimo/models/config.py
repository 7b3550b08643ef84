"""The configurations of the one Transformer: as a decoder, as an encoder, and as both; and the LSTM's beside it.

A family (GPT-2, GPT-Neo, Llama, Mistral, Qwen2, Qwen3; BERT; Marian, BART, T5) is a set of values here, never a class
of its own. `formats.maps`, `formats.encoder_maps` and `formats.seq2seq_maps` turn a Hugging Face `config.json` or GGUF
metadata into one and back. All Transformers have what a block reads (`models.block`): what is a choice for one and
settled for the other is a constant there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

__all__ = [
    "SEQ2SEQ_FAMILIES",
    "DecoderConfig",
    "EncoderConfig",
    "LSTMConfig",
    "ModelConfig",
    "RopeConfig",
    "Seq2SeqConfig",
    "TransformerConfig",
]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) and how it is stretched to longer contexts.

    kind: "default" | "linear" (positions / factor) | "llama3" (Llama 3.1's band-wise rule) |
          "yarn" (arXiv:2309.00071). The fields below `factor` matter only to the kinds named beside them.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int | None = None  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: correction range rounded to whole dimensions


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of a pre-norm decoder-only Transformer. Sizes count elements; windows count tokens.

    `windows[i]` is layer i's sliding window (a token sees itself and the `window - 1` before it), None for
    full attention; an empty tuple means full attention everywhere.
    """

    family: str  # the Hugging Face `model_type`; names the key map used on export, nothing else
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int  # the context length in tokens
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    position: Literal["rotary", "learned"] = "rotary"
    rope: RopeConfig = RopeConfig()
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k before rotation (Qwen3)
    attention_scale: float | None = None  # None: 1/sqrt(head_dim); GPT-Neo uses 1.0
    windows: tuple[int | None, ...] = ()
    tied_embeddings: bool = True
    dropout: float = 0.0  # used in training only

    norm_first: ClassVar[bool] = True  # x + f(norm(x)), as in GPT-2 and everything since
    activation_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, or None for full attention."""
        return self.windows[layer] if self.windows else None

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied embeddings counted once."""
        hidden, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        q = self.num_heads * self.head_dim
        biases = (q + 2 * kv) * self.qkv_bias + hidden * self.attention_out_bias
        attention = hidden * (q + 2 * kv) + q * hidden + 2 * self.head_dim * self.qk_norm
        mlp = hidden * self.intermediate_size * (3 if self.gated_mlp else 2)
        biases += (self.intermediate_size * (2 if self.gated_mlp else 1) + hidden) * self.mlp_bias
        norm = hidden * (2 if self.norm == "layer" else 1)
        embeddings = self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
        embeddings += self.max_positions * hidden if self.position == "learned" else 0
        return self.num_layers * (attention + mlp + biases + 2 * norm) + norm + embeddings

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of a post-norm bidirectional Transformer (BERT, arXiv:1810.04805), and the heads it carries.

    pooler: a layer over the first token, which the next sentence and the classification head read.
    masked_head: predicts words that were hidden. next_sentence_head: is the second segment what follows the first?
    labels: names of the classes; none, no classification head.
    problem_type: Hugging Face's word for the loss of the classes, which changes no logits; None: not said.
    """

    family: str = "bert"  # the Hugging Face `model_type`
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2  # segments
    norm_eps: float = 1e-12
    activation: Activation = "gelu"
    dropout: float = 0.1  # all three in training only
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None  # None: as `dropout`
    pad_token_id: int | None = 0
    pooler: bool = True
    masked_head: bool = False
    next_sentence_head: bool = False
    labels: tuple[str, ...] = ()
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    norm: ClassVar[Literal["rms", "layer"]] = "layer"
    norm_first: ClassVar[bool] = False  # norm(x + f(x)), as in the original Transformer
    activation_dropout: ClassVar[float] = 0.0
    gated_mlp: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = True
    attention_out_bias: ClassVar[bool] = True
    mlp_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not one of the {self.vocab_size} tokens")
        if not self.pooler and (self.next_sentence_head or self.labels):
            raise ValueError("next_sentence_head and labels read the pooler: set pooler=True")

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own keys and values."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.head_dim**-0.5

    def window(self, layer: int) -> int | None:
        """Every layer sees everything."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return dataclasses.asdict(self)


# What makes a family of encoder-decoders, beside Seq2SeqConfig's defaults, which are the original Transformer's.
SEQ2SEQ_FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "marian": {},
        "bart": {
            "position": "learned",
            "position_offset": 2,
            "scale_embedding": False,
            "embed_norm": True,
            "activation": "gelu",
        },
        "t5": {
            "position": "relative",
            "scale_embedding": False,
            "norm": "rms",
            "norm_eps": 1e-6,
            "norm_first": True,
            "bias": False,
            "attention_scale": 1.0,
            "logits_bias": False,
            "scale_logits": True,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
        },
    }
)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Architecture of an encoder-decoder: one Transformer reads a source, another writes a target and looks at it.

    The defaults are the original Transformer's (arXiv:1706.03762) as Marian builds it; `of_family("bart", ...)` and
    `of_family("t5", ...)` begin with the values of BART (arXiv:1910.13461) and T5 (arXiv:1910.10683).

    position: "sinusoidal" (computed), "learned" (a table), "relative" (T5's bias on the attention scores by distance,
    one table for the encoder and one for the decoder, shared by their layers).
    """

    family: str = "marian"  # the Hugging Face `model_type`; names the key map used on export, nothing else
    vocab_size: int  # of source and target, which share one embedding
    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int = 512  # tokens of a source, and of a target; "relative" computes longer ones as well
    decoder_start_token_id: int  # what every target begins with; never predicted
    pad_token_id: int
    eos_token_id: int
    position: Literal["sinusoidal", "learned", "relative"] = "sinusoidal"
    position_offset: int = 0  # "learned" only: unused rows at the start of the table (fairseq counted from its padding)
    relative_buckets: int = 32  # "relative" only
    relative_max_distance: int = 128  # tokens; all farther ones share a bucket
    scale_embedding: bool = True  # embeddings times √hidden_size
    embed_norm: bool = False  # a norm over embedding + position
    norm: Literal["rms", "layer"] = "layer"
    norm_eps: float = 1e-5
    norm_first: bool = False  # True: x + f(norm(x)), and a norm after the last layer; False: norm(x + f(x))
    activation: Activation = "relu"
    gated_mlp: bool = False
    bias: bool = True  # on every projection
    attention_scale: float | None = None  # None: 1/sqrt(head_dim)
    tied_embeddings: bool = True  # the embedding is the head as well
    logits_bias: bool = True
    scale_logits: bool = False  # hidden states times 1/√hidden_size before the head
    dropout: float = 0.1  # all three in training only: on embeddings and on what is added to the residual path,
    attention_dropout: float = 0.0  # on attention weights,
    activation_dropout: float = 0.0  # within the MLP

    qk_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.position == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"sinusoidal positions need an even hidden_size, not {self.hidden_size}")
        if self.position == "relative" and (self.relative_buckets < 4 or self.relative_buckets % 2):
            raise ValueError(f"relative_buckets must be an even number from 4 on, not {self.relative_buckets}")
        if self.position == "relative" and self.relative_max_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_max_distance {self.relative_max_distance} must be more than half of the "
                f"{self.relative_buckets} buckets"
            )
        for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is not one of the {self.vocab_size} tokens")

    @classmethod
    def of_family(cls, family: str, **values: Any) -> Self:
        """A configuration that begins with the family's values; KeyError for a family bimo does not know."""
        return cls(**{"family": family, **SEQ2SEQ_FAMILIES[family], **values})

    @property
    def num_kv_heads(self) -> int:
        """Every query head has its own keys and values."""
        return self.num_heads

    @property
    def qkv_bias(self) -> bool:
        """As every projection."""
        return self.bias

    @property
    def attention_out_bias(self) -> bool:
        """As every projection."""
        return self.bias

    @property
    def mlp_bias(self) -> bool:
        """As every projection."""
        return self.bias

    @property
    def scale(self) -> float:
        """Factor on q·k before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Every layer sees everything it may see."""
        return None

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied embeddings counted once."""
        hidden, inner = self.hidden_size, self.num_heads * self.head_dim
        attention = 4 * hidden * inner + (3 * inner + hidden) * self.bias
        mlp = hidden * self.intermediate_size * (3 if self.gated_mlp else 2)
        mlp += (self.intermediate_size * (2 if self.gated_mlp else 1) + hidden) * self.bias
        norm = hidden * (2 if self.norm == "layer" else 1)
        encoder = self.num_encoder_layers * (attention + mlp + 2 * norm)
        decoder = self.num_decoder_layers * (2 * attention + mlp + 3 * norm)
        positions = {"sinusoidal": 0, "learned": (self.max_positions + self.position_offset) * hidden}
        side = positions.get(self.position, self.relative_buckets * self.num_heads)
        side += norm * (self.embed_norm + self.norm_first)
        embeddings = self.vocab_size * (hidden * (1 if self.tied_embeddings else 2) + self.logits_bias)
        return encoder + decoder + 2 * side + embeddings

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Sizes count elements. The embedding is as wide as the state, since it is the head as well unless untied."""

    vocab_size: int
    hidden_size: int
    num_layers: int = 2
    max_positions: int = 1024  # tokens of a text it was trained on; nothing in it ends there
    tied_embeddings: bool = True
    dropout: float = 0.0  # in training only: on the embedding, between the layers, before the head

    family: ClassVar[str] = "lstm"

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, tied embeddings counted once."""
        hidden = self.hidden_size
        layer = 4 * (2 * hidden * hidden + 2 * hidden)  # four gates: two matrices and, as torch has it, two biases
        return self.num_layers * layer + self.vocab_size * hidden * (1 if self.tied_embeddings else 2)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return dataclasses.asdict(self)


TransformerConfig = DecoderConfig | EncoderConfig | Seq2SeqConfig
ModelConfig = TransformerConfig | LSTMConfig
