"""Adapters from the user's side: a folder given as the model, and several beside one model, chosen by each request.

The reference is the plain model with the adapter attached as it was trained, asked for its likeliest word step by step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import bimo
from bimo.adapters.kinds import attach, load_adapter
from bimo.backends.build import load_decoder
from bimo.backends.local import LocalBackend
from bimo.engine.kernels import load_kernels
from bimo.engine.request import Request, SamplingParams
from bimo.errors import BimoError, ModelNotFoundError, UsageError
from bimo.formats.huggingface import read_config
from bimo.formats.integrity import weights_mark
from bimo.formats.peft import read_adapter, write_adapter
from bimo.recipe import AdapterRecipe
from bimo.tokenizer.load import Tokenizer
from tests.conftest import make_tiny_model

PROMPTS = ["从前有一个小小的模型，它", "Once upon a time there was"]
NUM_TOKENS = 12


def write_random_adapter(folder: Path, base: Path, seed: int, **recipe: Any) -> Path:
    """An adapter that was trained, as far as anybody can see: none of its weights is what it was at first."""
    config = read_config(base)
    model = load_decoder(base, config, torch.float32)
    wish = AdapterRecipe(**{"rank": 4, "alpha": 8.0, **recipe})
    adapter = attach(model, wish, seed, base=str(base))
    values = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.trained.values():
            weight += torch.randn(weight.shape, generator=values) * 0.2
    write_adapter(folder, config, wish, adapter.to_file(dict(model.named_parameters())), base=str(base), source=base)
    return folder


def greedy(base: Path, adapter: Path | None, prompt: str) -> list[int]:
    model = load_decoder(base, read_config(base), torch.float32)
    if adapter is not None:
        load_adapter(model, read_adapter(adapter))
    ids = Tokenizer.from_directory(base).encode(prompt)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[start:]


def ask(model: Any, prompt: str, **more: Any) -> list[int]:
    return model.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **more).tokens


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "support": {},
        "客服": {"rslora": True, "targets": ("q", "v"), "rank": 3},
        "ranks": {"kind": "adalora"},
        "dora": {"dora": True},
        "bottleneck": {"kind": "bottleneck", "width": 8},
        "prefix": {"kind": "prefix", "tokens": 3},
    }
    return {
        name: write_random_adapter(home / name, tiny_model_dir, seed, **recipe)
        for seed, (name, recipe) in enumerate(kinds.items())
    }


@pytest.mark.parametrize("name", ["support", "客服", "ranks", "dora", "bottleneck", "prefix"])
def test_a_folder_given_as_the_model(folders: dict[str, Path], tiny_model_dir: Path, name: str) -> None:
    with bimo.load(str(folders[name]), dtype="float32", kv_cache_tokens=512) as model:
        for prompt in PROMPTS:
            assert ask(model, prompt) == greedy(tiny_model_dir, folders[name], prompt)
            assert ask(model, prompt) != greedy(tiny_model_dir, None, prompt)


def test_texts_behind_a_prefix_are_computed_together(folders: dict[str, Path], tiny_model_dir: Path) -> None:
    async def ask_all(model: Any, prompts: list[str]) -> list[Any]:
        wishes = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        return await asyncio.gather(*(model.agenerate(prompt, **wishes) for prompt in prompts))

    prompts = [*PROMPTS, PROMPTS[0] * 8, PROMPTS[0] * 8 + "。"]  # the last two begin with the same blocks
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 1024, "max_step_tokens": 16}
    with bimo.load(str(folders["prefix"]), **settings) as model:
        assert model.backend.info().context_length == read_config(tiny_model_dir).max_positions - 3
        for _ in range(2):  # the second time from the cache
            found = asyncio.run(ask_all(model, prompts))
            assert [one.tokens for one in found] == [greedy(tiny_model_dir, folders["prefix"], p) for p in prompts]
        assert found[-1].usage.cached_tokens > 0


def test_adapters_beside_a_model(folders: dict[str, Path], tiny_model_dir: Path) -> None:
    chosen = {name: folders[name] for name in ("support", "客服", "ranks")}
    with bimo.load(str(tiny_model_dir), adapters=chosen, dtype="float32", kv_cache_tokens=1024) as model:
        assert model.backend.info().adapters == ("support", "客服", "ranks")
        for prompt in PROMPTS:
            for name in (None, *chosen):
                folder = None if name is None else folders[name]
                assert ask(model, prompt, adapter=name) == greedy(tiny_model_dir, folder, prompt)
        with pytest.raises(UsageError, match="no adapter '客': there are support, 客服, ranks"):
            ask(model, "狐狸", adapter="客")


@pytest.mark.skipif(load_kernels() is None, reason="the C++ kernels are not built")
def test_with_the_kernels_and_after_a_quiet_moment(
    folders: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight bits: not to the word what float32 says, but the same from packed weights, mapped ones and copied ones."""
    monkeypatch.setenv("BIMO_HOME", str(tmp_path))
    chosen = {name: folders[name] for name in ("support", "客服")}
    answers = []
    for _ in range(2):  # the second time from the file that the first has left
        with bimo.load(str(tiny_model_dir), adapters=chosen, quant="int8", kv_cache_tokens=1024) as model:
            for _ in range(2):
                answers.append([ask(model, prompt, adapter=name) for prompt in PROMPTS for name in (None, *chosen)])
                model.backend.engine.settle()
    assert all(answer == answers[0] for answer in answers)
    assert len(set(map(tuple, answers[0]))) == len(answers[0])
    with bimo.load(str(folders["support"]), quant="int8", kv_cache_tokens=512) as model:
        assert model.backend.info().quant == "int8"
        alone = [ask(model, prompt) for prompt in PROMPTS]
    agreed = sum(
        a == b for one, other in zip(alone, answers[0][1::3], strict=True) for a, b in zip(one, other, strict=True)
    )
    assert agreed >= NUM_TOKENS  # of two answers: merged and then rounded is not rounded and then added


