"""`bimo train` of other kinds than answers: classes, with pseudo-labels; embeddings; pairs. All are scored beside their
base and something simple."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bimo.cli.main import main
from bimo.recipe import load_recipe, save_recipe
from tests.encoders import TEXTS, make_encoder

STAGE = """
name = "kinds"
[report]
noise = 0.3
[[stage]]
name = "stage"
base = "BASE"
validation = 0.25
too_long = "cut"
[stage.training]
steps = 40
batch_tokens = 512
micro_batch = 8
eval_every = 40
learning_rate = 3e-3
dtype = "float32"
trackers = []
[[stage.task]]
name = "notes"
path = "notes.jsonl"
"""


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_notes(file: Path, copies: int) -> None:
    """Texts whose class is their language."""
    numbered = [(text, language, n) for language, texts in TEXTS.items() for text in texts for n in range(copies)]
    write_rows(file, [{"text": f"{text} {number}", "label": language} for text, language, number in numbered])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = make_encoder(tmp_path / "base")
    file = tmp_path / "recipe.toml"
    file.write_text(STAGE.replace("BASE", str(base)), encoding="utf-8")
    write_notes(tmp_path / "notes.jsonl", 12)
    monkeypatch.chdir(tmp_path)
    return file


def train(recipe: Path, capsys: pytest.CaptureFixture[str], *wishes: str) -> dict[str, Any]:
    options = [part for wish in wishes for part in ("--set", wish)]
    assert main(["train", str(recipe), "--json", *options]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)["stages"][0]
    return result


def test_classes_beside_a_linear_model_and_under_noise(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(recipe, capsys)
    figures = result["figures"]["classes"]["notes"]
    assert result["kind"] == "classes" and figures["model"]["accuracy"] > 0.9
    assert figures["linear"]["num_texts"] == figures["model"]["num_texts"] > 20
    assert {"clean", "dropped"} <= figures["noise"].keys()
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert "TF-IDF" in page and "含噪" in page
    assert result["seconds"] > 0 and result["peak_memory"] > 50 and result["trained"] > 1000
    assert main(["train", str(recipe)]) == 0  # nothing to do, told to people
    assert "macro F1" in capsys.readouterr().out


def test_the_preview_shows_what_each_kind_learns(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", str(recipe), "--count", "1"]) == 0
    shown = capsys.readouterr().out
    assert "reads: [CLS]" in shown and "class: en" in shown and "tokens are trained" not in shown
    known = TEXTS["zh"]
    write_rows(Path("notes.jsonl"), [{"prompt": f"{known[0]} {n}", "completion": f"{known[1]} {n}"} for n in range(20)])
    pairs = ["--set", 'stage.0.task.0.kind="pairs"', "--count", "1"]
    assert main(["data", "preview", str(recipe), *pairs]) == 0
    shown = capsys.readouterr().out
    assert "query: " in shown and "passage: " in shown and known[0][0] in shown
    assert main(["data", "preview", str(recipe), *pairs, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["kind"] == "embeddings" and 0 < row["parts"]["query"] < row["parts"]["passage"] == len(row["ids"])


def test_pseudo_labels_are_those_of_the_first_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = json.loads(Path("notes.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    rows = [{"text": f"{text} 第{number}次"} for texts in TEXTS.values() for text in texts for number in range(5)]
    write_rows(Path("more.jsonl"), [*rows, {"text": known}])
    wishes = (
        'stage.0.pseudo_labels.source={name = "more", path = "more.jsonl"}',
        "stage.0.pseudo_labels.threshold=0.6",
        "stage.0.pseudo_labels.rounds=2",
        "stage.0.pseudo_labels.task=notes",
    )
    result = train(recipe, capsys, *wishes)
    first, second = result["pseudo_labels"]
    assert sum(first["kept"].values()) + first["unsure"] == 50 and first["in the examples"] == 1
    assert set(first["kept"]) == {"en", "zh"} and set(second["kept"]) <= {"en", "zh"}
    place = Path("runs/kinds/stage")
    assert (place / "teacher-0" / "model").is_dir() and (place / "teacher-1" / "model").is_dir()
    data = json.loads((place / "model" / "bimo.json").read_text(encoding="utf-8"))["data"]
    assert set(data) == {"notes", "pseudo"}
    before = (place / "model" / "model.safetensors").stat().st_mtime_ns
    again = train(recipe, capsys, *wishes)  # nothing is done twice, and the tally is still told
    assert again["pseudo_labels"] == result["pseudo_labels"]
    assert (place / "model" / "model.safetensors").stat().st_mtime_ns == before
    heavy = train(recipe, capsys, *wishes, "stage.0.pseudo_labels.loss_weight=30", "name=heavy")
    assert heavy["figures"]["loss"] != result["figures"]["loss"]


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("stage.0.pseudo_labels.threshold=0.99999", "sure of none of"),
        ("stage.0.task.0.weight=0", "a task of weight 0 is only scored"),
        ("stage.0.task.0.name=pseudo", "a task is called pseudo"),
        ("stage.0.pseudo_labels.task=nots", "whose classes the texts get, one of notes"),
    ],
)
def test_nothing_to_learn_from(recipe: Path, wish: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("more.jsonl"), [{"text": f"neither of both {n}"} for n in range(20)])
    wishes = ["--set", 'stage.0.pseudo_labels.source={name = "more", path = "more.jsonl"}', "--set", wish]
    assert main(["train", str(recipe), *wishes, "--set", "stage.0.training.steps=1"]) != 0
    assert told in capsys.readouterr().err


def test_texts_to_label_are_looked_for_before_the_first_training(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = 'stage.0.pseudo_labels.source={name = "more", path = "more.jsonl"}'
    assert main(["train", str(recipe), "--set", wish]) == 2
    assert "more.jsonl" in capsys.readouterr().err and not Path("runs/kinds/stage/teacher-0").exists()
    Path("more.jsonl").write_bytes(Path("notes.jsonl").read_bytes())
    wishes = ("stage.0.training.steps=1", "stage.0.leaks=warn", wish)
    assert main(["train", str(recipe), *(part for one in wishes for part in ("--set", one))]) == 1
    assert "all texts of more stand in the examples already" in capsys.readouterr().err


def test_embeddings_find_more_passages_than_before(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"{a[:12]} {n} {b[-14:]}", "completion": f"{b} {n} {a}"}
        for texts in TEXTS.values() for a in texts for b in texts for n in range(3)
    ]  # fmt: skip
    write_rows(Path("notes.jsonl"), rows)
    result = train(recipe, capsys, 'stage.0.task.0.kind="pairs"', "stage.0.training.micro_batch=16")
    assert result["kind"] == "embeddings"
    for language in ("en", "zh"):
        figures = result["figures"]["retrieval"][language]
        assert figures["after"]["MRR"] > figures["before"]["MRR"]
        assert set(figures) == {"bm25", "before", "after", "gain"}
    assert "检索" in Path(result["report"]).read_text(encoding="utf-8")
    assert any("recall@5" in line for line in result["lines"].values())


@pytest.mark.parametrize(("kind", "steps"), [("lora", 40), ("adalora", 40), ("bottleneck", 40), ("prefix", 40)])
def test_adapters_of_encoders_are_scored(
    recipe: Path, kind: str, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes = (f"stage.0.adapter.kind={kind}", "stage.0.adapter.rank=4", f"stage.0.training.steps={steps}")
    result = train(recipe, capsys, *wishes, "report.noise=0")
    assert result["figures"]["classes"]["notes"]["model"]["num_texts"] > 20
    assert (Path(result["model"]) / "adapter_config.json").is_file()
    assert main(["data", "select", result["model"], "notes.jsonl", "--count", "2"]) == 0  # any command takes it


def test_an_adapter_of_embeddings(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{a[:12]} {n}", "completion": f"{n} {a}"} for a in TEXTS["zh"] for n in range(20)]
    write_rows(Path("notes.jsonl"), rows)
    result = train(recipe, capsys, 'stage.0.task.0.kind="pairs"', "stage.0.adapter.kind=lora", "stage.0.adapter.rank=4")
    figures = result["figures"]["retrieval"]["zh"]
    assert figures["after"]["MRR"] > figures["before"]["MRR"]
    pairs = Path("pairs.jsonl")
    write_rows(pairs, [{"source": row["prompt"], "target": row["completion"]} for row in rows[:20]])
    assert main(["eval", result["model"], "--pairs", str(pairs)]) == 0
    told = capsys.readouterr().out
    assert "recall@5" in told and "bm25" in told and "among 20 passages" in told
    assert main(["eval", result["model"], "--pairs", str(pairs), "--json", "--limit", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passages"] == 10 and {score["name"] for score in found["scores"]} == {"bm25", result["model"]}
    assert main(["eval", result["model"], "--pairs", str(pairs), "--beams", "2"]) == 2
    assert "leave --beams out" in capsys.readouterr().err


def test_a_translator_learns_more_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The base is what `bimo run` makes of pairs; a stage goes on with others."""
    monkeypatch.chdir(tmp_path)
    words = {"the cat": "猫", "a dog": "狗", "a bird": "鸟", "the fish": "鱼"}
    pairs = [
        {"prompt": f"{word} number {n}", "completion": f"第{n}只{name}"}
        for word, name in words.items()
        for n in range(30)
    ]
    write_rows(Path("pairs.jsonl"), pairs)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
