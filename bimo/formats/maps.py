"""Six decoder families as data: config.json keys, tensor names and GGUF names beside the decoder's own.

A family is one `Family` record: which `config.json` key feeds which `DecoderConfig` field, what transformers assumes
for absent keys, which settings must have one value because bimo does not compute the others, and a `KeyMap` from
bimo's modules to the file's. `formats.config_json`, `formats.huggingface` and `formats.gguf` walk these records.

    plan = tensor_plan(config, FAMILIES[config.family].tensors)    # {bimo name: Entry(pieces in the file)}
    weight = plan[name].merge([file[piece.name] for piece in plan[name].pieces])
    for piece_name, tensor in plan[name].split(weight): ...

Names follow transformers' modeling_<family>.py and llama.cpp's gguf-py/gguf/constants.py. Encoders and
encoder-decoders have their own files, `formats.encoder_maps` and `formats.seq2seq_maps`, with the same `KeyMap`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from bimo.errors import UnsupportedModelError
from bimo.models.config import TransformerConfig

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "GGUF_FAMILIES", "Entry", "Family", "GgufFamily", "KeyMap", "Piece", "tensor_plan"]


# --------------------------------------------------------------------------------------------------- tensor names
@dataclass(frozen=True)
class Piece:
    """One tensor of a file: its name, its shape there, and the heads whose rows GGUF interleaves (0: none)."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Entry:
    """One bimo parameter and the file tensors it is made of, stacked by rows in this order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False  # the file holds (in, out): GPT-2's Conv1D
    row: bool = False  # a vector (n,) that the file holds as (1, n)

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """File tensors, in the order of `pieces`, to the parameter."""
        import torch

        parts = [_deinterleave(tensor, piece.heads) for tensor, piece in zip(tensors, self.pieces, strict=True)]
        if self.transposed:
            parts = [part.t() for part in parts]
        if self.row:
            return parts[0][0].contiguous()
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    def split(self, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The parameter to (name, tensor) pairs as the file holds them; the tensors share no memory with each other."""
        if self.row:
            return [(self.pieces[0].name, tensor[None].contiguous())]
        axis = 1 if self.transposed else 0
        parts = tensor.split([piece.shape[axis] for piece in self.pieces])
        if self.transposed:
            parts = tuple(part.t() for part in parts)
        parts = tuple(_interleave(part, piece.heads) for part, piece in zip(parts, self.pieces, strict=True))
        if len(parts) > 1:
            parts = tuple(part.clone() for part in parts)
        return [(piece.name, part.contiguous()) for piece, part in zip(self.pieces, parts, strict=True)]


