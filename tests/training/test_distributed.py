"""Two processes learn what one learns, and go on from each other's checkpoints. gloo, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bimo.errors import UsageError
from bimo.objectives.causal import causal_loss
from bimo.objectives.kinds import make_objective
from bimo.recipe import Recipe
from bimo.runtime import Ranks, ranks
from bimo.tokenizer.train import SEQ2SEQ_TOKENS
from bimo.training.build import build_model, model_config
from bimo.training.checkpoint import checkpoints
from bimo.training.loop import StepInfo
from bimo.training.session import Evaluation, Job, Texts, train_run
from tests.training.tiny import build, make_recipe, make_texts

ROOT = Path(__file__).parents[2]
KINDS = ("ddp", "fsdp")
STEPS, HALF = 8, 4


def recipe_of(kind: str, optimizer: str = "adamw", **training: Any) -> Recipe:
    """Ten rows of 16 a step, then five of 32, in parts of two: the second process has nothing in its last part."""
    settings = {"steps": STEPS, "batch_tokens": 160, "micro_batch": 2, "ema": 0.9, "clip": 0.5, "eval_every": 4}
    settings |= {"checkpoint_minutes": 60}  # leaving writes one
    settings |= {"curriculum": [[0.6, 16], [0.4, 32]], "learning_rate": 5e-3, "parallel": kind, "optimizer": optimizer}
    recipe = make_recipe(**{**settings, **training})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dropout": 0.0})})


def other_models(parallel: str) -> dict[str, Recipe]:
    """Blocks with cross-attention, and a model without blocks."""
    recipe = recipe_of(parallel)
    shapes: dict[str, Any] = {"bart": {"kind": "seq2seq", "family": "bart"}, "lstm": {"kind": "lstm"}}
    models = {name: recipe.model.model_copy(update=shape) for name, shape in shapes.items()}
    denoise = recipe.objective.model_copy(update={"kind": "denoise"})
    objectives = {"bart": denoise, "lstm": recipe.objective}
    return {
        name: recipe.model_copy(update={"model": model, "objective": objectives[name]})
        for name, model in models.items()
    }


def play(recipe: Recipe, folder: Path, texts: Texts, until: int = STEPS, ranks: Ranks = Ranks()) -> list[Any]:
    """The events of a run up to a step."""
    objective, make_loader = make_objective(recipe, texts.tokenizer)
    model = build_model(model_config(recipe.model, recipe.objective, texts.tokenizer), recipe.seed)
    events = train_run(Job.of(recipe), folder, model, objective, texts, print, ranks, make_loader)
    seen: list[Any] = []
    for event in events:
        seen.append(event)
        if event.step == until < STEPS:
            break
    events.close()
    return seen


def numbers(events: list[Any]) -> list[list[float]]:
    """What two runs are compared by."""
    steps = [[e.step, e.loss, e.grad_norm, e.num_tokens] for e in events if isinstance(e, StepInfo)]
    scores = [e.scores for e in events if isinstance(e, Evaluation)]
    return steps + [[x.nats_per_token, x.num_tokens, x.num_bytes] for each in scores for x in each.values()]


SCRIPT = """
import errno, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed.checkpoint as dcp
folder, texts_folder = Path(sys.argv[2]), Path(sys.argv[3])
from bimo.data.shards import TokenFile
from bimo.objectives.causal import Loss, causal_loss
from bimo.runtime import ranks
from bimo.tokenizer.load import Tokenizer
from bimo.training.distributed import from_main, process_group
from bimo.training.session import Job, Texts, train_run
from tests.training.test_distributed import HALF, KINDS, build, numbers, other_models, play, recipe_of

train, validation = ({name: TokenFile.open(texts_folder / f"{name}-{part}") for name in ("en", "zh")} for part in "tv")
texts = Texts(train, validation, Tokenizer.from_directory(texts_folder / "tokenizer"))
mine = ranks()
calls = 0

def bad(model, batch, **options):
    global calls
    calls += 1
    loss = causal_loss(model, batch, **options)
    return Loss(loss.total * float("nan"), loss.num_targets) if mine.rank == 1 and calls > 12 else loss

