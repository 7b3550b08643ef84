"""`config.json` to a DecoderConfig and back, for the families in `formats.maps`.

    config = config_from_hf(json.loads(text), where="config.json")
    raw = config_to_hf(config)

Both layouts of rotary settings are read (transformers 4's `rope_theta` + `rope_scaling`, transformers 5's
`rope_parameters`). A setting bimo does not compute is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.formats.fields import Fields, check_written
from bimo.formats.maps import FAMILIES
from bimo.models.config import SEQ2SEQ_FAMILIES, DecoderConfig, RopeConfig

__all__ = ["config_from_hf", "config_to_hf"]

Windows = tuple[int | None, ...]

# Settings of any family that change what is computed, and the one value bimo computes.
_ONLY = {"is_encoder_decoder": False, "add_cross_attention": False, "quantization_config": None}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}  # fmt: skip
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
ROPE_NEUTRAL = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
                "finetuned"}  # fmt: skip


def config_from_hf(raw: Any, *, where: str = "config.json") -> DecoderConfig:
    """A parsed `config.json` to a DecoderConfig.

    Raises UnsupportedModelError for a family or a setting bimo does not compute (each by name: a setting that changes
    the numbers is never ignored) and CorruptModelError for missing fields and impossible values.
    """
    fields = Fields(raw, where)
    family_name = fields.text("model_type")
    family = FAMILIES.get(family_name)
    if family_name == "bert":
        raise UnsupportedModelError(
            f"{where}: bert is an encoder, which reads text and does not write it: open it with "
            f"bimo.formats.huggingface.load_encoder, for embeddings, classes and masked words"
        )
    if family_name in (*SEQ2SEQ_FAMILIES, "bimo_lstm"):
        raise UnsupportedModelError(
            f"{where}: {family_name} is not a decoder-only Transformer, which is asked for here: open it with "
            f"bimo.formats.huggingface.load_model"
        )
    if family is None:
        raise UnsupportedModelError(
            f"{where}: bimo does not implement model_type {family_name!r}, it runs {', '.join(FAMILIES)}; "
            f'serve this model with backend = "vllm", or use it through transformers'
        )
    fields.defaults = family.defaults
    for key, accepted in {**_ONLY, **family.only}.items():
        fields.only(key, accepted)

    keys = family.keys
    values: dict[str, Any] = {"family": family_name, **family.constants}
    for name in ("vocab_size", "hidden_size", "max_positions"):
        values[name] = fields.integer(keys[name])
    layers = values["num_layers"] = fields.integer(keys["num_layers"], high=10_000)
    heads = values["num_heads"] = fields.integer(keys["num_heads"], high=65_536)
    values["num_kv_heads"] = fields.integer(keys["num_kv_heads"], heads) if "num_kv_heads" in keys else heads
    values["head_dim"] = _head_dim(fields, keys, values["hidden_size"], heads)
    values["intermediate_size"] = fields.integer(keys["intermediate_size"], 4 * values["hidden_size"])
    values["norm_eps"] = fields.number(keys["norm_eps"])
    values["dropout"] = fields.number(keys["dropout"], low=0.0)
    for name in ("tied_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias"):
        if name in keys:
            values[name] = fields.flag(keys[name])
    activation = fields.text(keys["activation"])
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{where}: {keys['activation']} is {activation!r}, bimo computes {', '.join(ACTIVATIONS)}"
        )
    values["activation"] = ACTIVATIONS[activation]
    values["windows"] = _WINDOWS[family.windows][0](fields, layers)
    if "learned" not in family.constants.values():
        values["rope"] = _read_rope(fields, values["max_positions"])
        if values["head_dim"] % 2:
            raise CorruptModelError(f"{where}: rotary positions need an even head size, not {values['head_dim']}")
    try:
        return DecoderConfig(**values)
    except ValueError as error:
        raise CorruptModelError(f"{where}: {error}") from None


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A DecoderConfig to the `config.json` of its family.

    Raises UnsupportedModelError when the family's format has no word for one of the settings: what is written is read
    back and compared, so nothing is lost silently.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise UnsupportedModelError(f"family {config.family!r} has no config.json; use one of {', '.join(FAMILIES)}")
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    raw: dict[str, Any] = {"model_type": config.family, "architectures": [family.architecture]}
    for name, key in family.keys.items():
        value = getattr(config, name)
        raw[key] = names[value] if name == "activation" else value
    raw |= _WINDOWS[family.windows][1](config)
    if config.position == "rotary":
        raw |= _write_rope(config.rope)

    def no_window(name: str, asked: Any, got: Any) -> bool:
        return name == "windows" and config.num_layers * (None,) in (asked, got)

    check_written(config, config_from_hf(raw), no_window)
    return raw


def _head_dim(fields: Fields, keys: Mapping[str, str], hidden: int, heads: int) -> int:
    if "head_dim" in keys and fields.has(keys["head_dim"]):
        return fields.integer(keys["head_dim"])
    if hidden % heads:
        raise CorruptModelError(
            f"{fields.where}: {keys['hidden_size']} {hidden} must be a multiple of {keys['num_heads']} {heads}"
        )
    return hidden // heads


def _read_rope(fields: Fields, max_positions: int) -> RopeConfig:
    """Old layout (`rope_theta` + `rope_scaling`) and the new one (`rope_parameters` holds both)."""
    key = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    rope = fields.section(key)
    for source in (fields, rope):
        source.only("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta", 10000.0)
    kind = rope.text("rope_type") if rope.has("rope_type") else rope.text("type", "default")
    if kind not in ROPE_FIELDS:
        raise UnsupportedModelError(
            f"{fields.where}: rope type {kind!r} is not one bimo computes ({', '.join(ROPE_FIELDS)}); "
            f'serve this model with backend = "vllm"'
        )
    known = {*ROPE_FIELDS[kind], *ROPE_NEUTRAL, *(("factor",) if rope.raw.get("factor") == 1 else ())}
    if unknown := sorted(name for name, value in rope.raw.items() if name not in known and value is not None):
        raise UnsupportedModelError(f"{fields.where}: {key} of type {kind!r} has {', '.join(unknown)}, unknown to bimo")

    values: dict[str, Any] = {"theta": theta, "kind": kind}
    if kind in ("llama3", "yarn"):
        source = fields if fields.has("original_max_position_embeddings") else rope
        values["original_max_positions"] = source.integer("original_max_position_embeddings", max_positions)
    for name in ROPE_FIELDS[kind]:
        if name == "factor":
            fallback = max_positions / values["original_max_positions"] if kind == "yarn" else None
            values[name] = rope.number(name, fallback)
        elif name == "truncate":
            values[name] = rope.flag(name, True)
        elif kind == "llama3" or rope.has(name):
            values[name] = rope.number(name)
    return RopeConfig(**values)


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The old layout, which transformers 4 and 5, vLLM and llama.cpp's converter all read."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    scaling |= {name: value for name in ROPE_FIELDS[rope.kind] if (value := getattr(rope, name)) is not None}
    if rope.original_max_positions is not None:
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _mistral_windows(fields: Fields, layers: int) -> Windows:
    """One window for all layers; an explicit null means full attention, an absent key transformers' default."""
    return (fields.integer("sliding_window"),) * layers if fields.has("sliding_window") else ()


