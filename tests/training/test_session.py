"""A training that is killed at any moment and run again is the training that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bimo.data.loader import PackedLoader
from bimo.data.shards import write_tokens
from bimo.errors import DataError, TrainingError, UsageError
from bimo.formats.huggingface import load_weights
from bimo.models.decoder import Decoder
from bimo.objectives.causal import causal_loss
from bimo.recipe import Recipe
from bimo.training import session
from bimo.training.checkpoint import checkpoints
from bimo.training.loop import StepInfo, TrainingState
from bimo.training.session import Evaluation, Job, Texts, finished, read_metrics, train_run
from bimo.training.validation import bytes_of_tokens, validate
from tests.training.tiny import build, make_recipe

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.training.tiny import build, make_recipe, make_texts
from bimo.objectives.causal import causal_loss
from bimo.training.session import Job, train_run
folder = Path(sys.argv[1])
texts = make_texts(folder / "texts")
recipe = make_recipe(curriculum=[[0.5, 16], [0.5, 32]], ema=0.9, optimizer=sys.argv[2])
for event in train_run(Job.of(recipe), folder, build(recipe, texts), causal_loss, texts, print):
    time.sleep(0.03)  # time to be killed in
"""


def losses(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "seconds")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def start(folder: Path, optimizer: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SCRIPT, str(folder), optimizer, root]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    assert start(tmp_path / "whole", optimizer).wait(120) == 0
    killed = tmp_path / "killed"
    for wanted in (5, 13, 20):  # the second in the middle of the curriculum's change of length
        process = start(killed, optimizer)
        deadline = time.monotonic() + 60
        while len(read_metrics(killed / "metrics.jsonl")) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(killed, optimizer).wait(120) == 0
    assert losses(killed) == losses(tmp_path / "whole")  # to the last bit
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, tmp_path / "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def run(recipe: Recipe, folder: Path, texts: Texts, warn: Callable[[str], None] = lambda text: None) -> list[Any]:
    return list(train_run(Job.of(recipe), folder, build(recipe, texts), causal_loss, texts, warn))


