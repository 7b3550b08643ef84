"""Search for settings: many trainings of one recipe, each with other values, shared out among processes and machines.

    search = Search.open(recipe, folder, resolve)       # resolve(["training.steps=9"]) -> the recipe with that override
    search.work(train)                                  # train(recipe, folder, report) -> loss
    search.best.settings

A `Search` is an Optuna study in a database: a file in the folder, or whatever server a URL names. Whoever opens it may
work on it. What is to be done lies there as numbered slots, so that it is known before it begins:

    slot 7 ── trial 7, killed ── trial 23, goes on in the same folder trials/007

A slot is done when one trial of it came to an end. A trial that was killed, or interrupted, says nothing of its
settings: its slot is given to a new one, with the same settings and the checkpoint that it left. What is drawn for a
slot depends on the recipe's seed and the slot, so a random search tries the same whatever is killed, and however many
processes there are.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from bimo.errors import ModelError, TrainingError, UsageError
from bimo.recipe import RangeRecipe, Recipe, SearchRecipe
from bimo.training.search_storage import GRACE, claim, described, open_study, reachable

__all__ = ["Report", "Runner", "Search", "Trial", "override"]

Report = Callable[[int, float], bool]  # (step, loss) -> whether to stop
Runner = Callable[[Recipe, Path, Report], float]  # (recipe, folder, report) -> loss
Resolve = Callable[[Sequence[str]], Recipe]

KILLS = 3  # of a slot's trials, after which it counts as failed: settings that do not fit into memory kill every time
BLAMED = (UsageError, TrainingError, ModelError, RuntimeError, MemoryError)  # what a trial's settings can cause
TEXT = r"data\.|training\.eval_tokens$|stage\.\d+\.(task|clean|validation|leaks|bad_rows|too_long|length)\b"
MEASURE = r"objective\.|stage\.\d+\.(objective|penalty)\b"


@dataclass(frozen=True)
class Trial:
    """One combination of settings, and what came of it.

    state: "waiting", "running", "complete", "pruned", or "failed", for `reason`.
    loss: of a complete trial; of others the last one that was reported. curve: (step, loss) of each evaluation.
    same_as: the number of an earlier trial with the same settings, whose loss this is.
    """

    number: int
    state: str
    settings: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float | None = None
    reason: str = ""
    same_as: int | None = None

    @property
    def overrides(self) -> list[str]:
        """As after `--set`."""
        return [override(key, value) for key, value in self.settings.items()]


class _Passed(Exception):
    """There is nothing to do for this trial, or it failed and said why."""


class Search:
    """A study, opened by one process.

    resolve: the recipe with overrides. storage: an SQLAlchemy URL; None: search.db in the folder.
    notes: what the user should know of the comparison.
    """

    def __init__(self, recipe: Recipe, folder: Path, resolve: Resolve, study: optuna.Study) -> None:
        assert recipe.search is not None
        self.recipe, self.wish, self.folder, self.resolve, self.study = recipe, recipe.search, folder, resolve, study
        self.distributions = {key: _distribution(values) for key, values in self.wish.space.items()}
        self.notes: list[str] = []

    @classmethod
    def open(
        cls, recipe: Recipe, folder: Path, resolve: Resolve, *, storage: str | None = None, root: Path | None = None
    ) -> Search:
        """Begin the search, or take up one that was begun with the same recipe.

        root: the recipe's folder, in which its files may lie elsewhere on another machine.
        Raises UsageError for a recipe without search, keys or values it cannot have, a storage that cannot be reached,
        or one that holds the search of another recipe; MissingDependencyError for a database without its driver.
        """
        if recipe.search is None:
            key = "training.learning_rate" if recipe.data.sources else "stage.0.training.learning_rate"
            raise UsageError('the recipe does not say what to search: add [search.space] with a line such as '
                             f'"{key}" = {{low = 1e-5, high = 1e-3, log = true}}', "recipe")  # fmt: skip
        notes = _check(recipe.search, resolve)
        folder.mkdir(parents=True, exist_ok=True)
        url = storage or f"sqlite:///{folder.absolute() / 'search.db'}"
        with FileLock(folder / ".search.lock"):  # tables are made once
            about = described(recipe, root)
            study = open_study(url, recipe.name, about)
            claim(study, about, folder, url)
        search = cls(recipe, folder, resolve, study)
        search.notes = notes
        search.refill()
        return search

    @property
    def num_trials(self) -> int:
        return self.wish.num_trials

    @property
    def metric(self) -> str:
        """What the losses are: "bits_per_byte" or "nats_per_token" of validation text."""
        return str(self.study.user_attrs.get("metric", "loss"))

    def name_metric(self, name: str) -> None:
        if self.metric != name:
            self.study.set_user_attr("metric", name)

    def claim_texts(self, mark: str) -> None:
        """Note what all trials read. Raises UsageError when trials that are done have read something else."""
        known = self.study.user_attrs.get("texts")
        if known == mark:
            return
        done = sum(trial.state == "complete" for trial in self.trials())
        if known is not None and done:
            raise UsageError(
                f"the texts, or the base, have changed since the search in {self.folder} began, so its losses and new "
                f"ones do not compare ({done} trials are done): give the recipe another name, or name another --out",
                "recipe",
            )
        self.study.set_user_attr("texts", mark)

    # --- what is to be done -------------------------------------------------------------------------------------------

    def refill(self) -> int:
        """Give the slots of killed trials to new ones, and make those that are missing; how many are waiting."""
        waiting = 0
        with reachable(), FileLock(self.folder / ".search.lock"):
            grid = self.wish.grid() if self.wish.method == "grid" else []
            slots = self._slots(self._without_dead())
            for slot in range(self.num_trials):
                earlier = slots.get(slot, [])
                if any(_counts(trial) for trial in earlier):
                    waiting += any(trial.state is TrialState.WAITING for trial in earlier)
                    continue
                killed = sum(not trial.user_attrs.get("void") for trial in earlier)
                about: dict[str, Any] = {"user_attrs": {"slot": slot}}
                if earlier and earlier[-1].params:
                    last = earlier[-1]
                    about |= {"params": last.params, "distributions": last.distributions,
                              "intermediate_values": last.intermediate_values}  # fmt: skip
                elif grid:
                    params = {key: _label(value) for key, value in grid[slot].items()}
                    about |= {"params": params, "distributions": self.distributions}
                state = TrialState.WAITING
                if killed >= KILLS:
                    state = TrialState.FAIL
                    about["user_attrs"]["reason"] = f"its process was killed {killed} times (out of memory?)"
                self.study.add_trial(optuna.create_trial(state=state, **about))
                waiting += state is TrialState.WAITING
        return waiting

    def waiting(self) -> int:
        """Slots that nobody works on yet."""
        return sum(trial.state == "waiting" for trial in self.trials())

    def running(self) -> int:
        return sum(trial.state == "running" for trial in self.trials())

    def _all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @staticmethod
    def _slots(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
        slots: dict[int, list[FrozenTrial]] = {}
        for trial in trials:
            if "slot" in trial.user_attrs:
                slots.setdefault(trial.user_attrs["slot"], []).append(trial)
        return slots

    def _without_dead(self) -> list[FrozenTrial]:
        """All trials; running ones whose process is gone have become failed ones, without a reason."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        dead, trials = 0, self._all()
        for trial in trials:
            if trial.state is not TrialState.RUNNING:
                continue
            if "place" not in trial.user_attrs:  # it has not begun, or was killed before its first sign of life
                begun = trial.datetime_start
                if begun is not None and (datetime.now() - begun).total_seconds() > GRACE:
                    dead += self._give_up(trial)
            elif trial.user_attrs["place"] == self._place(slot := trial.user_attrs["slot"]):
                # on this machine nothing need be waited for: the system lets go of a dead process's locks
                with contextlib.suppress(Timeout), FileLock(self._folder(slot) / ".lock", timeout=0):
                    dead += self._give_up(trial)
        return self._all() if dead else trials

    def _give_up(self, trial: FrozenTrial) -> bool:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # it came to its end just now
            self.study.tell(trial.number, state=TrialState.FAIL)
        return True

    def _folder(self, slot: int) -> Path:
        return self.folder / "trials" / f"{slot:03}"

    def _place(self, slot: int) -> str:
        return f"{socket.gethostname()}:{self._folder(slot).absolute()}"

    # --- doing it -----------------------------------------------------------------------------------------------------

    def work(self, run: Runner, on_change: Callable[[], None] = lambda: None) -> None:
        """Do waiting trials until there are none. on_change: called after every evaluation and every trial.

        `run` trains in a folder of its own, goes on there if it finds something of itself, and returns the loss. Errors
        that settings can cause make a failed trial; others (a full disk) end the work, and the trial is repeated.
        """
        while self.refill():
            # the lock is held until the outcome is told: without it the trial would look killed
            with reachable(), contextlib.ExitStack() as held:
                self._work_once(run, on_change, held)
            self._tidy()
            on_change()

    def _work_once(self, run: Runner, on_change: Callable[[], None], held: contextlib.ExitStack) -> None:
        taken: list[int] = []

        def objective(trial: optuna.Trial) -> float:
            taken.append(trial.number)
            return self._try(trial, run, on_change, held)

        try:
            self.study.optimize(objective, n_trials=1, catch=(_Passed,))
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError):
            # Optuna's ways to say that the trial has an outcome: this machine slept, and others took it for dead
            trial = self._all()[taken[0]] if taken else None
            if trial is None or _counts(trial) or "void" in trial.user_attrs:
                raise

    def _try(
        self, trial: optuna.Trial, run: Runner, on_change: Callable[[], None], held: contextlib.ExitStack
    ) -> float:
        slot, others = trial.user_attrs.get("slot"), self._all()
        if slot is None or slot >= self.num_trials or _is_twin(others, slot, trial.number):
            trial.set_user_attr("void", True)
            raise _Passed
        folder = self._folder(slot)
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(FileLock(folder / ".lock"))
        trial.set_user_attr("place", self._place(slot))
        self.study.sampler = self._sampler(slot)
        settings = {key: self._suggest(trial, key) for key in self.wish.space}
        if (before := _done_before(others, slot, trial.params)) is not None:
            trial.set_user_attr("same_as", before.user_attrs["slot"])
            assert before.value is not None
            return before.value
        stopped, told = False, dict(others[trial.number].intermediate_values)  # by one that was killed

        def report(step: int, loss: float) -> bool:
            nonlocal stopped
            with reachable():
                if step not in told:
                    trial.report(loss, step)
                told[step] = loss
                wished = self.wish.prune and len(told) > self.wish.warmup
                stopped = wished and math.isfinite(loss) and trial.should_prune()
            on_change()
            return stopped

        try:
            loss = run(self.resolve([override(key, value) for key, value in settings.items()]), folder, report)
        except optuna.exceptions.UpdateFinishedTrialError:
            raise
        except BLAMED as error:
            trial.set_user_attr("reason", _sentence(error)[:500])
            raise _Passed from error
        except BaseException:
            trial.set_user_attr("void", True)  # not its fault, it will be repeated
            raise
        if stopped:
            raise optuna.TrialPruned
        if not math.isfinite(loss):
            trial.set_user_attr("reason", f"the validation loss is {loss}")
            raise _Passed
        return loss

    def _sampler(self, slot: int) -> optuna.samplers.BaseSampler:
        seed = (self.recipe.seed * 1_000_003 + slot) % 2**32
        if self.wish.method != "tpe":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # constant_liar: trials that run count as bad, so that others look elsewhere
            return optuna.samplers.TPESampler(n_startup_trials=self.wish.startup, constant_liar=True, seed=seed)

    def _suggest(self, trial: optuna.Trial, key: str) -> Any:
        values = self.wish.space[key]
        if not isinstance(values, RangeRecipe):
            label = trial.suggest_categorical(key, [_label(choice) for choice in values])
            return next(choice for choice in values if _label(choice) == label and type(_label(choice)) is type(label))
        if values.whole:
            low, high, step = int(values.low), int(values.high), int(values.step or 1)
            return trial.suggest_int(key, low, high, step=step, log=values.log)
        return trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)

    def _tidy(self) -> None:
        """Checkpoints of finished trials and models of all but the best: twenty trials of smollm2 would leave 40 GB."""
        trials = self.trials()
        best = _best(trials)
        for trial in trials:
            if trial.state in ("complete", "pruned", "failed"):
                shutil.rmtree(self._folder(trial.number) / "checkpoints", ignore_errors=True)
                if best is not None and trial.number != best.number:  # and never will be
                    shutil.rmtree(self._folder(trial.number) / "model", ignore_errors=True)

    # --- what came of it ----------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All slots in order."""
        with reachable():
            slots = self._slots(self._all())
        return [self._told(slot, slots.get(slot, [])) for slot in range(self.num_trials)]

    def _told(self, slot: int, trials: list[FrozenTrial]) -> Trial:
        trial = next((one for one in trials if _counts(one)), None)
        if trial is None:
            return Trial(slot, "waiting")
        choices = {key: values for key, values in self.wish.space.items() if not isinstance(values, RangeRecipe)}
        settings = {
            key: next((one for one in choices.get(key, ()) if _label(one) == value), value)
            for key, value in trial.params.items()
        }
        curve = tuple(sorted(trial.intermediate_values.items()))
        loss = trial.value if trial.state is TrialState.COMPLETE else curve[-1][1] if curve else None
        state = "failed" if trial.state is TrialState.FAIL else trial.state.name.lower()
        return Trial(
            slot,
            state,
            {key: settings[key] for key in self.wish.space if key in settings},
            loss,
            curve,
            trial.duration.total_seconds() if trial.duration else None,
            trial.user_attrs.get("reason", ""),
            trial.user_attrs.get("same_as"),
        )

    @property
    def best(self) -> Trial | None:
        return _best(self.trials())

    def importance(self) -> dict[str, float]:
        """How much of the losses' variance each key explains, by fANOVA (Hutter et al., ICML 2014); they sum to 1.

        Pruned trials count too, where evaluations were at the same steps: compared is then the last step that all have.
        Empty while it cannot be told: fewer than four trials, or all equal.
        """
        told = [trial for trial in self.trials() if trial.state in ("complete", "pruned") and trial.same_as is None]
        steps = set.intersection(*(set(dict(trial.curve)) for trial in told)) if told else set()
        values = {
            trial.number: dict(trial.curve)[max(steps)] if steps else trial.loss
            for trial in told
            if steps or trial.state == "complete"
        }
        if len(values) < 4 or len(set(values.values())) == 1:
            return {}
        study = optuna.create_study()
        for trial in told:
            if trial.number in values:
                params = {key: _label(value) for key, value in trial.settings.items()}
                study.add_trial(
                    optuna.create_trial(params=params, distributions=self.distributions, value=values[trial.number])
                )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.recipe.seed % 2**32)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {key: float(share) for key, share in shares.items()}