def _qwen_windows(fields: Fields, layers: int) -> Windows:
    """`layer_types` when given, else layers from `max_window_layers` on; nothing without `use_sliding_window`."""
    sliding = fields.flag("use_sliding_window", False) and fields.has("sliding_window")
    types = fields.texts("layer_types") if fields.has("layer_types") else None
    if types is None:
        first = fields.integer("max_window_layers", 28, low=0) if sliding else layers
        types = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers:
        raise CorruptModelError(f"{fields.where}: layer_types has {len(types)} entries for {layers} layers")
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise UnsupportedModelError(f"{fields.where}: layer_types has {sorted(unknown)}, unknown to bimo")
    if "sliding_attention" not in types:
        return ()
    if not sliding:
        raise CorruptModelError(f"{fields.where}: layer_types has sliding layers, use_sliding_window is off")
    window = fields.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _gpt_neo_windows(fields: Fields, layers: int) -> Windows:
    """`attention_types` [[["global", "local"], 12]] is expanded; "local" layers see `window_size` tokens."""
    if fields.has("attention_types") or not fields.has("attention_layers"):
        kinds = _expand_attention_types(fields, fields.raw.get("attention_types") or [[["global", "local"], 12]])
    else:
        kinds = fields.texts("attention_layers")
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise CorruptModelError(
            f"{fields.where}: attention_types gives {len(kinds)} layers of {sorted(set(kinds))}, "
            f'{layers} of "global" or "local" are needed'
        )
    window = fields.integer("window_size", 256)
    return tuple(window if kind == "local" else None for kind in kinds) if "local" in kinds else ()


def _expand_attention_types(fields: Fields, groups: Any) -> list[str]:
    kinds: list[str] = []
    try:
        for names, repeats in groups:
            if not 0 <= repeats <= 10_000:
                raise ValueError
            kinds += [str(name) for name in names] * repeats
    except (TypeError, ValueError):
        raise CorruptModelError(
            f'{fields.where}: attention_types should look like [[["global", "local"], 12]], not {groups!r:.80}'
        ) from None
    return kinds


def _one_window(config: DecoderConfig) -> int | None:
    return next((window for window in config.windows if window is not None), None)


def _write_qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    if (window := _one_window(config)) is None:
        return {"use_sliding_window": False}
    types = ["full_attention" if item is None else "sliding_attention" for item in config.windows]
    # `max_window_layers` is what readers older than `layer_types` look at; it is exact when the full layers come first.
    first = types.index("sliding_attention")
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": types, "max_window_layers": first}


def _write_gpt_neo_windows(config: DecoderConfig) -> dict[str, Any]:
    kinds = ["global" if config.window(i) is None else "local" for i in range(config.num_layers)]
    written: dict[str, Any] = {"attention_types": [[[kind], 1] for kind in kinds], "attention_layers": kinds}
    return written | ({"window_size": window} if (window := _one_window(config)) else {})


_WINDOWS: dict[str, tuple[Callable[[Fields, int], Windows], Callable[[DecoderConfig], dict[str, Any]]]] = {
    "none": (lambda fields, layers: (), lambda config: {}),
    "mistral": (_mistral_windows, lambda config: {"sliding_window": _one_window(config)}),
    "qwen": (_qwen_windows, _write_qwen_windows),
    "gpt_neo": (_gpt_neo_windows, _write_gpt_neo_windows),
}
