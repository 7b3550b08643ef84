"""Every kind of model with every objective it can learn: it learns, stops and goes on to the last bit, and is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bimo.data.pairs import encode_pairs
from bimo.data.records import Document, Message
from bimo.data.shards import encode_documents, write_tokens
from bimo.errors import UsageError
from bimo.formats.huggingface import load_model
from bimo.objectives.kinds import make_objective
from bimo.recipe import Recipe
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import SEQ2SEQ_TOKENS, save_tokenizer, train_tokenizer
from bimo.training.build import build_model, model_config
from bimo.training.loop import StepInfo
from bimo.training.session import Evaluation, Job, Texts, read_metrics, train_run
from tests.training.tiny import TEXTS

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "context_length": 32, "dropout": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"model": {"kind": "lstm"}},
    "r-drop": {"model": {"kind": "decoder"}, "objective": {"r_drop": 0.5}},
    "encoder": {"model": {"kind": "encoder"}},
    "words only": {"model": {"kind": "encoder"}, "objective": {"next_sentence": False, "r_drop": 0.5}},
    "marian": {"model": {"kind": "seq2seq"}},
    "bart": {"model": {"kind": "seq2seq", "family": "bart"}, "objective": {"kind": "denoise"}},
    "t5": {"model": {"kind": "seq2seq", "family": "t5"}, "objective": {"kind": "denoise"}},
}


def make(kind: str, folder: Path, **training: Any) -> tuple[Recipe, Texts]:
    """The recipe of a kind, and two languages as it reads them."""
    wish = KINDS[kind]
    settings = {
        "steps": 12, "batch_tokens": 512, "micro_batch": 4, "eval_every": 6, "checkpoint_minutes": 0,
        "dtype": "float32", "trackers": [], "learning_rate": 3e-3, **training,
    }  # fmt: skip
    recipe = Recipe.model_validate({
        "name": "t",
        "data": {"sources": [{"name": "en", "path": "x"}, {"name": "zh", "path": "y"}]},
        "model": {**SHAPE, **wish["model"]},
        "objective": wish.get("objective", {}),
        "training": settings,
    })  # fmt: skip
    lines = {name: (TEXTS / f"{name}.txt").read_text("utf-8").split("\n") for name in ("en", "zh")}
    extra = SEQ2SEQ_TOKENS if recipe.model.kind == "seq2seq" else ()
    everything = [line for part in lines.values() for line in part]
    backend = train_tokenizer(everything, kind=recipe.tokenizer.kind, vocab_size=700, extra=extra)
    save_tokenizer(backend, folder / "tokenizer")
    tokenizer = Tokenizer.from_directory(folder / "tokenizer")
    train, validation = {}, {}
    for name, part in lines.items():
        for split, chosen, files in (("t", part[:-3], train), ("v", part[-3:], validation)):
            if recipe.objective_kind == "seq2seq":
                pieces = [line[at : at + 12] for line in chosen for at in range(0, len(line), 12)]
                pairs = [Document("", f"{name}/{n}", name, messages=(Message("user", x), Message("assistant", x[:4])))
                         for n, x in enumerate(pieces)]  # fmt: skip
                encoded = encode_pairs(pairs, tokenizer, max_tokens=32, refuse=lambda reason: None)
            else:
                documents = [Document(line, f"{name}/{n}", name) for n, line in enumerate(chosen)]
                encoded = encode_documents(documents, tokenizer)
            files[name] = write_tokens(folder / f"{name}-{split}", encoded, vocab_size=700, mark="")
    return recipe, Texts(train, validation, tokenizer)


def run(recipe: Recipe, folder: Path, texts: Texts, stop_at: int | None = None) -> list[Any]:
    objective, make_loader = make_objective(recipe, texts.tokenizer)
    model = build_model(model_config(recipe.model, recipe.objective, texts.tokenizer), recipe.seed)
    events = []
    generator = train_run(Job.of(recipe), folder, model, objective, texts, print, make_loader=make_loader)
    for event in generator:
        events.append(event)
        if isinstance(event, StepInfo) and event.step == stop_at:
            generator.close()
    return events


@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_and_goes_on_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    recipe, texts = make(kind, tmp_path)
    events = run(recipe, tmp_path / "whole", texts)
    steps = [event for event in events if isinstance(event, StepInfo)]
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    assert len(steps) == 12 and len(evaluations) == 2
    assert evaluations[-1].total.nats_per_token < evaluations[0].total.nats_per_token  # it learns
    run(recipe, tmp_path / "left", texts, stop_at=5)
    run(recipe, tmp_path / "left", texts)
    whole, left = (
        [
            {k: v for k, v in row.items() if k not in ("tokens_per_second", "seconds")}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (tmp_path / "whole", tmp_path / "left")
    )
    assert left == whole
    mine, theirs = (load_model(tmp_path / name / "model") for name in ("left", "whole"))
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    lineage = json.loads((tmp_path / "whole" / "model" / "bimo.json").read_text(encoding="utf-8"))
    assert set(lineage["scores"]) == {"en", "zh"}
    figures = lineage["scores"]["zh"]
    expected = {"lstm": {"bits_per_byte"}, "r-drop": {"bits_per_byte"}, "marian": {"bits_per_byte", "accuracy"}}
    expected |= {"bart": {"accuracy"}, "t5": {"accuracy"}, "words only": {"masked_nats", "masked_accuracy"}}
    expected["encoder"] = expected["words only"] | {"next_sentence_accuracy"}
    assert set(figures) == expected[kind]


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    recipe, texts = make("t5", tmp_path)
    again = recipe.training.model_copy(update={"activation_checkpointing": True})
    plain = run(recipe, tmp_path / "plain", texts)
    spared = run(recipe.model_copy(update={"training": again}), tmp_path / "spared", texts)
    losses = [[event.loss for event in events if isinstance(event, StepInfo)] for events in (plain, spared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "objective", "tokenizer"), [("encoder", {}, "bpe"), ("seq2seq", {}, "bpe"), ("decoder", {}, "wordpiece")]
)
def test_a_tokenizer_of_another_kind(kind: str, objective: dict[str, Any], tokenizer: str, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["some text 文字"] * 9, kind=tokenizer, vocab_size=300), tmp_path)
    raw = {"name": "t", "data": {"sources": [{"name": "s", "path": "x"}]}, "model": {**SHAPE, "kind": kind}}
    with pytest.raises(UsageError, match=r"tokenizer"):
        make_objective(Recipe.model_validate(raw), Tokenizer.from_directory(tmp_path))