def test_it_learns_and_says_so(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(steps=60, learning_rate=5e-3, eval_every=20, trackers=["tensorboard"])
    events = run(recipe, tmp_path, texts)
    steps = [event for event in events if isinstance(event, StepInfo)]
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    assert [info.step for info in steps] == list(range(1, 61))
    assert [evaluation.step for evaluation in evaluations] == [20, 40, 60]
    assert steps[-1].loss < steps[0].loss - 1
    assert evaluations[-1].total.bits_per_byte < evaluations[0].total.bits_per_byte
    assert set(evaluations[0].scores) == {"en", "zh"}
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert finished(Job.of(recipe), tmp_path, texts)
    with pytest.raises(UsageError, match=r"another recipe, where training.steps was 60 and not 61: give this run"):
        finished(Job.of(make_recipe(steps=61, learning_rate=5e-3)), tmp_path, texts)
    heavier = recipe.data.sources[0].model_copy(update={"weight": 3.0})
    sources = recipe.data.model_copy(update={"sources": (heavier, recipe.data.sources[1])})
    with pytest.raises(UsageError, match=r"where data.sources.0.weight was"):
        finished(Job.of(recipe.model_copy(update={"data": sources})), tmp_path, texts)
    lineage = json.loads((tmp_path / "model" / "bimo.json").read_text(encoding="utf-8"))
    assert lineage["steps"] == 60 and lineage["tokens"] == 60 * 256


def test_what_was_trained_generates_like_transformers(texts: Texts, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import bimo

    run(make_recipe(steps=30, learning_rate=5e-3), tmp_path, texts)
    prompt = texts.tokenizer.encode("语言")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    with bimo.load(tmp_path / "model", quant="none", dtype="float32") as model:
        ours = model.generate(prompt, max_tokens=12, temperature=0).tokens
    assert ours == theirs[: len(ours)] and ours


def test_early_stopping(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(steps=500, learning_rate=1e-12, eval_every=2, early_stopping=3, dtype="float32")
    events = run(recipe, tmp_path, texts)
    evaluations = [event for event in events if isinstance(event, Evaluation)]
    assert len(evaluations) < 40 and not any(evaluation.best for evaluation in evaluations[-3:])
    best = [evaluation for evaluation in evaluations if evaluation.best][-1]
    lineage = json.loads((tmp_path / "model" / "bimo.json").read_text(encoding="utf-8"))
    assert lineage["steps"] == best.step  # the best weights, not the last
    assert not (tmp_path / "best").exists()


def test_the_average_is_what_is_scored_and_saved(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(learning_rate=2e-2, ema=0.9, eval_every=24)
    evaluation = run(recipe, tmp_path, texts)[-1]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    last = load_file(checkpoints(tmp_path / "checkpoints")[-1] / "model.safetensors")
    assert any(not torch.equal(weights[name], last[name]) for name in weights)

    model = build(recipe, texts)
    for name, tensor in load_weights(tmp_path / "model", model.config):
        model.get_parameter(name).data.copy_(tensor)
    state = TrainingState(model, [], PackedLoader([texts.train["en"]], length=32))
    sizes = bytes_of_tokens(texts.tokenizer)
    assert validate(state, causal_loss, recipe.training, texts.validation, sizes, 32, PackedLoader) == evaluation.scores


def test_who_leaves_loses_nothing(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(checkpoint_minutes=60)
    whole = run(recipe, tmp_path / "whole", texts)
    generator = train_run(Job.of(recipe), tmp_path / "left", build(recipe, texts), causal_loss, texts, print)
    assert next(generator).step == 1 and next(generator).step == 2
    generator.close()
    rest = run(recipe, tmp_path / "left", texts)
    assert rest[0].step == 3 and rest[-1].scores == whole[-1].scores


def test_a_damaged_checkpoint_gives_way_to_the_one_before(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(keep_checkpoints=2)
    whole = run(recipe, tmp_path / "whole", texts)
    generator = train_run(Job.of(recipe), tmp_path / "torn", build(recipe, texts), causal_loss, texts, print)
    for event in generator:
        if event.step == 10:
            break
    generator.close()
    older, newer = checkpoints(tmp_path / "torn" / "checkpoints")
    assert (older.name, newer.name) == ("step-00000009", "step-00000010")
    weights = bytearray((newer / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newer / "model.safetensors").write_bytes(weights)
    said: list[str] = []
    rest = run(recipe, tmp_path / "torn", texts, said.append)
    assert "step-00000010 is damaged" in said[0]
    assert next(event.step for event in rest if isinstance(event, StepInfo)) == 10
    assert rest[-1].scores == whole[-1].scores


def test_a_full_disk_does_not_end_the_training(texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = session.save_checkpoint

    def full(state: Any, *arguments: Any, **keywords: Any) -> Path:
        if state.step == 3:
            raise DataError("checkpoint could not be written (No space left on device): the one before it stays")
        return real(state, *arguments, **keywords)

    monkeypatch.setattr(session, "save_checkpoint", full)
    said: list[str] = []
    events = run(make_recipe(steps=5), tmp_path, texts, said.append)
    assert [event.step for event in events if isinstance(event, StepInfo)] == [1, 2, 3, 4, 5]
    assert len(said) == 1 and "No space left" in said[0]


def test_another_recipe_does_not_go_on_with_this_run(texts: Texts, tmp_path: Path) -> None:
    run(make_recipe(steps=3), tmp_path, texts)
    with pytest.raises(UsageError, match="another recipe"):
        run(make_recipe(steps=4), tmp_path, texts)
    other = make_recipe(steps=3)
    wider = other.model_copy(update={"model": other.model.model_copy(update={"hidden_size": 64})})
    with pytest.raises(DataError, match="another model"):
        run(wider, tmp_path, texts)


@pytest.mark.parametrize(
    ("bad", "said"), [(float("nan"), "is not a number"), (float("inf"), "is not a number"), (1e6, "exploded")]
)
def test_a_bad_loss_names_its_text_and_keeps_the_weights(texts: Texts, tmp_path: Path, bad: float, said: str) -> None:
    recipe = make_recipe()
    model = build(recipe, texts)
    calls = 0
    before: dict[str, torch.Tensor] = {}

    def objective(model: Decoder, batch: Any, **options: Any) -> Any:
        nonlocal calls, before
        calls += 1
        loss = causal_loss(model, batch, **options)
        if calls == 5:  # two parts a step: in the third step
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            return type(loss)(loss.total * bad, loss.num_targets)
        return loss

    with pytest.raises(TrainingError, match=said) as caught:
        list(train_run(Job.of(recipe), tmp_path, model, objective, texts, print))
    assert "step 3" in str(caught.value) and "zh/" in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_who_leaves_before_an_evaluation_finds_it_made_up_for(texts: Texts, tmp_path: Path) -> None:
    recipe = make_recipe(checkpoint_minutes=60)
    whole = run(recipe, tmp_path / "whole", texts)
    generator = train_run(Job.of(recipe), tmp_path / "left", build(recipe, texts), causal_loss, texts, print)
    while next(generator).step < 8:  # an evaluation would follow
        pass
    generator.close()
    rest = run(recipe, tmp_path / "left", texts)
    assert isinstance(rest[0], Evaluation) and rest[0].step == 8
    assert losses(tmp_path / "left") == losses(tmp_path / "whole")
    assert rest[-1].scores == whole[-1].scores


def test_validation_text_of_less_than_a_row_is_said(texts: Texts, tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "short", [("a", [1, 2, 3])], vocab_size=600, mark="")
    said: list[str] = []
    recipe = make_recipe(early_stopping=1, eval_every=2)
    events = run(recipe, tmp_path / "run", Texts(texts.train, {"en": file}, texts.tokenizer), said.append)
    assert [event.step for event in events] == list(range(1, 25))  # no evaluation, and no early end
    assert len(said) == 1 and "less validation text than one row" in said[0]