def override(key: str, value: Any) -> str:
    """As after `--set`: training.steps=50."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UsageError | TrainingError | ModelError) else f"{type(error).__name__}: {text}"


def _best(trials: Sequence[Trial]) -> Trial | None:
    complete = [trial for trial in trials if trial.state == "complete"]
    # a repetition has no model of its own
    return min(complete, key=lambda trial: (trial.loss, trial.same_as is not None, trial.number), default=None)


def _is_twin(trials: Sequence[FrozenTrial], slot: int, number: int) -> bool:
    """Two machines made the same slot at the same time: the first trial counts."""
    return any(trial.user_attrs.get("slot") == slot and trial.number < number and _counts(trial) for trial in trials)


def _done_before(trials: Sequence[FrozenTrial], slot: int, params: dict[str, Any]) -> FrozenTrial | None:
    """One with the same settings: with the same seed, it came to the same loss."""
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE and "same_as" not in trial.user_attrs]
    return next((trial for trial in done if trial.params == params and trial.user_attrs["slot"] != slot), None)


def _counts(trial: FrozenTrial) -> bool:
    """Whether it speaks for its slot: not if it was killed, interrupted or superfluous."""
    return trial.state is not TrialState.FAIL or "reason" in trial.user_attrs


def _label(choice: Any) -> Any:
    """A choice as databases keep it."""
    return json.dumps(choice, ensure_ascii=False) if isinstance(choice, tuple) else choice


def _distribution(values: RangeRecipe | tuple[Any, ...]) -> BaseDistribution:
    if not isinstance(values, RangeRecipe):
        return CategoricalDistribution([_label(choice) for choice in values])
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


# --- before it begins -------------------------------------------------------------------------------------------------


def _check(wish: SearchRecipe, resolve: Resolve) -> list[str]:
    """Raises the recipe's own UsageError for a key that it lacks, or that can have none of its values. What else to
    know: values that will fail, and keys that change what is measured."""
    notes = []
    for key, values in wish.space.items():
        if key.startswith("search."):
            raise UsageError(f"{key} cannot be searched: it says how to search", "search")
        ends = (values.low, values.high) if isinstance(values, RangeRecipe) else values
        errors = {}
        for value in ends:
            try:
                resolve([override(key, value)])
            except UsageError as error:
                errors[value] = error
        if len(errors) == len(ends):
            raise next(iter(errors.values()))
        notes += [f"{override(key, value)}, with all else as it is, is refused: {error}; trials with it fail"
                  for value, error in errors.items()]  # fmt: skip
        if re.match(TEXT, key):
            notes.append(f"{key} changes the validation text itself: losses of different texts are compared")
        elif re.match(MEASURE, key):
            notes.append(f"{key} changes what the loss measures: losses are compared that mean different things")
    return notes
