"""config.json to DecoderConfig and back; every setting bimo does not compute is refused by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bimo.errors import CorruptModelError, ModelError, UnsupportedModelError
from bimo.formats.config_json import config_from_hf, config_to_hf
from bimo.formats.maps import FAMILIES, GGUF_FAMILIES, tensor_plan
from bimo.models.config import DecoderConfig, RopeConfig
from bimo.models.decoder import Decoder

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
QWEN = LLAMA | {"model_type": "qwen2"}
MIXED = ["sliding_attention", "full_attention"]
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT_NEO = {"model_type": "gpt_neo", "vocab_size": 100, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
           "attention_types": [[["global", "local"], 2]], "window_size": 8}  # fmt: skip
MINIMAL = {
    "gpt2": GPT2,
    "gpt_neo": GPT_NEO,
    "llama": LLAMA,
    "mistral": LLAMA | {"model_type": "mistral"},
    "qwen2": QWEN,
    "qwen3": LLAMA | {"model_type": "qwen3"},
}


def test_every_family_has_a_minimal_example() -> None:
    assert set(MINIMAL) == set(FAMILIES)


@pytest.mark.parametrize("family", MINIMAL)
def test_defaults_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    filled = transformers.AutoConfig.for_model(
        family, **{k: v for k, v in MINIMAL[family].items() if k != "model_type"}
    )
    assert config_from_hf(MINIMAL[family]) == config_from_hf(json.loads(filled.to_json_string()))


@pytest.mark.parametrize("family", MINIMAL)
def test_written_and_read_again(family: str) -> None:
    config = config_from_hf(MINIMAL[family])
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("family", MINIMAL)
def test_plan_covers_the_decoder_and_merge_undoes_split(family: str) -> None:
    config = config_from_hf(MINIMAL[family] | {"tie_word_embeddings": False})
    maps = [FAMILIES[family].tensors]
    maps += [gguf.tensors for gguf in GGUF_FAMILIES.values() if family in gguf.written_from]
    decoder = Decoder(config)
    for keys in maps:
        plan = tensor_plan(config, keys)
        assert list(plan) == [name for name, _ in decoder.named_parameters()]
        names = [piece.name for entry in plan.values() for piece in entry.pieces]
        assert len(set(names)) == len(names)
        for name, parameter in decoder.named_parameters():
            pieces = plan[name].split(parameter.detach())
            assert [(n, tuple(t.shape)) for n, t in pieces] == [(p.name, p.shape) for p in plan[name].pieces]
            assert torch.equal(plan[name].merge([tensor for _, tensor in pieces]), parameter)


def test_interleaved_rows_follow_llama_cpp() -> None:
    """llama.cpp's LlamaModel.permute, stated with plain indices."""
    config = config_from_hf(LLAMA)
    entry = tensor_plan(config, GGUF_FAMILIES["llama"].tensors)["layers.0.attention.qkv_proj.weight"]
    rows = torch.arange(64.0)[:, None].expand(64, 32)  # 4 heads of 8 q rows, 2 of k, 2 of v
    q, k, v = (tensor[:, 0].tolist() for _, tensor in entry.split(rows))
    assert q[:8] == [0, 4, 1, 5, 2, 6, 3, 7] and q[8:10] == [8, 12]
    assert k[:4] == [32, 36, 33, 37]
    assert v == [*range(48, 64)]


def rope(raw: dict[str, Any]) -> RopeConfig:
    return config_from_hf(LLAMA | raw).rope


