"""Marian, BART and T5 against transformers on tiny random models: in and out, padding, losses and gradients, logits
within 1e-5 in float32; and files that are damaged or say what bimo does not compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.formats.config_json import config_from_hf
from bimo.formats.huggingface import load_model, load_weights, read_model_config, save_directory
from bimo.formats.seq2seq_maps import seq2seq_from_hf, seq2seq_to_hf
from bimo.models.seq2seq import EncoderDecoder, Seq2SeqConfig

TOLERANCE = 1e-5
IDS = {"pad_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 3, "bos_token_id": 1}
BART = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": 40,
    "init_std": 0.15,  # large weights, so that an error shows in the logits
    **IDS,
}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "initializer_factor": 1.5,
      **IDS}  # fmt: skip
MARIAN_CLASSES = (transformers.MarianConfig, transformers.MarianMTModel)
BART_CLASSES = (transformers.BartConfig, transformers.BartForConditionalGeneration)
T5_CLASSES = (transformers.T5Config, transformers.T5ForConditionalGeneration)
MODELS: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "marian": (MARIAN_CLASSES, BART | {"activation_function": "swish", "scale_embedding": True}),
    "marian-relu": (MARIAN_CLASSES, BART | {"activation_function": "relu", "encoder_layers": 1, "dropout": 0.0}),
    "bart": (BART_CLASSES, BART),
    "bart-scaled": (BART_CLASSES, BART | {"activation_function": "gelu_new", "scale_embedding": True}),
    "t5": (T5_CLASSES, T5),
    "t5-v1.1": (T5_CLASSES, T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-silu": (T5_CLASSES, T5 | {"feed_forward_proj": "gated-silu", "num_decoder_layers": 2, "num_heads": 1}),
}


def make_reference(directory: Path, name: str, **save: Any) -> Any:
    """A random transformers model, saved; biases and norms random too, since their initial values hide errors."""
    torch.manual_seed(5)
    (config, architecture), settings = MODELS[name]
    model = architecture(config(**settings))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dim() == 1 or key == "final_logits_bias":
                tensor.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.3)
        if name == "t5-v1.1":  # as Google published it: transformers 5 unties when it finds two matrices
            model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32) * 0.2)
    model.save_pretrained(directory, **save)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Two sources, the second one with padding, longer than all exact distances; two beginnings of targets."""
    generator = torch.Generator().manual_seed(1)
    source, target = (
        torch.randint(4, 97, (2, 36), generator=generator),
        torch.randint(4, 97, (2, 33), generator=generator),
    )
    mask = torch.ones_like(source)
    mask[1, 21:] = 0
    source[1, 21:] = 3
    target[:, 0] = 3
    return {"source": source, "mask": mask, "target": target}


