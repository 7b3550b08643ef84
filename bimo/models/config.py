"""The configurations of the one Transformer: as a decoder, and as an encoder.

A family (GPT-2, GPT-Neo, Llama, Mistral, Qwen2, Qwen3; BERT) is a set of values here, never a class of its own.
`formats.maps` and `formats.encoder_maps` turn a Hugging Face `config.json` or GGUF metadata into one and back.
Both have what a block reads (`models.block`): what is a choice for one and settled for the other is a constant there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

__all__ = ["DecoderConfig", "EncoderConfig", "RopeConfig", "TransformerConfig"]

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


TransformerConfig = DecoderConfig | EncoderConfig