def test_rope_in_the_old_and_the_new_layout() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16}
    expected = RopeConfig(theta=5000.0, kind="yarn", factor=4.0, original_max_positions=32, beta_fast=16.0)
    assert rope({"rope_theta": 5000.0, "rope_scaling": yarn}) == expected
    assert rope({"rope_parameters": yarn | {"rope_theta": 5000.0}}) == expected
    assert rope({"rope_theta": 1.0, "rope_parameters": yarn | {"rope_theta": 5000}}) == expected  # the inner one wins
    old = {"type": "linear", "factor": 2.0}
    assert rope({"rope_theta": 1e6, "rope_scaling": old}) == RopeConfig(theta=1e6, kind="linear", factor=2.0)
    assert rope({"rope_scaling": None}) == rope({}) == RopeConfig()
    assert rope({"rope_scaling": {"type": "yarn", "factor": 2, "finetuned": True}}).original_max_positions == 128


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (MINIMAL["mistral"] | {"sliding_window": 16}, (16, 16)),
        (MINIMAL["mistral"] | {"sliding_window": None}, ()),
        (MINIMAL["mistral"], (4096, 4096)),
        (QWEN | {"sliding_window": 16}, ()),
        (QWEN | {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, (None, 16)),
        (QWEN | {"sliding_window": 16, "use_sliding_window": True}, ()),  # max_window_layers is 28 unless said
        (QWEN | {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
        (QWEN | {"sliding_window": 9, "use_sliding_window": True, "layer_types": MIXED}, (9, None)),
        (GPT_NEO, (None, 8, None, 8)),
        (GPT_NEO | {"attention_types": None, "attention_layers": ["local"] * 4}, (8, 8, 8, 8)),
        (GPT_NEO | {"attention_types": [[["global"], 4]]}, ()),
    ],
)  # fmt: skip
def test_sliding_windows(raw: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = config_from_hf(raw)
    assert config.windows == windows
    assert config_from_hf(config_to_hf(config)).windows == windows


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "phi3"}, "'phi3'"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "'longrope'"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "warmth": 3}}, "warmth"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"hidden_act": "xielu"}, "'xielu'"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved"),
        (MINIMAL["mistral"] | {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (QWEN | {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        (QWEN | {"use_mrope": True}, "use_mrope"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_what_bimo_does_not_compute_is_refused_by_name(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as error:
        config_from_hf(raw, where="m/config.json")
    assert str(error.value).startswith("m/config.json") and "\n" not in str(error.value)


def test_unsupported_family_lists_the_supported_ones_and_who_else_can_serve_it() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        config_from_hf({"model_type": "mamba"})
    for word in (*FAMILIES, 'backend = "vllm"', "transformers"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "expected a JSON object"),
        ({}, "model_type is missing"),
        ({"model_type": 3}, "model_type should be a string"),
        ({"model_type": "llama"}, "vocab_size is missing"),
        (LLAMA | {"vocab_size": "100"}, "vocab_size should be a whole number"),
        (LLAMA | {"vocab_size": True}, "vocab_size should be a whole number"),
        (LLAMA | {"vocab_size": 1.5}, "vocab_size should be a whole number"),
        (LLAMA | {"hidden_size": -32}, "hidden_size should be a whole number from 1"),
        (LLAMA | {"hidden_size": 10**5000}, "hidden_size should be a whole number"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers should be a whole number"),
        (LLAMA | {"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        (LLAMA | {"hidden_size": 33}, "hidden_size 33 must be a multiple of num_attention_heads 4"),
        (LLAMA | {"head_dim": 7}, "even head size"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps should be a number above 0"),
        (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps should be a number above 0"),
        (LLAMA | {"rope_theta": float("inf")}, "rope_theta should be a number above 0"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta should be a number above 0"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (LLAMA | {"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling: expected a JSON object"),
        (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings should be true or false"),
        (QWEN | {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        (QWEN | {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is off"),
        (QWEN | {"layer_types": "full"}, "layer_types should be a list of strings"),
        (GPT_NEO | {"attention_types": [[["global", "local"], 1]]}, "gives 2 layers"),
        (GPT_NEO | {"attention_types": [["global", "x"]]}, "attention_types should look like"),
        (GPT_NEO | {"attention_types": [[["global"], 10**12]]}, "attention_types should look like"),
        (GPT_NEO | {"attention_types": [[["sparse"], 4]]}, "sparse"),
    ],
)
def test_impossible_values_give_one_clear_sentence(raw: Any, said: str) -> None:
    with pytest.raises(CorruptModelError) as error:
        config_from_hf(raw, where="m/config.json")
    message = str(error.value)
    assert said in message and message.startswith("m/config.json") and "\n" not in message and len(message) < 300


STRUCTURED = ("rope_scaling", "rope_parameters", "layer_types", "attention_types", "window_size", "sliding_window",
              "use_sliding_window")  # fmt: skip
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@given(family=st.sampled_from(sorted(MINIMAL)), data=st.data())
def test_any_json_gives_a_config_or_a_model_error(family: str, data: st.DataObject) -> None:
    keys = sorted({*FAMILIES[family].keys.values(), *FAMILIES[family].only, *STRUCTURED})
    raw = MINIMAL[family] | data.draw(st.dictionaries(st.sampled_from(keys), junk, max_size=3))
    try:
        config = config_from_hf(raw)
    except ModelError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert isinstance(config, DecoderConfig)


def test_settings_a_family_cannot_say_are_refused_when_writing() -> None:
    llama = config_from_hf(LLAMA)
    for change in ({"norm": "layer"}, {"qk_norm": True}, {"windows": (8, 8)}, {"qkv_bias": True}, {"gated_mlp": False}):
        with pytest.raises(UnsupportedModelError, match=next(iter(change))):
            config_to_hf(dataclasses.replace(llama, **change))
    with pytest.raises(UnsupportedModelError, match=r"'mamba' has no config\.json"):
        config_to_hf(dataclasses.replace(llama, family="mamba"))
    assert config_to_hf(dataclasses.replace(llama, windows=(None, None)))  # full attention, said at length