def assert_equal_logits(model: EncoderDecoder, reference: Any, *, mask: bool = True) -> None:
    inputs = batch()
    attention = inputs["mask"] if mask else None
    with torch.inference_mode():
        arguments = {"input_ids": inputs["source"], "decoder_input_ids": inputs["target"], "use_cache": False}
        expected = reference(
            **arguments, attention_mask=torch.ones_like(inputs["mask"]) if attention is None else attention
        )
        hidden = model(inputs["source"], inputs["target"], attention)
        logits = model.logits(hidden)
        memory = model.encode(inputs["source"], attention)
    assert expected.logits.std() > 0.1  # numbers that are all alike would prove nothing
    assert (logits - expected.logits).abs().max() < TOLERANCE
    assert (memory - expected.encoder_last_hidden_state).abs()[inputs["mask"].bool()].max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_and_out(name: str, tmp_path: Path) -> None:
    reference = make_reference(tmp_path / "reference", name, max_shard_size="40KB" if name == "bart" else "1GB")
    model = load_model(tmp_path / "reference")
    assert isinstance(model, EncoderDecoder) and not model.training
    assert_equal_logits(model, reference)
    assert_equal_logits(model, reference, mask=False)

    shard_bytes = 40_000 if name == "t5" else 2**30
    tensors, source = reversed(list(model.named_parameters())), tmp_path / "reference"
    save_directory(tmp_path / "saved", model.config, tensors, source=source, max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or shard_bytes == 40_000
    again, report = type(reference).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert_equal_logits(model, again.eval())
    ours = {"n_positions", "init_std", "initializer_factor", "dtype", "transformers_version", "forced_eos_token_id"}
    ours |= {"activation_function"} if name == "marian" else set()  # swish and silu are one
    for key, value in reference.config.to_dict().items():
        if not key.startswith("_") and key not in ours:
            assert getattr(again.config, key) == value, key
    assert read_model_config(tmp_path / "saved") == model.config
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters


@pytest.mark.parametrize("name", ["marian", "bart", "t5", "t5-v1.1"])
def test_losses_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = make_reference(tmp_path, name)
    model = load_model(tmp_path)
    assert isinstance(model, EncoderDecoder)
    inputs = batch()
    labels = torch.cat((inputs["target"][:, 1:], torch.full((2, 1), 2)), dim=1)
    labels[1, 9:] = -100
    expected = reference(input_ids=inputs["source"], attention_mask=inputs["mask"], labels=labels).loss
    expected.backward()

    moved = torch.cat((torch.full((2, 1), model.config.decoder_start_token_id), labels[:, :-1]), dim=1)
    moved = moved.masked_fill(moved == -100, model.config.pad_token_id)
    logits = model.logits(model(inputs["source"], moved, inputs["mask"]))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert abs(loss - expected) < TOLERANCE
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    theirs = {
        key: parameter.grad for key, parameter in reference.named_parameters() if "shared" in key or "relative" in key
    }
    ours = {"shared": model.embed_tokens.weight.grad}
    if model.decoder_bias is not None and model.encoder.relative_bias is not None:
        ours["encoder.block.0"] = model.encoder.relative_bias.table.weight.grad
        ours["decoder.block.0"] = model.decoder_bias.table.weight.grad
    for part, gradient in ours.items():
        [other] = [value for key, value in theirs.items() if part in key]
        assert other.abs().max() > 1e-3 and gradient is not None
        if part == "shared" and name in ("marian", "bart"):  # transformers never trains the padding's embedding, which
            other[3] = gradient[3]  # begins every target here
        assert torch.allclose(gradient, other, atol=TOLERANCE), part


def test_files_as_their_authors_published_them(tmp_path: Path) -> None:
    """Names without "model.", copies of the embedding, tables of sinusoids, no final_logits_bias, version marks."""
    for name in ("marian", "bart", "t5"):
        directory = tmp_path / name
        reference = make_reference(directory, name)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key != "final_logits_bias"}
        shared = tensors.pop("shared.weight")
        for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[copy] = shared.clone()
        if name == "t5":
            extra = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.randn(8, 4)}
        else:
            extra = {"encoder.version": torch.ones(1)}
            reference.final_logits_bias.zero_()
        if name == "marian":
            extra |= {f"{side}.embed_positions.weight": torch.zeros(40, 32) for side in ("encoder", "decoder")}
        save_file(tensors | extra, file, {"format": "pt"})
        model = load_model(directory)
        assert isinstance(model, EncoderDecoder)
        assert_equal_logits(model, reference)
        tensors["decoder.embed_tokens.weight"][5] += 1
        save_file(tensors | extra, file, {"format": "pt"})
        with pytest.raises(CorruptModelError, match=r"ties decoder\.embed_tokens\.weight to encoder\.embed"):
            load_model(directory)


def test_number_types_are_kept_and_changed(tmp_path: Path) -> None:
    make_reference(tmp_path / "full", "bart")
    model = load_model(tmp_path / "full", torch.bfloat16)
    save_directory(tmp_path / "half", model.config, model.named_parameters())
    file = tmp_path / "half/model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != "final_logits_bias"}, file)
    half = load_model(tmp_path / "half")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert load_model(tmp_path / "half", torch.float32).embed_tokens.weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- settings and damage