def test_an_abort_leaves_the_others_as_they_are(folders: dict[str, Path], tiny_model_dir: Path) -> None:
    chosen = {name: folders[name] for name in ("support", "客服")}
    with LocalBackend.load(str(tiny_model_dir), adapters=chosen, dtype="float32", kv_cache_tokens=2048) as backend:
        ids = backend.tokenizer.encode(PROMPTS[0])
        sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_TOKENS)
        endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=400)
        left = backend.iterate(Request(prompt_token_ids=ids, sampling=endless, adapter="support"))
        next(left)
        kept = backend.iterate(Request(prompt_token_ids=ids, sampling=sampling, adapter="客服"))
        first = next(kept)
        left.close()
        tokens = first.token_ids + [token for output in kept for token in output.token_ids]
        assert tokens == greedy(tiny_model_dir, folders["客服"], PROMPTS[0])


def test_what_cannot_be_loaded_is_said(folders: dict[str, Path], tiny_model_dir: Path, tmp_path: Path) -> None:
    def load(reference: Path, adapters: dict[str, Path] | None = None, **more: Any) -> None:
        bimo.load(str(reference), adapters=adapters, dtype=more.pop("dtype", "float32"), **more).close()

    other = make_tiny_model(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = shutil.copytree(folders["support"], tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:500])
    strange = shutil.copytree(folders["support"], tmp_path / "strange")
    lost = json.loads((strange / "adapter_config.json").read_text()) | {"base_model_name_or_path": "nowhere"}
    (strange / "adapter_config.json").write_text(json.dumps(lost))
    (strange / "bimo.json").unlink()
    assert config["hidden_size"] == 64
    cases: list[tuple[type[BimoError], str, dict[str, Any]]] = [
        (UsageError, "name of visible characters", {"adapters": {" ": folders["support"]}}),
        (UsageError, "the name of its base", {"adapters": {str(tiny_model_dir): folders["support"]}}),
        (ModelNotFoundError, "adapter_config.json", {"adapters": {"空": empty}}),
        (ModelNotFoundError, "adapter_config.json", {"adapters": {"a": tmp_path / "nowhere"}}),
        (BimoError, "not a whole safetensors file", {"adapters": {"a": cut}}),
        (UsageError, "alone", {"adapters": {"a": folders["dora"]}}),
        (UsageError, "alone", {"adapters": {"a": folders["bottleneck"]}}),
        (UsageError, "alone", {"adapters": {"a": folders["prefix"]}}),
        (UsageError, "leave adapters out", {"reference": folders["support"], "adapters": {"a": folders["ranks"]}}),
        (UsageError, "leave quant out", {"reference": folders["support"], "quant": "file", "dtype": None}),
        (ModelNotFoundError, "nowhere", {"reference": strange}),
    ]
    for kind, words, settings in cases:
        with pytest.raises(kind, match=words):
            load(**{"reference": tiny_model_dir, **settings})


def test_a_base_that_was_trained_anew_is_told(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same shapes, so that nothing else would tell."""
    base = make_tiny_model(tmp_path / "base")
    adapter = shutil.copytree(folders["support"], tmp_path / "客服")
    about = json.loads((adapter / "bimo.json").read_text()) | {"base": str(base), "parent_mark": weights_mark(base)}
    (adapter / "bimo.json").write_text(json.dumps(about))
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 512}
    for reference, adapters in ((adapter, None), (base, {"客服": adapter})):
        bimo.load(str(reference), adapters=adapters, **settings).close()
    assert not caplog.records
    shutil.rmtree(base)
    make_tiny_model(base, seed=1)
    for number, (reference, adapters) in enumerate(((adapter, None), (base, {"客服": adapter})), 1):
        bimo.load(str(reference), adapters=adapters, **settings).close()
        assert [record.getMessage().count("客服 was trained on") for record in caplog.records] == [1] * number


def test_an_adapter_for_another_base_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    from bimo.formats.huggingface import save_directory
    from bimo.models.config import DecoderConfig
    from bimo.models.decoder import Decoder

    wide = DecoderConfig(
        family="llama", vocab_size=80, hidden_size=96, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16,
        intermediate_size=128, max_positions=64,
    )  # fmt: skip
    source = make_tiny_model(tmp_path / "source")
    save_directory(tmp_path / "wide", wide, Decoder(wide).named_parameters(), source=source)
    with pytest.raises(BimoError, match="support"):
        bimo.load(str(tmp_path / "wide"), adapters={"a": folders["support"]}, dtype="float32")


def test_another_chat_template_is_told(
    folders: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = shutil.copytree(folders["support"], tmp_path / "own")
    (own / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} 答：")
    with caplog.at_level(logging.WARNING, "bimo"):
        bimo.load(str(tiny_model_dir), adapters={"同": folders["support"]}, dtype="float32").close()
        assert not caplog.records
        bimo.load(str(tiny_model_dir), adapters={"异": own}, dtype="float32").close()
    assert "异" in caplog.text and "another chat template" in caplog.text
    with bimo.load(str(own), dtype="float32", kv_cache_tokens=512) as model:
        assert "答" in str(model.tokenizer.chat_template)