name = "pairs"
[[data.sources]]
name = "pairs"
path = "pairs.jsonl"
prompt = "prompt"
answer = "completion"
[data]
validation = 0.2
leaks = "warn"
[data.clean]
quality = false
min_chars = 1
near_duplicates = 1.0
[tokenizer]
kind = "unigram"
vocab_size = 300
[model]
kind = "seq2seq"
hidden_size = 32
num_layers = 1
context_length = 32
[training]
steps = 2
batch_tokens = 256
trackers = []
dtype = "float32"
[report]
pairs = 8
beams = 1
[[stage]]
name = "more"
validation = 0.2
[stage.training]
steps = 30
batch_tokens = 512
learning_rate = 5e-3
eval_every = 15
dtype = "float32"
trackers = []
[[stage.task]]
name = "pairs"
path = "pairs.jsonl"
""",
        encoding="utf-8",
    )
    assert main(["run", str(recipe), "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)["stages"][0]
    assert result["kind"] == "pairs"
    loss = result["figures"]["loss"]["pairs"]
    assert loss["after"] < loss["before"]
    figures = result["figures"]["translation"]["pairs"]
    assert {"before", "after", "translation memory"} <= figures.keys()
    assert figures["after"]["chrf"] > figures["before"]["chrf"]
    assert "BLEU" in Path(result["report"]).read_text(encoding="utf-8")
    check_back_translation(recipe, words, capsys)


def check_back_translation(recipe: Path, words: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """`language` is that of the answers, so it must not decide which questions are read. The translator is its own way
    back, and what it writes may be empty; tests/data/test_augment.py has copies."""
    for place, names in (("en", list(words)), ("zh", list(words.values()))):
        Path(place).mkdir()
        for page, one in enumerate(names):
            texts = (f'<p id="p{number}">{one} {other}</p>' for number, other in enumerate(names))
            Path(place, f"{page}.html").write_text(f"<html><body>{''.join(texts)}</body></html>", encoding="utf-8")
    pages = 'name = "pages"\npath = "en"\nformat = "html"\nlanguage = "zh"\nparallel = {path = "zh"}\n'
    start, task = '[[stage]]\nname = "more"\n', '[[stage.task]]\nname = "pairs"\npath = "pairs.jsonl"\n'
    text = recipe.read_text(encoding="utf-8")
    assert start in text and task in text
    text = text.replace(start, f'{start}base = "runs/pairs/more/model"\n').replace(task, f"[[stage.task]]\n{pages}")
    recipe.write_text(text, encoding="utf-8")
    models = '["runs/pairs/more/model", "runs/pairs/more/model"]'
    wishes = (f"stage.0.task.0.augment={{back_translation = {models}}}", "stage.0.training.steps=1", "report.pairs=1")
    result = train(recipe, capsys, *wishes, "name=pages")
    made = result["figures"]["augmented"]["pages"]
    assert sum(made["copies"].values()) + sum(made["dropped"].values()) == 12
    assert "another language" not in made["dropped"]
    assert "改写副本" in Path(result["report"]).read_text(encoding="utf-8")
    held_out = Path("runs/pages/more/tokens/validation-pages/ids.txt").read_text(encoding="utf-8")
    assert held_out and "+" not in held_out


def test_the_recipe_with_pseudo_labels_reads_back(recipe: Path) -> None:
    wishes = ['stage.0.pseudo_labels.source={name = "more", path = "more.jsonl"}',
              'compare.variants={plain = [], fgm = ["stage.0.robust.kind=fgm"]}']  # fmt: skip
    loaded = load_recipe(recipe, wishes)
    save_recipe(loaded, Path("again.toml"))
    assert load_recipe(Path("again.toml")) == loaded
