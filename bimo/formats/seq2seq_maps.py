"""Marian's, BART's and T5's `config.json` and tensor names, to a Seq2SeqConfig and back.

    config = seq2seq_from_hf(json.loads(text), names_of_tensors, where="config.json")
    raw = seq2seq_to_hf(config)
    plan = tensor_plan(config, SEQ2SEQ[config.family].tensors(config))

A family is one `Seq2SeqFamily` record beside its values in `models.config.SEQ2SEQ_FAMILIES`. A setting bimo does not
compute is refused by name, never ignored. Names follow transformers' modeling_marian.py, modeling_bart.py and
modeling_t5.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.formats.config_json import ACTIVATIONS
from bimo.formats.fields import Fields, check_written
from bimo.formats.maps import KeyMap
from bimo.models.config import SEQ2SEQ_FAMILIES, Seq2SeqConfig

__all__ = ["SEQ2SEQ", "Seq2SeqFamily", "seq2seq_from_hf", "seq2seq_keys", "seq2seq_to_hf"]

HEAD = "lm_head.weight"
INTEGERS = ("vocab_size", "hidden_size", "intermediate_size", "max_positions", "num_encoder_layers",
            "num_decoder_layers", "num_heads", "head_dim", "relative_buckets", "relative_max_distance")  # fmt: skip
TOKEN_IDS = ("decoder_start_token_id", "pad_token_id", "eos_token_id")
SHARES = ("dropout", "attention_dropout", "activation_dropout")
LIMITS = {"num_encoder_layers": 10_000, "num_decoder_layers": 10_000, "num_heads": 65_536}
# Settings of any family that change what is computed, and the one value bimo computes.
_ONLY: Mapping[str, Any] = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "quantization_config": None,
    "pruned_heads": {},
}


@dataclass(frozen=True)
class Seq2SeqFamily:
    """A Hugging Face `model_type`.

    architectures  the first is written; all hold the same weights, with or without the head
    keys           Seq2SeqConfig field -> config.json key
    twins          config.json key -> another one which has to say the same, because bimo has one number for both
    defaults       what transformers takes for an absent key
    only           settings that change the computation -> the one value bimo computes
    tensors        the names of the tensors of a model of this family
    """

    architectures: tuple[str, ...]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    only: Mapping[str, Any]
    tensors: Callable[[Seq2SeqConfig], KeyMap]
    twins: Mapping[str, str] = field(default_factory=dict)


def _bart_tensors(config: Seq2SeqConfig) -> KeyMap:
    modules: dict[str, tuple[str, ...]] = {"embed_tokens": ("model.shared",)}
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.layers.{{i}}", f"model.{side}.layers.{{i}}"
        modules |= {
            f"{side}.embed_positions": (f"model.{side}.embed_positions",),
            f"{side}.embed_norm": (f"model.{side}.layernorm_embedding",),
            f"{ours}.attention.qkv_proj": tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv"),
            f"{ours}.attention.out_proj": (f"{theirs}.self_attn.out_proj",),
            f"{ours}.attention_norm": (f"{theirs}.self_attn_layer_norm",),
            f"{ours}.cross_attention.q_proj": (f"{theirs}.encoder_attn.q_proj",),
            f"{ours}.cross_attention.kv_proj": tuple(f"{theirs}.encoder_attn.{x}_proj" for x in "kv"),
            f"{ours}.cross_attention.out_proj": (f"{theirs}.encoder_attn.out_proj",),
            f"{ours}.cross_attention_norm": (f"{theirs}.encoder_attn_layer_norm",),
            f"{ours}.mlp.up_proj": (f"{theirs}.fc1",),
            f"{ours}.mlp.down_proj": (f"{theirs}.fc2",),
            f"{ours}.mlp_norm": (f"{theirs}.final_layer_norm",),
        }
    computed = r"|(model\.)?(en|de)coder\.embed_positions\.weight" if config.position == "sinusoidal" else ""
    return KeyMap(
        modules,
        prefix="model.",
        ignored=rf"(model\.)?(en|de)coder\.version{computed}",
        copies=dict.fromkeys((HEAD, *_copies("model."), *_copies("")), "embed_tokens.weight"),
        old_names={"shared.weight": "encoder.embed_tokens.weight"},
        rows={"logits_bias": "final_logits_bias"},
    )


def _t5_tensors(config: Seq2SeqConfig) -> KeyMap:
    modules: dict[str, tuple[str, ...]] = {"embed_tokens": ("shared",), "lm_head": ("lm_head",)}
    for side, mlp in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}.layers.{{i}}", f"{side}.block.{{i}}.layer"
        inner = f"{theirs}.{mlp}.DenseReluDense"
        modules |= {
            f"{side}.relative_bias.table": (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",),
            f"{side}.final_norm": (f"{side}.final_layer_norm",),
            f"{ours}.attention.qkv_proj": tuple(f"{theirs}.0.SelfAttention.{x}" for x in "qkv"),
            f"{ours}.attention.out_proj": (f"{theirs}.0.SelfAttention.o",),
            f"{ours}.attention_norm": (f"{theirs}.0.layer_norm",),
            f"{ours}.cross_attention.q_proj": (f"{theirs}.1.EncDecAttention.q",),
            f"{ours}.cross_attention.kv_proj": tuple(f"{theirs}.1.EncDecAttention.{x}" for x in "kv"),
            f"{ours}.cross_attention.out_proj": (f"{theirs}.1.EncDecAttention.o",),
            f"{ours}.cross_attention_norm": (f"{theirs}.1.layer_norm",),
            f"{ours}.mlp.up_proj": (f"{inner}.wi",),
            f"{ours}.mlp.gate_up_proj": (f"{inner}.wi_0", f"{inner}.wi_1"),
            f"{ours}.mlp.down_proj": (f"{inner}.wo",),
            f"{ours}.mlp_norm": (f"{theirs}.{mlp}.layer_norm",),
        }
    return KeyMap(
        modules,
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        copies=dict.fromkeys((*_copies(""), *((HEAD,) if config.tied_embeddings else ())), "embed_tokens.weight"),
        old_names={"shared.weight": "encoder.embed_tokens.weight"},
    )


def _copies(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))


_SIZES = {"vocab_size": "vocab_size", "hidden_size": "d_model", **{name: name for name in TOKEN_IDS}}
_BART_KEYS = {
    **_SIZES,
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "max_positions": "max_position_embeddings",
    "scale_embedding": "scale_embedding",
    "activation": "activation_function",
    "tied_embeddings": "tie_word_embeddings",
    **{name: name for name in SHARES},
}
_BART_DEFAULTS = {"max_position_embeddings": 1024, "scale_embedding": False, "activation_function": "gelu",
                  "tie_word_embeddings": True, "dropout": 0.1, "attention_dropout": 0.0,
                  "activation_dropout": 0.0}  # fmt: skip
_BART_TWINS = {"encoder_attention_heads": "decoder_attention_heads", "encoder_ffn_dim": "decoder_ffn_dim"}
# tie_word_embeddings = false would untie the two sides' embeddings too.
_BART_ONLY = {**_ONLY, "tie_word_embeddings": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
              "normalize_before": False, "add_final_layer_norm": False}  # fmt: skip

SEQ2SEQ: Mapping[str, Seq2SeqFamily] = MappingProxyType(
    {
        "marian": Seq2SeqFamily(
            architectures=("MarianMTModel", "MarianModel"),
            keys=_BART_KEYS,
            twins={**_BART_TWINS, "vocab_size": "decoder_vocab_size"},
            defaults={**_BART_DEFAULTS, "decoder_start_token_id": 58100, "pad_token_id": 58100, "eos_token_id": 0},
            only={
                **_BART_ONLY,
                "share_encoder_decoder_embeddings": True,
                "normalize_embedding": False,
                "static_position_embeddings": True,
            },
            tensors=_bart_tensors,
        ),
        "bart": Seq2SeqFamily(
            architectures=("BartForConditionalGeneration", "BartModel"),
            keys=_BART_KEYS,
            twins=_BART_TWINS,
            defaults={**_BART_DEFAULTS, "decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2},
            only={**_BART_ONLY, "normalize_embedding": True, "static_position_embeddings": False},
            tensors=_bart_tensors,
        ),
        "t5": Seq2SeqFamily(
            architectures=("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel"),
            keys={
                **_SIZES,
                "num_encoder_layers": "num_layers",
                "num_decoder_layers": "num_decoder_layers",
                "num_heads": "num_heads",
                "head_dim": "d_kv",
                "intermediate_size": "d_ff",
                "max_positions": "n_positions",
                "relative_buckets": "relative_attention_num_buckets",
                "relative_max_distance": "relative_attention_max_distance",
                "norm_eps": "layer_norm_epsilon",
                "tied_embeddings": "tie_word_embeddings",
                "scale_logits": "scale_decoder_outputs",
                **dict.fromkeys(SHARES, "dropout_rate"),
            },
            defaults={
                "n_positions": 512,
                "relative_attention_num_buckets": 32,
                "relative_attention_max_distance": 128,
                "layer_norm_epsilon": 1e-6,
                "feed_forward_proj": "relu",
                "dropout_rate": 0.1,
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "eos_token_id": 1,
            },
            only=_ONLY,
            tensors=_t5_tensors,
        ),
    }
)


def seq2seq_keys(config: Seq2SeqConfig) -> KeyMap:
    """bimo's names to the file's; UnsupportedModelError for a family without a Hugging Face format."""
    if config.family not in SEQ2SEQ:
        raise UnsupportedModelError(f"family {config.family!r} has no config.json; use one of {', '.join(SEQ2SEQ)}")
    return SEQ2SEQ[config.family].tensors(config)


def seq2seq_from_hf(raw: Any, tensor_names: Collection[str], *, where: str = "config.json") -> Seq2SeqConfig:
    """A parsed `config.json`, and the names of the tensors beside it, to a Seq2SeqConfig.

    Raises UnsupportedModelError for a model, a head or a setting bimo does not compute, each by name, and
    CorruptModelError for missing fields and impossible values.
    """
    fields = Fields(raw, where)
    name = fields.text("model_type")
    family = SEQ2SEQ.get(name)
    if family is None:
        raise UnsupportedModelError(
            f"{where}: model_type is {name!r}, the encoder-decoders bimo implements are {', '.join(SEQ2SEQ)}"
        )
    fields.defaults = family.defaults
    for key, accepted in family.only.items():
        fields.only(key, accepted)
    for architecture in fields.texts("architectures") if fields.has("architectures") else []:
        if architecture not in family.architectures:
            raise UnsupportedModelError(
                f"{where}: bimo does not implement {architecture}, it has {', '.join(family.architectures)}"
            )
    for key, twin in family.twins.items():
        if fields.has(twin) and fields.integer(twin) != fields.integer(key):
            raise UnsupportedModelError(
                f"{where}: {key} is {fields.integer(key)} and {twin} is {fields.integer(twin)}; bimo computes "
                f"models where both are the same"
            )

    keys = family.keys
    values: dict[str, Any] = {"family": name, **SEQ2SEQ_FAMILIES[name]}
    for item in INTEGERS:
        if item in keys:
            default = values["num_encoder_layers"] if item == "num_decoder_layers" and name == "t5" else None
            values[item] = fields.integer(keys[item], default, **({"high": LIMITS[item]} if item in LIMITS else {}))
    for item in TOKEN_IDS[::-1]:  # T5 begins a target with padding
        values[item] = fields.integer(keys[item], values.get("pad_token_id") if name == "t5" else None, low=0)
    for item in SHARES:
        values[item] = fields.share(keys[item])
    if "norm_eps" in keys:
        values["norm_eps"] = fields.number(keys["norm_eps"])
    if "scale_embedding" in keys:
        values["scale_embedding"] = fields.flag(keys["scale_embedding"])
    values |= _read_t5(fields, tensor_names) if name == "t5" else _read_bart(fields, keys, values)
    try:
        return Seq2SeqConfig(**values)
    except ValueError as error:
        raise CorruptModelError(f"{where}: {error}") from None


def seq2seq_to_hf(config: Seq2SeqConfig) -> dict[str, Any]:
    """A Seq2SeqConfig to the `config.json` of its family.

    Raises UnsupportedModelError when it has no word for one of the settings: what is written is read back and
    compared, so nothing is lost silently.
    """
    seq2seq_keys(config)
    family = SEQ2SEQ[config.family]
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    raw: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [family.architectures[0]],
        "is_encoder_decoder": True,
    }
    for name, key in family.keys.items():
        value = getattr(config, name)
        raw[key] = names[value] if name == "activation" else value
    raw |= {twin: raw[key] for key, twin in family.twins.items()}
    if config.family == "t5":
        raw["feed_forward_proj"] = _feed_forward(config, names)

    read = seq2seq_from_hf(raw, () if config.tied_embeddings else (HEAD,))
    check_written(config, read)
    return raw


def _read_bart(fields: Fields, keys: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = values["hidden_size"], values["num_heads"]
    if hidden % heads:
        raise CorruptModelError(
            f"{fields.where}: {keys['hidden_size']} {hidden} must be a multiple of {keys['num_heads']} {heads}"
        )
    return {"head_dim": hidden // heads, "activation": _activation(fields, keys["activation"])}


def _read_t5(fields: Fields, tensor_names: Collection[str]) -> dict[str, Any]:
    """T5's MLP and head.

    v1.0 ties the head to the embedding and scales for it, v1.1 does neither and says `tie_word_embeddings: false`.
    transformers 5 writes true for both, the scaling apart, and the head's own matrix, if there is one, into the file.
    """
    said = fields.flag("tie_word_embeddings")
    scale = fields.flag("scale_decoder_outputs", said)
    tied = said and (scale or HEAD not in tensor_names)
    projection = fields.text("feed_forward_proj")
    kind, _, rest = projection.rpartition("-") if projection.startswith("gated-") else ("", "", projection)
    gated = kind == "gated"
    # transformers makes the old name mean the approximation, which is what T5 v1.1 was trained with.
    activation = "gelu_tanh" if projection == "gated-gelu" else ACTIVATIONS.get(rest)
    if activation is None:
        raise UnsupportedModelError(
            f"{fields.where}: feed_forward_proj is {projection!r}, bimo computes {', '.join(ACTIVATIONS)}, "
            f'each alone or after "gated-"'
        )
    fields.only("is_gated_act", gated)
    if fields.has("dense_act_fn") and ACTIVATIONS.get(fields.text("dense_act_fn")) != activation:
        raise UnsupportedModelError(
            f"{fields.where}: dense_act_fn is {fields.text('dense_act_fn')!r}, feed_forward_proj {projection!r}: "
            f"they should name the same activation"
        )
    return {"tied_embeddings": tied, "scale_logits": scale, "gated_mlp": gated, "activation": activation}


def _feed_forward(config: Seq2SeqConfig, names: Mapping[str, str]) -> str:
    if not config.gated_mlp:
        return names[config.activation]
    return "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{names[config.activation]}"


def _activation(fields: Fields, key: str) -> str:
    name = fields.text(key)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"{fields.where}: {key} is {name!r}, bimo computes {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