MINIMAL: dict[str, dict[str, Any]] = {
    "marian": {"model_type": "marian", **{key: BART[key] for key in list(BART)[:8]}, **IDS},
    "bart": {"model_type": "bart", **{key: BART[key] for key in list(BART)[:8]}},
    "t5": {"model_type": "t5", **{key: T5[key] for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers",
                                                           "num_heads")}, "decoder_start_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", MINIMAL)
def test_defaults_are_those_of_transformers(name: str) -> None:
    raw = MINIMAL[name]
    filled = transformers.AutoConfig.for_model(**raw)
    assert seq2seq_from_hf(raw, ()) == seq2seq_from_hf(json.loads(filled.to_json_string(use_diff=False)), ())
    assert seq2seq_from_hf(raw, ()).family == name


TINY = {"vocab_size": 20, "hidden_size": 8, "num_encoder_layers": 1, "num_decoder_layers": 2, "num_heads": 2,
        "head_dim": 4, "intermediate_size": 12, "max_positions": 16, "decoder_start_token_id": 0, "pad_token_id": 0,
        "eos_token_id": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("marian", {}),
        ("marian", {"activation": "silu", "scale_embedding": False, "dropout": 0.0, "attention_dropout": 0.2}),
        ("bart", {"activation_dropout": 0.3, "pad_token_id": 19}),
        ("t5", {"head_dim": 7, "gated_mlp": True, "activation": "gelu_tanh", "tied_embeddings": False}),
        ("t5", {"gated_mlp": True, "activation": "silu", "scale_logits": False}),
        ("t5", {"tied_embeddings": False, "scale_logits": True, "relative_buckets": 6, "norm_eps": 1e-3}),
        (
            "t5",
            {"activation": "gelu_tanh"} | dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
        ),
    ],
)
def test_every_setting_of_a_family_survives(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    config = Seq2SeqConfig.of_family(family, **TINY | change)
    model = EncoderDecoder(config)
    save_directory(tmp_path, config, model.named_parameters())
    read = load_model(tmp_path)
    assert read.config == config
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("marian", {"norm_first": True}, "a marian config.json cannot say norm_first = True"),
        ("marian", {"head_dim": 6}, "head_dim"),
        ("bart", {"position": "sinusoidal"}, "position"),
        ("bart", {"tied_embeddings": False}, "tie_word_embeddings is False"),
        ("t5", {"bias": True}, "bias"),
        ("t5", {"activation": "gelu", "gated_mlp": True}, "activation = 'gelu'"),
        ("t5", {"attention_dropout": 0.5}, "dropout"),
        ("gru", {}, "family 'gru' has no config.json; use one of marian, bart, t5"),
    ],
)
def test_what_a_format_cannot_say_is_refused(family: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    if family == "gru":
        config = Seq2SeqConfig(**TINY, family="gru")
    else:
        config = Seq2SeqConfig.of_family(family, **TINY | change)
    with pytest.raises(UnsupportedModelError, match=said):
        save_directory(tmp_path / "new", config, EncoderDecoder(config).named_parameters())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("bart", {"activation_function": "laplace"}, UnsupportedModelError, "activation_function is 'laplace'"),
        (
            "bart",
            {"architectures": ["BartForSequenceClassification"]},
            UnsupportedModelError,
            "does not implement Bart",
        ),
        ("bart", {"decoder_attention_heads": 8}, UnsupportedModelError, "decoder_attention_heads is 8"),
        ("bart", {"decoder_ffn_dim": 57}, UnsupportedModelError, "decoder_ffn_dim is 57"),
        ("bart", {"normalize_before": True}, UnsupportedModelError, "normalize_before"),
        ("bart", {"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantization_config"),
        ("bart", {"d_model": 33}, CorruptModelError, "d_model 33 must be a multiple"),
        ("bart", {"d_model": None}, CorruptModelError, "d_model is missing"),
        ("bart", {"encoder_layers": 10**9}, CorruptModelError, "encoder_layers should be a whole number"),
        ("bart", {"dropout": 2}, CorruptModelError, "dropout should be a share"),
        ("bart", {"pad_token_id": 97}, CorruptModelError, "pad_token_id 97 is not one of the 97 tokens"),
        ("bart", {"eos_token_id": [1, 2]}, CorruptModelError, "eos_token_id should be a whole number"),
        ("marian", {"share_encoder_decoder_embeddings": False}, UnsupportedModelError, "share_encoder_decoder"),
        ("marian", {"decoder_vocab_size": 98}, UnsupportedModelError, "decoder_vocab_size is 98"),
        ("marian", {"tie_word_embeddings": False}, UnsupportedModelError, "tie_word_embeddings"),
        ("t5", {"feed_forward_proj": "gated-笔"}, UnsupportedModelError, "feed_forward_proj is 'gated-笔'"),
        ("t5", {"feed_forward_proj": "gated-"}, UnsupportedModelError, "feed_forward_proj"),
        ("t5", {"dense_act_fn": "tanh"}, UnsupportedModelError, "dense_act_fn is 'tanh'"),
        ("t5", {"is_gated_act": True}, UnsupportedModelError, "is_gated_act"),
        ("t5", {"d_kv": "64"}, CorruptModelError, "d_kv should be a whole number"),
        ("t5", {"relative_attention_num_buckets": 7}, CorruptModelError, "relative_buckets must be an even number"),
        ("t5", {"relative_attention_max_distance": 16}, CorruptModelError, "relative_max_distance 16 must be more"),
        ("t5", {"layer_norm_epsilon": float("nan")}, CorruptModelError, "layer_norm_epsilon should be a number above"),
        ("t5", {"model_type": "longt5"}, UnsupportedModelError, "model_type is 'longt5'"),
    ],
)
def test_hostile_settings(name: str, change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        seq2seq_from_hf(MINIMAL[name] | change, ())


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
         CorruptModelError, "is not a whole safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), CorruptModelError, "has no model.safetensors"),
        (lambda d: (d / "config.json").write_text("{}"), CorruptModelError, "model_type is missing"),
        (lambda d: (d / "config.json").write_text("[1]"), CorruptModelError, "expected a JSON object"),
        (lambda d: (d / "config.json").write_bytes(b'{"model_type": "\xff"}'), CorruptModelError, "not readable JSON"),
        (lambda d: edit(d, num_decoder_layers=3), CorruptModelError, r"lacks 1[34] of .* tensors of this t5 model"),
        (lambda d: edit(d, num_decoder_layers=1), CorruptModelError, "a t5 model of this config.json does not use"),
        (lambda d: edit(d, d_ff=13), CorruptModelError, "config.json asks for"),
        (lambda d: edit(d, tie_word_embeddings=False), CorruptModelError, r"lacks 1 of .*lm_head\.weight"),
        (lambda d: edit(d, model_type=["t5"]), CorruptModelError, "model_type should be a string"),
    ],
)  # fmt: skip
def test_damaged_directories(damage: Callable[[Path], None], error: type[Exception], said: str, tmp_path: Path) -> None:
    config = Seq2SeqConfig.of_family("t5", **TINY)
    save_directory(tmp_path, config, EncoderDecoder(config).named_parameters())
    damage(tmp_path)
    with pytest.raises(error, match=said):
        load_model(tmp_path)


def edit(directory: Path, **settings: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | settings))


def test_a_decoder_reader_says_what_to_call() -> None:
    for raw in (*MINIMAL.values(), {"model_type": "bimo_lstm"}):
        with pytest.raises(UnsupportedModelError, match=r"huggingface\.load_model"):
            config_from_hf(raw)


def test_weights_of_another_model_are_refused_before_the_first(tmp_path: Path) -> None:
    config = Seq2SeqConfig.of_family("bart", **TINY)
    save_directory(tmp_path, config, EncoderDecoder(config).named_parameters())
    with pytest.raises(CorruptModelError, match="final_logits_bias has the shape"):
        load_weights(tmp_path, dataclasses.replace(config, vocab_size=21))
    assert seq2seq_to_hf(config)["architectures"] == ["BartForConditionalGeneration"]