def _deinterleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from GGUF's pairs (x0 y0 x1 y1 ...) to half-split (x0 x1 ... y0 y1 ...)."""
    if not heads:
        return tensor
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_deinterleave`."""
    if not heads:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


@dataclass(frozen=True)
class KeyMap:
    """bimo modules to a file's modules; `{i}` is the layer, `.weight` and `.bias` carry over.

    `prefix` is the base model's prefix, written unless `bare`, optional when read; `ignored` is a regular expression of
    buffers that older files carry and no computation needs; `copies` are tensors that some tools write again under a
    second name, with the bimo parameter they must equal; `old_names` are endings of names that a family had before;
    `rows` are vectors with a name of their own, which a file holds as (1, n), and which are zeros when it does not.
    """

    modules: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    interleaved: bool = False  # llama.cpp rotates pairs of neighbours in arch "llama", so q and k rows are reordered
    prefix: str = ""
    bare: bool = False
    ignored: str = r"(?!)"
    copies: Mapping[str, str] = field(default_factory=dict)
    old_names: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)

    def spellings(self, name: str) -> list[str]:
        """Every name under which a file may hold the tensor that is written as `name`."""
        names = [name, *(name.removesuffix(new) + old for new, old in self.old_names.items() if name.endswith(new))]
        others = [self.prefix + name if self.bare else name.removeprefix(self.prefix) for name in names]
        return names + others


def tensor_plan(config: TransformerConfig, keys: KeyMap) -> dict[str, Entry]:
    """Every parameter the model has, in its own order, with the file tensors that make it."""
    kv_rows = config.num_kv_heads * config.head_dim
    rows = {
        "qkv_proj": (config.num_heads * config.head_dim, kv_rows, kv_rows),
        "kv_proj": (kv_rows, kv_rows),
        "gate_up_proj": (config.intermediate_size, config.intermediate_size),
    }
    plan = {}
    for name, shape in _parameter_shapes(config).items():
        if name in keys.rows:
            plan[name] = Entry(shape, (Piece(keys.rows[name], (1, *shape)),), row=True)
            continue
        module, _, parameter = name.rpartition(".")
        numbered = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
        layer = numbered[1] if numbered else ""
        generic = module.replace(f"layers.{layer}.", "layers.{i}.", 1)
        sources = keys.modules.get(generic)
        if sources is None:
            raise UnsupportedModelError(f"the file format has no place for {name} of family {config.family!r}")
        transposed = generic in keys.transposed and len(shape) == 2
        part_rows = rows[module.rpartition(".")[2]] if len(sources) > 1 else (shape[0],)
        heads = (config.num_heads, config.num_kv_heads, 0)
        is_qkv = keys.interleaved and len(sources) == 3
        pieces = []
        for index, (source, count) in enumerate(zip(sources, part_rows, strict=True)):
            part_shape = (count, *shape[1:])
            pieces.append(
                Piece(
                    f"{source.replace('{i}', layer)}.{parameter}",
                    part_shape[::-1] if transposed else part_shape,
                    heads[index] if is_qkv else 0,
                )
            )
        plan[name] = Entry(shape, tuple(pieces), transposed)
    return plan


def _parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the model itself declares them; the meta device allocates nothing."""
    from bimo.models.empty import empty_model

    return {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}


@dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`.

    keys       DecoderConfig field -> config.json key (two fields may share one key)
    defaults   what transformers takes for an absent config.json key
    constants  DecoderConfig fields that are the same for every model of the family
    only       config.json settings that change the computation -> the one value bimo computes
    """

    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]
    only: Mapping[str, Any]
    tensors: KeyMap
    windows: Literal["none", "mistral", "qwen", "gpt_neo"] = "none"  # how config.json spells sliding windows


# ---------------------------------------------------------------------------------------------------- the families
_TIED_HEAD = {"lm_head.weight": "embed_tokens.weight"}
_LLAMA_TENSORS = KeyMap(
    {
        "embed_tokens": ("model.embed_tokens",),
        "layers.{i}.attention_norm": ("model.layers.{i}.input_layernorm",),
        "layers.{i}.attention.qkv_proj": tuple(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
        "layers.{i}.attention.q_norm": ("model.layers.{i}.self_attn.q_norm",),
        "layers.{i}.attention.k_norm": ("model.layers.{i}.self_attn.k_norm",),
        "layers.{i}.attention.out_proj": ("model.layers.{i}.self_attn.o_proj",),
        "layers.{i}.mlp_norm": ("model.layers.{i}.post_attention_layernorm",),
        "layers.{i}.mlp.gate_up_proj": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        "layers.{i}.mlp.down_proj": ("model.layers.{i}.mlp.down_proj",),
        "final_norm": ("model.norm",),
        "lm_head": ("lm_head",),
    },
    prefix="model.",
    ignored=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    copies=_TIED_HEAD,
)
_GPT2_TENSORS = KeyMap(
    {
        "embed_tokens": ("transformer.wte",),
        "embed_positions": ("transformer.wpe",),
        "layers.{i}.attention_norm": ("transformer.h.{i}.ln_1",),
        "layers.{i}.attention.qkv_proj": ("transformer.h.{i}.attn.c_attn",),
        "layers.{i}.attention.out_proj": ("transformer.h.{i}.attn.c_proj",),
        "layers.{i}.mlp_norm": ("transformer.h.{i}.ln_2",),
        "layers.{i}.mlp.up_proj": ("transformer.h.{i}.mlp.c_fc",),
        "layers.{i}.mlp.down_proj": ("transformer.h.{i}.mlp.c_proj",),
        "final_norm": ("transformer.ln_f",),
        "lm_head": ("lm_head",),
    },
    transposed=frozenset(
        f"layers.{{i}}.{name}" for name in ("attention.qkv_proj", "attention.out_proj", "mlp.up_proj", "mlp.down_proj")
    ),
    prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(attention\.)?(bias|masked_bias)",
    copies=_TIED_HEAD,
)
_GPT_NEO_TENSORS = dataclasses.replace(
    _GPT2_TENSORS,
    modules={
        **_GPT2_TENSORS.modules,
        "layers.{i}.attention.qkv_proj": tuple(f"transformer.h.{{i}}.attn.attention.{x}_proj" for x in "qkv"),
        "layers.{i}.attention.out_proj": ("transformer.h.{i}.attn.attention.out_proj",),
    },
    transposed=frozenset(),
)

_ROTARY_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "dropout": "attention_dropout",
    "tied_embeddings": "tie_word_embeddings",
}
_ROTARY_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_dropout": 0.0, "tie_word_embeddings": False,
                    "attention_bias": False, "mlp_bias": False}  # fmt: skip
_BIAS_KEYS = {"qkv_bias": "attention_bias", "attention_out_bias": "attention_bias"}
_GPT_CONSTANTS = {"norm": "layer", "position": "learned", "gated_mlp": False, "attention_out_bias": True,
                  "mlp_bias": True}  # fmt: skip
_GPT_DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt2": Family(
            architecture="GPT2LMHeadModel",
            keys={
                "vocab_size": "vocab_size",
                "hidden_size": "n_embd",
                "num_layers": "n_layer",
                "num_heads": "n_head",
                "intermediate_size": "n_inner",
                "max_positions": "n_positions",
                "norm_eps": "layer_norm_epsilon",
                "activation": "activation_function",
                "dropout": "resid_pdrop",
                "tied_embeddings": "tie_word_embeddings",
            },
            defaults={**_GPT_DEFAULTS, "n_positions": 1024, "resid_pdrop": 0.1},
            constants={**_GPT_CONSTANTS, "qkv_bias": True},
            only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
            tensors=_GPT2_TENSORS,
        ),
        "gpt_neo": Family(
            architecture="GPTNeoForCausalLM",
            keys={
                "vocab_size": "vocab_size",
                "hidden_size": "hidden_size",
                "num_layers": "num_layers",
                "num_heads": "num_heads",
                "intermediate_size": "intermediate_size",
                "max_positions": "max_position_embeddings",
                "norm_eps": "layer_norm_epsilon",
                "activation": "activation_function",
                "dropout": "resid_dropout",
                "tied_embeddings": "tie_word_embeddings",
            },
            defaults={**_GPT_DEFAULTS, "max_position_embeddings": 2048, "resid_dropout": 0.0},
            constants={**_GPT_CONSTANTS, "attention_scale": 1.0},
            only={},
            tensors=_GPT_NEO_TENSORS,
            windows="gpt_neo",
        ),
        "llama": Family(
            architecture="LlamaForCausalLM",
            keys={**_ROTARY_KEYS, **_BIAS_KEYS, "mlp_bias": "mlp_bias"},
            defaults={**_ROTARY_DEFAULTS, "max_position_embeddings": 2048},
            constants={},
            only={"rope_interleaved": False},
            tensors=_LLAMA_TENSORS,
        ),
        "mistral": Family(
            architecture="MistralForCausalLM",
            keys=_ROTARY_KEYS,
            defaults={
                **_ROTARY_DEFAULTS,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            constants={},
            only={"layer_types": None},
            tensors=_LLAMA_TENSORS,
            windows="mistral",
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            keys=_ROTARY_KEYS,
            defaults={**_ROTARY_DEFAULTS, "max_position_embeddings": 32768, "sliding_window": 4096},
            constants={"qkv_bias": True},
            only={"use_mrope": False},
            tensors=_LLAMA_TENSORS,
            windows="qwen",
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            keys={**_ROTARY_KEYS, **_BIAS_KEYS},
            defaults={**_ROTARY_DEFAULTS, "max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096},
            constants={"qk_norm": True},
            only={},
            tensors=_LLAMA_TENSORS,
            windows="qwen",
        ),
    }
)


# ------------------------------------------------------------------------------------------------------------ GGUF
@dataclass(frozen=True)
class GgufFamily:
    """A GGUF `general.architecture`.

    family        the family it is read as
    written_from  families that can be written as it
    keys          metadata key after "<architecture>." -> config.json key of `family`
    writable      DecoderConfig fields -> the values llama.cpp's implementation of the architecture computes
    """

    family: str
    written_from: tuple[str, ...]
    keys: Mapping[str, str]
    tensors: KeyMap
    writable: Mapping[str, tuple[Any, ...]]


_GGUF_MODULES = {
    "embed_tokens": ("token_embd",),
    "embed_positions": ("position_embd",),
    "layers.{i}.attention_norm": ("blk.{i}.attn_norm",),
    "layers.{i}.attention.qkv_proj": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    "layers.{i}.attention.q_norm": ("blk.{i}.attn_q_norm",),
    "layers.{i}.attention.k_norm": ("blk.{i}.attn_k_norm",),
    "layers.{i}.attention.out_proj": ("blk.{i}.attn_output",),
    "layers.{i}.mlp_norm": ("blk.{i}.ffn_norm",),
    "layers.{i}.mlp.gate_up_proj": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "layers.{i}.mlp.up_proj": ("blk.{i}.ffn_up",),
    "layers.{i}.mlp.down_proj": ("blk.{i}.ffn_down",),
    "final_norm": ("output_norm",),
    "lm_head": ("output",),
}
_GGUF_ROTARY_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GGUF_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_SILU = {"activation": ("silu",)}

GGUF_FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily(
            "llama", ("llama", "mistral"), _GGUF_ROTARY_KEYS, KeyMap(_GGUF_MODULES, interleaved=True), _SILU
        ),
        "qwen2": GgufFamily("qwen2", ("qwen2",), _GGUF_ROTARY_KEYS, KeyMap(_GGUF_MODULES), _SILU),
        "qwen3": GgufFamily(
            "qwen3", ("qwen3",), _GGUF_ROTARY_KEYS, KeyMap(_GGUF_MODULES), {**_SILU, "qkv_bias": (False,)}
        ),
        "gpt2": GgufFamily(
            "gpt2",
            ("gpt2",),
            _GGUF_GPT2_KEYS,
            KeyMap({**_GGUF_MODULES, "layers.{i}.attention.qkv_proj": ("blk.{i}.attn_qkv",)}),
            {"activation": ("gelu_tanh",)},
        ),
    }
)
