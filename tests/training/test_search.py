"""The search: every combination once, whoever works on it, whatever is killed. Losses are formulas, not trainings."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bimo.errors import DataError, MissingDependencyError, TrainingError, UsageError
from bimo.recipe import Recipe, load_recipe, save_recipe
from bimo.training.search import Report, Search
from bimo.training.search_storage import storage_name

RATE = {"low": 1e-4, "high": 1e-1, "log": True}
SPACE = {"training.learning_rate": RATE, "model.hidden_size": [64, 128, 192]}


def write_recipe(folder: Path, search: str, name: str = "small", steps: int = 100) -> Path:
    """search: the lines of [search]."""
    file = folder / f"{name}.toml"
    file.write_text(
        f'name = "{name}"\n[[data.sources]]\nname = "文本"\npath = "texts"\n[training]\nsteps = {steps}\n'
        f"[search]\n{search}",
        encoding="utf-8",
    )
    return file


def open_search(file: Path, folder: Path, *overrides: str, storage: str | None = None) -> Search:
    def resolve(more: Sequence[str] = ()) -> Recipe:
        return load_recipe(file, [*overrides, *more])

    return Search.open(resolve(), folder, resolve, storage=storage, root=file.parent)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path,
        'method = "random"\ntrials = 4\nprune = false\n[search.space]\n'
        '"training.learning_rate" = { low = 1e-4, high = 1e-1, log = true }\n"model.hidden_size" = [64, 128, 192]\n',
    )


def loss_of(recipe: Recipe) -> float:
    """Best at a learning rate of 0.01; the size hardly matters."""
    return 1 + abs(math.log10(recipe.training.learning_rate) + 2) + recipe.model.hidden_size / 10_000


def train(recipe: Recipe, folder: Path, report: Report) -> float:
    """Falls towards `loss_of`; notes that it ran."""
    with (folder / "ran").open("a") as file:
        file.write(f"{recipe.training.learning_rate}\n")
    for step in (10, 20, 30):
        if report(step, loss_of(recipe) + 1 / step):
            break
    return loss_of(recipe)


def runs(folder: Path) -> dict[int, int]:
    """How often each slot was trained."""
    files = sorted((folder / "trials").glob("*/ran"))
    return {int(file.parent.name): file.read_text().count("\n") for file in files}


def in_process(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


# --- what is tried ----------------------------------------------------------------------------------------------------


def test_a_grid_is_all_combinations_once(tmp_path: Path) -> None:
    space = '"training.weight_decay" = { low = 0.2, high = 0.3, step = 0.1 }\n"model.kind" = ["decoder", "lstm"]\n'
    file = write_recipe(tmp_path, f'method = "grid"\n[search.space]\n{space}')
    search = open_search(file, tmp_path / "out")
    search.work(train)
    tried = [tuple(trial.settings.values()) for trial in search.trials()]
    assert tried == [(decay, kind) for decay in (0.2, 0.3) for kind in ("decoder", "lstm")]
    assert set(runs(tmp_path / "out").values()) == {1}


def test_random_settings_follow_from_seed_and_slot(small: Path, tmp_path: Path) -> None:
    first, second = (open_search(small, tmp_path / name) for name in "ab")
    other = open_search(small, tmp_path / "c", "seed=1")
    for search in (first, second, other):
        search.work(lambda recipe, folder, report: loss_of(recipe))
    tried = [[trial.settings for trial in search.trials()] for search in (first, second, other)]
    assert tried[0] == tried[1] != tried[2]
    assert len({settings["training.learning_rate"] for settings in tried[0]}) == 4
    assert all(1e-4 <= settings["training.learning_rate"] <= 1e-1 for settings in tried[0])
    assert first.best is not None and first.best.loss == min(trial.loss or 9 for trial in first.trials())


def test_tpe_comes_closer_than_chance(small: Path, tmp_path: Path) -> None:
    distances = {}
    for method in ("random", "tpe"):
        search = open_search(small, tmp_path / method, f"search.method={method}", "search.trials=16")
        search.work(train)
        late = [math.log10(trial.settings["training.learning_rate"]) + 2 for trial in search.trials()[8:]]
        distances[method] = sum(map(abs, late)) / len(late)
    assert distances["tpe"] < 0.6 * distances["random"]


def test_the_same_settings_are_trained_once(tmp_path: Path) -> None:
    file = write_recipe(
        tmp_path,
        'method = "random"\ntrials = 30\n[search.space]\n"model.hidden_size" = [64, 128]\n'
        '"training.betas" = [[0.9, 0.95], [0.9, 0.999]]\n',
    )
    search = open_search(file, tmp_path / "out")
    search.work(train)
    trials = search.trials()
    assert len(trials) == 4  # there are no more
    repeated = [trial for trial in trials if trial.same_as is not None]
    assert repeated and len(runs(tmp_path / "out")) == 4 - len(repeated)
    assert all(trial.settings == trials[trial.same_as].settings for trial in repeated if trial.same_as is not None)


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_trials_are_stopped_early(small: Path, tmp_path: Path, pruner: str) -> None:
    wishes = ("search.trials=9", "search.prune=true", f"search.pruner={pruner}", "search.startup=3")
    search = open_search(small, tmp_path / pruner, *wishes)
    search.work(train)
    pruned = [trial for trial in search.trials() if trial.state == "pruned"]
    whole = [trial for trial in search.trials() if trial.state == "complete"]
    assert pruned and whole and len(pruned) + len(whole) == 9
    assert all(len(trial.curve) in (2, 3) for trial in pruned)  # warmup: never at the first evaluation
    best = search.best
    assert best is not None and all(trial.curve[-1][1] > (best.loss or 0) for trial in pruned)


def test_more_trials_go_on_with_what_is_there(small: Path, tmp_path: Path) -> None:
    open_search(small, tmp_path / "out", "search.trials=2").work(train)
    search = open_search(small, tmp_path / "out", "search.trials=4")
    assert search.waiting() == 2
    search.work(train)
    assert runs(tmp_path / "out") == dict.fromkeys(range(4), 1)
    assert open_search(small, tmp_path / "out", "search.trials=1").waiting() == 0


# --- who does it, and what goes wrong ---------------------------------------------------------------------------------


def work_in(file: Path, folder: Path, storage: str | None = None) -> None:
    open_search(file, folder, "search.trials=8", storage=storage).work(train)


def test_processes_share_a_study_and_do_nothing_twice(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    processes = [in_process(work_in, small, folder) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert runs(folder) == dict.fromkeys(range(8), 1)
    together = open_search(small, folder, "search.trials=8")
    alone = open_search(small, tmp_path / "alone", "search.trials=8")
    alone.work(train)
    assert [(t.settings, t.loss) for t in together.trials()] == [(t.settings, t.loss) for t in alone.trials()]


def test_machines_share_a_storage(small: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    folders = [tmp_path / name for name in ("one", "two")]
    elsewhere = tmp_path / "elsewhere"  # where the other machine has the recipe
    elsewhere.mkdir()
    copy = elsewhere / small.name
    copy.write_text(small.read_text(encoding="utf-8"), encoding="utf-8")
    processes = [in_process(work_in, file, place, storage) for file, place in zip((small, copy), folders, strict=True)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    counts = [runs(folder) for folder in folders]
    assert sorted([*counts[0], *counts[1]]) == list(range(8))


def test_a_slot_that_two_machines_made_is_done_once(small: Path, tmp_path: Path) -> None:
    search = open_search(small, tmp_path / "out")
    search.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs={"slot": 3}))
    search.study.add_trial(optuna.create_trial(state=TrialState.WAITING))  # and one of another tool
    search.work(train)
    assert runs(tmp_path / "out") == dict.fromkeys(range(4), 1)
    assert [trial.state for trial in search.trials()] == ["complete"] * 4


def killed_at(slot: int) -> Callable[[Recipe, Path, Report], float]:
    def run(recipe: Recipe, folder: Path, report: Report) -> float:
        report(10, 7.0)
        if int(folder.name) == slot:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(recipe, folder, report)

    return run


def test_a_killed_search_goes_on_where_it_stopped(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = in_process(lambda: open_search(small, folder).work(killed_at(2)))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    drawn = optuna.load_study(study_name="small", storage=f"sqlite:///{folder / 'search.db'}").trials[2]
    assert drawn.state is TrialState.RUNNING  # so it was left
    search = open_search(small, folder)
    assert [trial.state for trial in search.trials()] == ["complete"] * 2 + ["waiting"] * 2
    search.work(train)
    assert runs(folder) == dict.fromkeys(range(4), 1)
    again = search.trials()[2]
    assert again.settings == {key: drawn.params[key] for key in SPACE}
    assert dict(again.curve)[10] == 7.0  # what it had told before counts


def test_settings_that_kill_every_time_fail(small: Path, tmp_path: Path) -> None:
    for _ in range(3):
        in_process(lambda: open_search(small, tmp_path / "out").work(killed_at(1))).join()
    search = open_search(small, tmp_path / "out")
    search.work(train)
    states = [trial.state for trial in search.trials()]
    assert states == ["complete", "failed", *["complete"] * 2]
    assert "killed 3 times" in search.trials()[1].reason


def test_a_running_trial_of_others_is_left_alone(small: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def run(recipe: Recipe, folder: Path, report: Report) -> float:
        other = open_search(small, tmp_path / "out")  # as another process would, meanwhile
        seen.append(other.running())
        return train(recipe, folder, report)

    open_search(small, tmp_path / "out", "search.trials=2").work(run)
    assert seen == [1, 1] and runs(tmp_path / "out") == {0: 1, 1: 1}


def test_a_trial_that_was_given_away_is_left(small: Path, tmp_path: Path) -> None:
    """A machine that slept for an hour wakes up: others have taken its trial for dead."""
    calls: list[int] = []

    def run(recipe: Recipe, folder: Path, report: Report) -> float:
        calls.append(int(folder.name))
        if len(calls) == 1:
            search.study.tell(0, state=TrialState.FAIL)
        return train(recipe, folder, report)

    search = open_search(small, tmp_path / "out", "search.trials=2")
    search.work(run)
    assert sorted(calls) == [0, 0, 1] and [trial.state for trial in search.trials()] == ["complete"] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("the disk is full")])
def test_what_settings_cannot_cause_ends_the_work(small: Path, tmp_path: Path, error: BaseException) -> None:
    def run(recipe: Recipe, folder: Path, report: Report) -> float:
        raise error

    search = open_search(small, tmp_path / "out", "search.trials=2")
    for _ in range(4):  # more often than a killed trial may be repeated
        with pytest.raises(type(error)):
            search.work(run)
    assert search.refill() == 2
    search.work(train)
    assert {trial.state for trial in search.trials()} == {"complete"}


def test_bad_losses_and_errors_fail_one_trial(small: Path, tmp_path: Path) -> None:
    def run(recipe: Recipe, folder: Path, report: Report) -> float:
        slot = int(folder.name)
        if slot == 1:
            raise TrainingError("the loss exploded 爆炸 at step 3")
        if slot == 2:
            raise RuntimeError("out of memory\nwhile computing")
        report(10, math.nan if slot == 3 else 2.0)
        return {3: math.nan, 4: math.inf}.get(slot, 2.0)

    search = open_search(small, tmp_path / "out", "search.trials=6")
    search.work(run)
    reasons = [trial.reason for trial in search.trials()]
    assert reasons == [
        "",
        "the loss exploded 爆炸 at step 3",
        "RuntimeError: out of memory while computing",
        "the validation loss is nan",
        "the validation loss is inf",
        "",
    ]
    assert search.best is not None and search.best.number == 0


def test_only_the_best_model_is_kept(small: Path, tmp_path: Path) -> None:
    def run(recipe: Recipe, folder: Path, report: Report) -> float:
        for name in ("model", "checkpoints"):
            (folder / name).mkdir()
        return loss_of(recipe)

    search = open_search(small, tmp_path / "out")
    search.work(run)
    assert search.best is not None
    left = [path.relative_to(tmp_path / "out" / "trials") for path in (tmp_path / "out" / "trials").glob("*/[!.]*")]
    assert left == [Path(f"{search.best.number:03}") / "model"]


def test_importance_is_optunas(small: Path, tmp_path: Path) -> None:
    search = open_search(small, tmp_path / "out", "search.trials=6")
    assert search.importance() == {}
    search.work(train)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    reference = optuna.importance.get_param_importances(
        search.study, evaluator=evaluator, target=lambda trial: trial.intermediate_values[30]
    )
    assert search.importance() == pytest.approx(reference, abs=1e-6)


# --- other recipes, other databases -----------------------------------------------------------------------------------


def test_the_study_of_another_recipe_is_refused(small: Path, tmp_path: Path) -> None:
    open_search(small, tmp_path / "out", "training.steps=9")  # nothing was tried, so it may still be mended
    open_search(small, tmp_path / "out", "search.trials=1").work(train)
    with pytest.raises(UsageError, match=r"small in sqlite:.*training\.steps was 100 and not 50.*--out"):
        open_search(small, tmp_path / "out", "training.steps=50")
    other = write_recipe(tmp_path, 'method = "random"\nprune = false\n[search.space]\n"model.num_layers" = [1, 2]\n')
    with pytest.raises(UsageError, match=r"made with another recipe, where search\.space"):
        open_search(other, tmp_path / "out")


def test_left_over_trials_and_foreign_studies_are_refused(small: Path, tmp_path: Path) -> None:
    open_search(small, tmp_path / "out", "search.trials=1").work(train)
    (tmp_path / "out" / "search.db").unlink()
    with pytest.raises(UsageError, match="holds trials of another search"):
        open_search(small, tmp_path / "out")
    url = f"sqlite:///{tmp_path / 'foreign.db'}"
    optuna.create_study(study_name="small", storage=url).add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(UsageError, match="not made by bimo tune"):
        open_search(small, tmp_path / "new", storage=url)


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("nonsense", UsageError, "takes a URL, sqlite:"),
        ("sqlite:////nowhere/at/all/search.db", UsageError, "cannot be reached .unable to open database file"),
        ("sqlite:///BROKEN", UsageError, "cannot be reached .file is not a database"),
        ("mysql+oursql://me:secret@nowhere/x", UsageError, "takes a URL, sqlite:"),
    ],
)
def test_storages_that_cannot_be_used(small: Path, tmp_path: Path, url: str, error: type, said: str) -> None:
    (tmp_path / "broken.db").write_bytes(b"not a database, but long enough to look at " * 40)
    with pytest.raises(error, match=said) as caught:
        open_search(small, tmp_path / "out", storage=url.replace("BROKEN", str(tmp_path / "broken.db")))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [("postgresql", "psycopg", r"psycopg\[binary\]"), ("postgresql+psycopg2", "psycopg2", "psycopg2-binary")],
)
def test_a_database_without_its_driver(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"me:\*\*\*@host.*pip install {package}"):
        open_search(small, tmp_path / "out", storage=f"{scheme}://me:secret@host/searches")
    assert storage_name("postgresql://me:secret@host/x") == "postgresql://me:***@host/x"


# --- what the recipe says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ('"training.learning_rat" = [1, 2]', "did you mean learning_rate?"),
        ('"模型.大小" = [1, 2]', "there is no key 模型"),
        ('"search.trials" = [1, 2]', "says how to search"),
        ('"model.kind" = ["gpt", "bert"]', "model.kind"),
        ('"training.steps" = { low = 5, high = 3 }', "low 5 is not below high 3"),
        ('"training.steps" = { low = 3, high = 3 }', "low 3 is not below high 3"),
        ('"training.learning_rate" = { low = 0.0, high = 1.0, log = true }', "log needs low above 0"),
        ('"training.learning_rate" = { low = 0.0, high = nan }', "nan and inf are none"),
        ('"training.learning_rate" = { low = 0.1, high = 1.0, log = true, step = 0.1 }', "step and log"),
        ('"training.steps" = { low = 1, high = 10, step = 4 }', "do not meet high 10: make it 9"),
        ('"training.steps" = { low = 1, high = 10, step = 0 }', "step is above 0"),
        ('"training.steps" = { lo = 1, high = 10 }', "has no lo; did you mean low?"),
        ('"training.steps" = { low = 1 }', "training.steps.high: Field required"),
        ('"training.steps" = { low = "a", high = 10 }', "training.steps.low: it should be"),
        ('"training.steps" = []', "empty list"),
        ('"training.steps" = 5', "a range such as"),
        ('"training.steps" = [5, 6, 5]', "has the choice 5 twice"),
        ('"training.clip" = [inf, 1.0]', "nothing can be computed"),
        ('"training.betas" = [{ a = 1 }]', "is a number, a text"),
        ("", "a line for every key"),
    ],
)
def test_mistakes_in_the_space(tmp_path: Path, space: str, said: str) -> None:
    file = write_recipe(tmp_path, f"[search.space]\n{space}\n")
    with pytest.raises(UsageError) as caught:
        open_search(file, tmp_path / "out")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "space", "said"),
    [
        ("", '"training.learning_rate" = { low = 0.1, high = 1.0 }', "a continuous range: give it a step"),
        ("", '"training.steps" = { low = 1, high = 1000 }', "a grid of 1000 combinations is more than 100"),
        ("trials = 3\n", '"training.steps" = { low = 1, high = 4 }', "more than search.trials 3"),
    ],
)
def test_grids_that_are_none(tmp_path: Path, lines: str, space: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(write_recipe(tmp_path, f'method = "grid"\n{lines}[search.space]\n{space}\n'))
    assert said in str(caught.value)


def test_what_the_user_should_know(tmp_path: Path) -> None:
    lines = '"model.hidden_size" = [64, 65]\n"data.validation" = [0.1, 0.2]\n"objective.share" = [0.1, 0.2]\n'
    notes = open_search(write_recipe(tmp_path, f"[search.space]\n{lines}"), tmp_path / "out").notes
    assert len(notes) == 3
    assert "model.hidden_size=65" in notes[0] and "must be an even multiple" in notes[0]
    assert "changes the validation text" in notes[1] and "what the loss measures" in notes[2]


def test_a_recipe_without_search_says_what_to_add(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, "")
    file.write_text(file.read_text(encoding="utf-8").replace("[search]", ""), encoding="utf-8")
    with pytest.raises(UsageError, match=r"add \[search.space\]"):
        open_search(file, tmp_path / "out")


def test_a_recipe_with_search_is_written_and_read_back(small: Path, tmp_path: Path) -> None:
    recipe = load_recipe(small)
    save_recipe(recipe, tmp_path / "saved.toml")
    assert load_recipe(tmp_path / "saved.toml") == recipe
    assert tomllib.loads((tmp_path / "saved.toml").read_text(encoding="utf-8"))["search"]["space"] == {
        **SPACE,
        "training.learning_rate": RATE,
    }
