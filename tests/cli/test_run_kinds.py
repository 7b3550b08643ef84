"""`bimo run` of the other kinds of model: an LSTM beside an n-gram model, an encoder, an encoder-decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bimo
from bimo.cli.main import main
from bimo.errors import UnsupportedModelError
from bimo.recipe import load_recipe
from tests.cli.corpus import write_texts

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "small"
[[data.sources]]
name = "texts"
path = "texts"
[data]
validation = 0.2
leaks = "drop"
[tokenizer]
vocab_size = 600
[model]
hidden_size = 32
num_layers = 1
num_heads = 2
context_length = 32
[training]
steps = 6
batch_tokens = 512
eval_every = 6
trackers = []
[report]
max_tokens = 5
"""
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_texts(tmp_path / "texts")
    pairs = [{"en": f"The number {NUMBERS[a]} and {NUMBERS[b]}.", "zh": f"数字{'零一二三四五六七八九'[a]}和{b}。"}
             for a in range(10) for b in range(10)]  # fmt: skip
    pairs.append({"en": "Numbers: " + " ".join(NUMBERS) + ".", "zh": "数字：零一二三四五六七八九。"})
    rows = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (tmp_path / "pairs.jsonl").write_text(rows, encoding="utf-8")
    file = tmp_path / "small.toml"
    file.write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


def test_an_lstm_beside_an_ngram_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ["--set", "model.kind=lstm", "--set", "report.ngram=3", "--set", "report.prompts=['语言']"]
    assert main(["run", str(recipe), "--json", *wishes]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["ngram_bits_per_byte"]) == set(result["scores"]) == {"en", "zh"}
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "3-gram model" in page and f"{result['ngram_bits_per_byte']['zh']:.3f}" in page and "语言" in page
    assert main(["generate", result["model"], "--prompt", "语言", "--max-tokens", "4"]) == 0


def test_an_encoder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = "report.prompts=['The [MASK] of 语[MASK]', 'nothing to fill']"
    assert main(["run", str(recipe), "--set", "model.kind=encoder", "--set", prompts]) == 0
    told = capsys.readouterr().out
    assert "masked accuracy of validation text: zh" in told and "next sentence accuracy" in told
    assert "the most frequent word, always: en" in told and "bimo chat" not in told
    page = Path("runs/small/report.html").read_text(encoding="utf-8")
    assert "掩码准确率" in page and "(no [MASK] in it)" in page and "总猜最常见的词" in page
    with pytest.raises(UnsupportedModelError):
        bimo.load("runs/small/model")


def test_an_encoder_decoder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on pairs; held-out ones are written and scored beside what memory and lexicon do."""
    sources = [
        "data.sources.0.path=pairs.jsonl", "data.sources.0.prompt={en}", "data.sources.0.answer={zh}",
        "data.clean.near_duplicates=1.0", "data.leaks=warn", "data.sources.0.language=zh",
        "model.kind=seq2seq", "training.steps=30",
        "training.learning_rate=3e-3", "report.prompts=['The number five and six.']", "report.beams=2",
        "report.pairs=5",
    ]  # fmt: skip
    wishes = [part for setting in sources for part in ("--set", setting)]
    assert main(["run", str(recipe), "--json", *wishes]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["translation"]) == {"model", "translation memory", "word by word"}
    assert set(result["scores"]["zh"]) == {"bits_per_byte", "accuracy"}
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "The number five and six." in page and "5 held-out pairs" in page and "tok:zh" in page
    with bimo.load(result["model"]) as model:
        answer = model.generate("The number five and six.", max_tokens=20)
    assert answer.usage.prompt_tokens and answer.tokens  # it reads, and writes at least the end


def test_pairs_that_are_too_long_are_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ["data.sources.0.path=pairs.jsonl", "data.sources.0.prompt={en}", "data.sources.0.answer={zh}",
               "data.clean.near_duplicates=1.0", "data.leaks=warn", "model.kind=seq2seq"]  # fmt: skip
    wishes = [part for setting in sources for part in ("--set", setting)]
    wishes += ["--set", "model.context_length=8", "--until", "training", "--set", "training.steps=1"]
    main(["run", str(recipe), *wishes])
    assert "not used: longer than 8 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_whole(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert all(source.sha256 or source.path.startswith("deb:") for source in recipe.data.sources)