class Writer(dcp.HuggingFaceStorageWriter):
    # the second process finds its disk full at the second checkpoint, and dies in the middle of the fourth
    saved = 0

    def write_data(self, *inputs):
        Writer.saved += 1
        done = super().write_data(*inputs)
        if mine.rank == 1 and Writer.saved == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        if mine.rank == 1 and Writer.saved == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

with process_group(mine):
    if sys.argv[4] == "die":
        dcp.HuggingFaceStorageWriter = Writer
        said = lambda text: (folder / f"said-{mine.rank}").open("a").write(text + "\\n")
        recipe = recipe_of("fsdp", eval_every=100, checkpoint_minutes=0)
        list(train_run(Job.of(recipe), folder / "run", build(recipe, texts), causal_loss, texts, said, mine))
    if sys.argv[4] == "nan":
        recipe = recipe_of("ddp", eval_every=100)
        list(train_run(Job.of(recipe), folder / "nan", build(recipe, texts), bad, texts, print, mine))
    found = {}
    for kind in KINDS:
        for optimizer in ("adamw", "muon"):
            recipe = recipe_of(kind, optimizer)
            found[f"{kind} {optimizer}"] = numbers(play(recipe, folder / f"{kind}-{optimizer}", texts, ranks=mine))
        found[f"{kind} from 1"] = numbers(play(recipe_of(kind), folder / f"{kind}-from-1", texts, ranks=mine))
        found[f"{kind} half"] = numbers(play(recipe_of(kind), folder / f"{kind}-from-2", texts, HALF, ranks=mine))
        for name, recipe in other_models(kind).items():
            found[f"{kind} {name}"] = numbers(play(recipe, folder / f"{kind}-{name}", texts, ranks=mine))
        play(recipe_of(kind), folder / f"{kind}-twice", texts, HALF, ranks=mine)
        found[f"{kind} twice"] = numbers(play(recipe_of(kind), folder / f"{kind}-twice", texts, ranks=mine))
    (folder / f"{mine.rank}.json").write_text(json.dumps(found))
"""


def torchrun(*command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Two processes; the environment of one of them, if the tests run in one, stays out."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def script(folder: Path, texts: Texts, mode: str) -> subprocess.CompletedProcess[str]:
    file = folder / "script.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return torchrun(str(file), str(ROOT), str(folder), str(texts.tokenizer.directory.parent), mode)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """With the tokens that an encoder-decoder needs."""
    return make_texts(tmp_path_factory.mktemp("texts"), SEQ2SEQ_TOKENS)


@pytest.fixture(scope="module")
def one(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The trainings of one process, by optimiser."""
    folder = tmp_path_factory.mktemp("one")
    names = ("adamw", "muon")
    return folder, {name: numbers(play(recipe_of("auto", name), folder / name, texts)) for name in names}


