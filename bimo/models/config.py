"""The one configuration of the one Transformer decoder.

A family (GPT-2, GPT-Neo, Llama, Mistral, Qwen2, Qwen3) is a set of values here, never a class of its own.
`formats.maps` turns a Hugging Face `config.json` or GGUF metadata into a `DecoderConfig` and back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["DecoderConfig", "RopeConfig"]


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
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim on q and k before rotation (Qwen3)
    attention_scale: float | None = None  # None: 1/sqrt(head_dim); GPT-Neo uses 1.0
    windows: tuple[int | None, ...] = ()
    tied_embeddings: bool = True
    dropout: float = 0.0  # used in training only

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
