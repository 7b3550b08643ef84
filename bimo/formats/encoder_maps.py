"""BERT's `config.json` and tensor names, to an EncoderConfig and back.

    config = encoder_from_hf(json.loads(text), names_of_tensors, where="config.json")
    raw = encoder_to_hf(config)
    plan = tensor_plan(config, encoder_keys(config))

Which heads a file holds is read from its tensors, because `architectures` often says less: bert-base-chinese calls
itself BertForMaskedLM and carries the pooler and the next sentence head too. A setting bimo does not compute is
refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.formats.config_json import ACTIVATIONS
from bimo.formats.fields import Fields, check_written
from bimo.formats.maps import KeyMap
from bimo.models.config import EncoderConfig

__all__ = ["encoder_from_hf", "encoder_keys", "encoder_to_hf"]

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
    "pad_token_id": "pad_token_id",
}
# What transformers takes for an absent key.
DEFAULTS = {"intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # fmt: skip
# Settings that change what is computed, and the one value bimo computes.
ONLY: dict[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "pruned_heads": {},
}
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")

# An optional part of the model -> a tensor of it, as a file names it. The classifier is not among them: many
# architectures have a layer of that name which means something else.
HEADS = {
    "pooler": "pooler.dense.weight",
    "masked_head": "cls.predictions.bias",
    "next_sentence_head": "cls.seq_relationship.weight",
}
# Architecture -> the parts it needs; when written, the first whose parts are all there.
ARCHITECTURES = {
    "BertForSequenceClassification": {"pooler", "labels"},
    "BertForPreTraining": {"pooler", "masked_head", "next_sentence_head"},
    "BertForMaskedLM": {"masked_head"},
    "BertForNextSentencePrediction": {"pooler", "next_sentence_head"},
    "BertModel": set[str](),
}

_BASE = {
    "embed_tokens": ("embeddings.word_embeddings",),
    "embed_positions": ("embeddings.position_embeddings",),
    "embed_segments": ("embeddings.token_type_embeddings",),
    "embed_norm": ("embeddings.LayerNorm",),
    "layers.{i}.attention.qkv_proj": tuple(
        f"encoder.layer.{{i}}.attention.self.{x}" for x in ("query", "key", "value")
    ),
    "layers.{i}.attention.out_proj": ("encoder.layer.{i}.attention.output.dense",),
    "layers.{i}.attention_norm": ("encoder.layer.{i}.attention.output.LayerNorm",),
    "layers.{i}.mlp.up_proj": ("encoder.layer.{i}.intermediate.dense",),
    "layers.{i}.mlp.down_proj": ("encoder.layer.{i}.output.dense",),
    "layers.{i}.mlp_norm": ("encoder.layer.{i}.output.LayerNorm",),
    "pooler": ("pooler.dense",),
}
_HEADS = {
    "masked_head": ("cls.predictions",),  # its bias
    "masked_head.dense": ("cls.predictions.transform.dense",),
    "masked_head.norm": ("cls.predictions.transform.LayerNorm",),
    "next_sentence_head": ("cls.seq_relationship",),
    "classifier": ("classifier",),
}


def encoder_keys(config: EncoderConfig) -> KeyMap:
    """bimo's names to the file's. The base model alone is written without the prefix "bert.", as transformers does."""
    prefix, bare = "bert.", _architecture(config) == "BertModel"
    base = {name: tuple(source if bare else prefix + source for source in sources) for name, sources in _BASE.items()}
    return KeyMap(
        {**base, **_HEADS},
        prefix=prefix,
        bare=bare,
        ignored=r"(bert\.)?embeddings\.(position_ids|token_type_ids)",
        copies={
            "cls.predictions.decoder.weight": "embed_tokens.weight",
            "cls.predictions.decoder.bias": "masked_head.bias",
        },
        old_names={
            "LayerNorm.weight": "LayerNorm.gamma",  # TensorFlow's
            "LayerNorm.bias": "LayerNorm.beta",
            "cls.predictions.bias": "cls.predictions.decoder.bias",
        },
    )


def encoder_from_hf(raw: Any, tensor_names: Collection[str], *, where: str = "config.json") -> EncoderConfig:
    """A parsed `config.json`, and the names of the tensors beside it, to an EncoderConfig.

    Raises UnsupportedModelError for a model, a head or a setting bimo does not compute, each by name, and
    CorruptModelError for missing fields and impossible values.
    """
    fields = Fields(raw, where, DEFAULTS)
    if (family := fields.text("model_type")) != "bert":
        raise UnsupportedModelError(f"{where}: model_type is {family!r}, the encoders bimo implements are bert")
    for key, accepted in ONLY.items():
        fields.only(key, accepted)
    parts = {part for part, name in HEADS.items() if {name, f"bert.{name}"} & set(tensor_names)}
    for architecture in fields.texts("architectures") if fields.has("architectures") else []:
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{where}: bimo does not implement {architecture}, it has {', '.join(ARCHITECTURES)}"
            )
        parts |= ARCHITECTURES[architecture]

    values: dict[str, Any] = {"labels": _read_labels(fields) if "labels" in parts else ()}
    values |= {part: part in parts for part in HEADS}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "max_positions", "type_vocab_size"):
        values[name] = fields.integer(KEYS[name])
    values["num_layers"] = fields.integer(KEYS["num_layers"], high=10_000)
    values["num_heads"] = fields.integer(KEYS["num_heads"], high=65_536)
    values["norm_eps"] = fields.number(KEYS["norm_eps"])
    for name in ("dropout", "attention_dropout", "classifier_dropout"):
        if name != "classifier_dropout" or fields.has(KEYS[name]):
            values[name] = fields.share(KEYS[name])
    has_padding = "pad_token_id" not in fields.raw or fields.has("pad_token_id")  # null: none; absent: 0
    values["pad_token_id"] = fields.integer("pad_token_id", 0, low=0) if has_padding else None
    activation = fields.text(KEYS["activation"])
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"{where}: hidden_act is {activation!r}, bimo computes {', '.join(ACTIVATIONS)}")
    values["activation"] = ACTIVATIONS[activation]
    if values["labels"] and fields.has("problem_type"):
        values["problem_type"] = fields.text("problem_type")
        if values["problem_type"] not in PROBLEMS:
            raise CorruptModelError(f"{where}: problem_type should be one of {', '.join(PROBLEMS)}")
    try:
        return EncoderConfig(**values)
    except ValueError as error:
        raise CorruptModelError(f"{where}: {error}") from None


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """An EncoderConfig to BERT's `config.json`.

    Raises UnsupportedModelError when it has no word for one of the settings: what is written is read back and
    compared, so nothing is lost silently.
    """
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    raw: dict[str, Any] = {"model_type": config.family, "architectures": [_architecture(config)]}
    for name, key in KEYS.items():
        value = getattr(config, name)
        raw[key] = names[value] if name == "activation" else value
    if config.labels:
        raw["id2label"] = {str(number): label for number, label in enumerate(config.labels)}
        raw["label2id"] = {label: number for number, label in enumerate(config.labels)}
        raw["problem_type"] = config.problem_type

    read = encoder_from_hf(raw, {name for part, name in HEADS.items() if getattr(config, part)})
    check_written(config, read)
    return raw


def _architecture(config: EncoderConfig) -> str:
    there = {part for part in (*HEADS, "labels") if getattr(config, part)}
    return next(name for name, parts in ARCHITECTURES.items() if parts <= there)


def _read_labels(fields: Fields) -> tuple[str, ...]:
    """`id2label` {"0": "negative", ...}; without it `num_labels` of transformers' own names, or two."""
    if not fields.has("id2label"):
        return tuple(f"LABEL_{number}" for number in range(fields.integer("num_labels", 2, high=1_000_000)))
    section = fields.section("id2label")
    labels = tuple(section.text(str(number)) for number in range(len(section.raw)))
    if not labels or fields.integer("num_labels", len(labels)) != len(labels):
        raise CorruptModelError(f"{fields.where}: id2label names {len(labels)} classes, num_labels is something else")
    return labels