@pytest.fixture(scope="module")
def two(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The trainings of two processes; some go on from a checkpoint of one."""
    folder = tmp_path_factory.mktemp("two")
    play(recipe_of("auto"), folder / "ddp-from-1", texts, HALF)
    shutil.copytree(folder / "ddp-from-1", folder / "fsdp-from-1")
    result = script(folder, texts, "all")
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # both processes see the same stream
    return folder, first


def assert_same(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 0
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=0, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_learn_what_one_learns(one: Any, two: Any, kind: str, optimizer: str) -> None:
    # torch's muon makes its momentum orthogonal in bfloat16, where the order of a sum is seen
    assert_same(two[1][f"{kind} {optimizer}"], one[1][optimizer], 1e-5 if optimizer == "adamw" else 1e-4)
    mine, theirs = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (two[0] / f"{kind}-{optimizer}", one[0] / optimizer)
    )
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():  # where a gradient is all but zero, rounding decides adamw's direction
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bart", "lstm"])
def test_other_models_learn_alike(two: Any, texts: Texts, kind: str, name: str, tmp_path: Path) -> None:
    assert_same(two[1][f"{kind} {name}"], numbers(play(other_models("auto")[name], tmp_path, texts)))


@pytest.mark.parametrize("kind", KINDS)
def test_two_go_on_from_one(one: Any, two: Any, kind: str) -> None:
    found, whole = two[1][f"{kind} from 1"], one[1]["adamw"]
    assert_same(found[: STEPS - HALF], whole[HALF:STEPS])


@pytest.mark.parametrize("kind", KINDS)
def test_one_goes_on_from_two(one: Any, two: Any, texts: Texts, kind: str, tmp_path: Path) -> None:
    folder = shutil.copytree(two[0] / f"{kind}-from-2", tmp_path / "run")
    assert checkpoints(folder / "checkpoints")[-1].name == f"step-{HALF:08}"
    found = numbers(play(recipe_of("auto"), folder, texts))
    assert_same(found[: STEPS - HALF], one[1]["adamw"][HALF:STEPS])
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if '"grad_norm"' in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_two_go_on_from_two(one: Any, two: Any, kind: str) -> None:
    assert_same(two[1][f"{kind} twice"][: STEPS - HALF], one[1]["adamw"][HALF:STEPS])


def test_each_process_writes_its_part(two: Any) -> None:
    (path,) = checkpoints(two[0] / "fsdp-from-2" / "checkpoints")
    sizes = [
        sum(tensor.nbytes for file in path.glob(f"optimizer/shard-0000{rank}-*") for tensor in load_file(file).values())
        for rank in (1, 2)
    ]
    assert 0.4 < sizes[0] / sum(sizes) < 0.6
    assert {file.suffix for file in path.rglob("*") if file.is_file()} <= {".safetensors", ".json", ".jinja"}
    assert (path / "model.safetensors").is_file()  # `bimo generate` reads it


@pytest.fixture(scope="module")
def died(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes saved after every step; of one the disk was full at the second, and it died in the fourth."""
    folder = tmp_path_factory.mktemp("died")
    result = script(folder, texts, "die")
    assert result.returncode != 0 and "Signal 9" in result.stderr, result.stderr[-3000:]
    return folder


def test_a_full_disk_in_one_process_is_known_to_all(died: Path) -> None:
    for rank in (0, 1):
        said = (died / f"said-{rank}").read_text().splitlines()
        assert len(said) == 1 and "step-00000002 could not be written (No space left on device)" in said[0]


def test_a_process_killed_while_saving_leaves_whole_checkpoints(
    died: Path, one: Any, texts: Texts, tmp_path: Path
) -> None:
    folder = shutil.copytree(died / "run", tmp_path / "run")
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-00000001", "step-00000003"]
    found = [row for row in numbers(play(recipe_of("auto", checkpoint_minutes=0), folder, texts)) if len(row) == 4]
    assert_same(found, one[1]["adamw"][3:STEPS])
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_missing_part_gives_way_to_the_checkpoint_before(died: Path, one: Any, texts: Texts, tmp_path: Path) -> None:
    folder = shutil.copytree(died / "run", tmp_path / "run")
    part = next(folder.glob("checkpoints/step-00000003/optimizer/shard-00002-*"))
    part.unlink()
    said: list[str] = []
    recipe = recipe_of("auto")
    events = list(train_run(Job.of(recipe), folder, build(recipe, texts), causal_loss, texts, said.append))
    assert len(said) == 1 and "step-00000003 is damaged" in said[0] and f"{part.name} is missing" in said[0]
    assert_same([row for row in numbers(events) if len(row) == 4], one[1]["adamw"][1:STEPS])


def test_the_model_of_two_speaks(two: Any) -> None:
    import bimo

    with bimo.load(two[0] / "fsdp-adamw" / "model", quant="none", dtype="float32") as model:
        assert model.generate("the", max_tokens=4, temperature=0).tokens


def test_a_bad_loss_in_one_process_ends_all(texts: Texts, tmp_path: Path) -> None:
    result = script(tmp_path, texts, "nan")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if "TrainingError: the loss is not a number" in line]
    assert said and "its text came from" in said[0]


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks() == Ranks() and ranks().is_main
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert asdict(ranks()) == {"rank": 5, "local_rank": 1, "world_size": 8} and not ranks().is_main
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UsageError, match="torchrun"):
        ranks()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match="numbers"):
        ranks()
