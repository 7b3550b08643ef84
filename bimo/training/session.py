"""A whole training: the loop's stream, and what is done with it. Resumes by itself.

    for event in train_run(Job.of(recipe), folder, model, objective, texts, warn=print):
        if isinstance(event, StepInfo): ...            # every step
        else: print(event.step, event.scores)          # Evaluation

In the run's folder it keeps

    metrics.jsonl   every step and every evaluation, one a line; a resumed run continues it where it left off
    checkpoints/    see training.checkpoint
    model/          the result, written at the end

Of several processes (training.distributed) each calls it and gets the same stream; the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bimo.data.loader import PackedLoader, RowLoader
from bimo.data.shards import TokenFile, fingerprint
from bimo.errors import DataError, UsageError
from bimo.models.block import Block
from bimo.recipe import Recipe, RobustRecipe, TrainingRecipe, settings_of
from bimo.runtime import Ranks
from bimo.tokenizer.load import Tokenizer
from bimo.training.checkpoint import latest_checkpoint, load_checkpoint, remove_old, save_checkpoint, save_model
from bimo.training.distributed import anywhere, from_main, parallelize
from bimo.training.loop import Objective, StepInfo, TrainingState, current_stage, train
from bimo.training.optim import make_optimizers
from bimo.training.trackers import TRACKERS, Tracker
from bimo.training.validation import MakeLoader, Score, bytes_of_tokens, validate

__all__ = ["Evaluation", "Job", "Texts", "finished", "read_metrics", "train_run"]

BEST = "best"  # the model directory of the best evaluation so far, where training may stop early
BESIDE = ("name", "report", "compare", "search")  # sections that change no model
WITHOUT_EFFECT = ("eval_every", "eval_tokens", "checkpoint_minutes", "keep_checkpoints", "parallel", "trackers")


@dataclass(frozen=True)
class Texts:
    """What is read: training files by source, validation files by language, and the tokenizer of both."""

    train: Mapping[str, TokenFile]
    validation: Mapping[str, TokenFile]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Job:
    """What is to be done, whichever part of a recipe says it.

    weights: of the training files, by their names; 1 if not given. what: all else that changes a step, JSON-ready.
    about: what bimo.json tells of it. length: tokens of a row; 0: what the model can read.
    from_start: a model that exists is evaluated before the first step, too, and on examples drawn from all.
    beside: validation texts that are told of, but do not say which step was the best. robust: as in training.robust.
    """

    name: str
    seed: int
    training: TrainingRecipe
    weights: Mapping[str, float] = field(default_factory=dict)
    what: Any = None
    about: Mapping[str, Any] = field(default_factory=dict)
    length: int = 0
    from_start: bool = False
    beside: tuple[str, ...] = ()
    robust: RobustRecipe = field(default_factory=RobustRecipe)

    @classmethod
    def of(cls, recipe: Recipe) -> Job:
        """The pretraining that a recipe describes."""
        weights = {source.name: source.weight for source in recipe.data.sources}
        what = [part.model_dump(mode="json") for part in (recipe.model, recipe.objective)]
        about = {"recipe": recipe.model_dump(mode="json")}
        return cls(recipe.name, recipe.seed, recipe.training, weights, what, about)

    def identity(self, texts: Texts) -> str:
        """What a resumed run must have in common with the one before: all that changes a step."""
        training = self.training.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
        files = [(name, fingerprint(file.folder / "about.json")) for name, file in sorted(texts.train.items())]
        robust = [self.robust.model_dump(mode="json")] if self.robust != RobustRecipe() else []
        return fingerprint(self.seed, self.what, training, files, list(self.weights.items()), *robust)


@dataclass(frozen=True)
class Evaluation:
    """Scores on text that is not trained on, by language. best: no earlier evaluation had a smaller loss."""

    step: int
    scores: dict[str, Score]
    best: bool

    @property
    def total(self) -> Score:
        return sum(self.scores.values(), Score())


def train_run(
    job: Job,
    folder: Path,
    model: Any,
    objective: Objective,
    texts: Texts,
    warn: Callable[[str], None],
    ranks: Ranks = Ranks(),
    make_loader: MakeLoader = PackedLoader,
) -> Generator[StepInfo | Evaluation, None, None]:
    """Train `model` (its first weights set) as the job says, from the latest checkpoint in `folder` where one is.

    objective and make_loader belong together (objectives.kinds): what the one makes of files the other learns from.

    Closing the generator writes a checkpoint; of several processes all must close it at the same event.
    Raises TrainingError (bad loss), DataError (a checkpoint of another model), UsageError (too little text).
    """
    run = _Run(job, folder, model, objective, texts, warn, ranks, make_loader)
    try:
        yield from run.events()
    finally:
        run.close()


def finished(job: Job, folder: Path, texts: Texts) -> dict[str, Any] | None:
    """The lineage of folder/model; None if there is none yet. Raises UsageError if it is not what this job makes of
    these texts: somebody may still need it."""
    try:
        lineage = json.loads((folder / "model" / "bimo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(lineage, dict):
        return None
    if lineage.get("mark") == job.identity(texts):
        return lineage
    left = " and ".join(str(folder / name) for name in ("model", "checkpoints") if (folder / name).is_dir())
    raise UsageError(
        f"{folder / 'model'} was made with {_changed(lineage, job)}: give this run another name (or --out) to keep it, "
        f"or remove {left} to train again",
        "recipe",
    )


def _changed(lineage: Mapping[str, Any], job: Job) -> str:
    """In what an earlier job was another, as far as can be told."""
    if (then := lineage.get("parent_mark")) and then != job.about.get("parent_mark"):
        return "another base"
    parts = []
    for about in (lineage, job.about):
        recipe = dict(about.get("recipe") or {})
        stages = {stage["name"]: stage for stage in recipe.pop("stage", ())}
        parts.append(stages.get(about.get("stage"), recipe) | {"seed": recipe.get("seed")})
    old, new = (dict(settings_of(part)) for part in parts)
    keys = [key for key in new if old.get(key) != new[key] and key.partition(".")[0] not in BESIDE]
    keys = [key for key in keys if not set(key.split(".")) & set(WITHOUT_EFFECT)]
    if not keys:
        return "other texts"
    return f"another recipe, where {keys[0]} was {old.get(keys[0])!r:.60} and not {new[keys[0]]!r:.60}"


class _Run:
    def __init__(
        self,
        job: Job,
        folder: Path,
        model: Any,
        objective: Objective,
        texts: Texts,
        warn: Callable[[str], None],
        ranks: Ranks,
        make_loader: MakeLoader,
    ) -> None:
        self.job, self.folder, self.texts, self.warn, self.ranks = job, folder, texts, warn, ranks
        self.training, self.make_loader = job.training, make_loader
        self.context = job.length or model.config.max_positions
        self.sizes = bytes_of_tokens(texts.tokenizer)
        self.validation = {name: file for name, file in texts.validation.items() if self._has_row(file)}
        if texts.validation and not self.validation:
            warn(f"there is less validation text than one row of {self.context} tokens: nothing is evaluated")
        self.best, self.since_best, self.evaluated_at = float("inf"), 0, -1 if job.from_start else 0
        self.scores: dict[str, dict[str, float]] = {}  # figures of the last evaluation, by language
        self.mark = job.identity(texts)
        torch.manual_seed(job.seed + ranks.rank)  # only dropout draws from it
        self._prepare_model(model)
        self.objective = parallelize(model, objective, self.training.parallel, ranks)
        self.state = TrainingState(model, make_optimizers(model, self.training), self._loader(0), ranks=ranks)
        resumed = self._resume()
        settings = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            **self.training.model_dump(mode="json"),
        }
        start = self.state.step
        self.metrics = _Metrics(folder / "metrics.jsonl", start if resumed else -1) if ranks.is_main else None
        self.trackers: list[Tracker] = [
            TRACKERS[name](folder, job.name, settings, start) for name in self.training.trackers if ranks.is_main
        ]
        self.saved_at = time.monotonic()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        for tracker in self.trackers:
            tracker.close()

    def events(self) -> Iterator[StepInfo | Evaluation]:
        try:
            yield from self._steps()
        except GeneratorExit:  # the consumer leaves, between two steps: nothing of them shall be lost
            self._save()
            raise
        best = self.folder / BEST
        if not (self.since_best and from_main(self.ranks, best.is_dir)):
            self._save_model(self.folder / "model")
        elif self.ranks.is_main:
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            os.replace(best, self.folder / "model")
        if self.ranks.is_main:
            shutil.rmtree(best, ignore_errors=True)

    def _steps(self) -> Iterator[StepInfo | Evaluation]:
        state, training = self.state, self.training
        if self._is_due(state.step):  # who left, left just before it
            yield self._evaluate()
        while state.step < training.steps:
            _, stage_end = current_stage(state.step, training, self.context)
            adapter = getattr(state.model, "adapter", None)
            steps = train(
                state, self.objective, training, stop_at=stage_end, robust=self.job.robust, regulariser=adapter
            )
            for info in steps:
                self._log(info.step, loss=info.loss, grad_norm=info.grad_norm, learning_rate=info.learning_rate,
                          tokens_per_second=info.num_tokens / info.seconds, seconds=info.seconds)  # fmt: skip
                yield info
                if self._is_due(info.step):
                    yield self._evaluate()
                    if training.early_stopping and self.since_best >= training.early_stopping:
                        return
                if anywhere(self.ranks, time.monotonic() - self.saved_at >= training.checkpoint_minutes * 60):
                    self._save()
            if state.step == stage_end < training.steps:
                state.loader = self._loader(state.step)

    # --- beginning --------------------------------------------------------------------------------------------------

    def _has_row(self, file: TokenFile) -> bool:
        """Of less than a row there is no score."""
        try:
            return bool(self.make_loader([file], length=self.context, shuffle=False))
        except UsageError:
            return False

    def _loader(self, step: int) -> RowLoader:
        length, _ = current_stage(step, self.training, self.context)
        names = sorted(self.texts.train)
        files = [self.texts.train[name] for name in names]
        loader = self.make_loader(
            files, length=length, seed=self.job.seed, weights=[self.job.weights.get(name, 1.0) for name in names]
        )
        for name, file, rows in zip(names, files, loader.num_rows, strict=True):
            if not rows:
                self.warn(f"source {name} has {len(file.tokens)} tokens, less than one row of {length}: it is not read")
        return loader

    def _resume(self) -> bool:
        """Whether there was something to go on from."""
        path = from_main(self.ranks, lambda: latest_checkpoint(self.folder / "checkpoints", self.warn))
        if path is None:
            return False
        step = json.loads((path / "training.json").read_text(encoding="utf-8"))["step"]
        self.state.loader = self._loader(step)
        about = load_checkpoint(path, self.state)
        if about["mark"] != self.mark:
            raise UsageError(
                f"{path} was made with another recipe, so going on would mix both: give the run another name (or "
                f"--out), or remove {self.folder / 'checkpoints'} to begin again",
                "recipe",
            )
        self.best, self.since_best = about["best"] or float("inf"), about["since_best"]
        self.scores, self.evaluated_at = about["scores"], about["evaluated_at"]
        return True

    def _prepare_model(self, model: Any) -> None:
        """What changes how the model computes, not what it is."""
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        if self.training.activation_checkpointing:
            from torch.utils.checkpoint import checkpoint

            for block in blocks:
                block.forward = _checkpointed(checkpoint, block.forward)  # type: ignore[method-assign]
        if self.training.compile:
            for block in blocks:  # one by one: they are alike, so one compilation serves all
                block.compile()

    # --- on the way ---------------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        """Whether the model of this step is to be evaluated, and was not."""
        due = step % self.training.eval_every == 0 or step == self.training.steps
        return bool(self.validation) and step > self.evaluated_at and due

    def _evaluate(self) -> Evaluation:
        state = self.state
        scores = validate(
            state, self.objective, self.training, self.validation, self.sizes, self.context, self.make_loader,
            shuffle=self.job.from_start,
        )  # fmt: skip
        self.evaluated_at = state.step
        total = sum((score for name, score in scores.items() if name not in self.job.beside), Score())
        better = total.nats_per_token < self.best
        self.scores = {name: score.figures for name, score in scores.items()}
        if better:
            self.best, self.since_best = total.nats_per_token, 0
            if self.training.early_stopping:
                self._save_model(self.folder / BEST)
        else:
            self.since_best += 1
        values = {}
        for name, score in scores.items():
            values[f"validation/{name}/loss"] = score.nats_per_token
            values |= {f"validation/{name}/{key}": value for key, value in score.figures.items()}
        self._log(state.step, **values)
        return Evaluation(state.step, scores, better)

    def _save(self) -> None:
        best = self.best if self.best < float("inf") else None
        about = {"mark": self.mark, "best": best, "since_best": self.since_best, "scores": self.scores,
                 "evaluated_at": self.evaluated_at}  # fmt: skip
        folder = self.folder / "checkpoints"
        try:
            if self.metrics:
                folder.mkdir(parents=True, exist_ok=True)
                self.metrics.flush()
            save_checkpoint(self.state, folder, source=self.texts.tokenizer.directory, about=about)
            if self.ranks.is_main:
                remove_old(folder, self.training.keep_checkpoints)
        except DataError as error:
            self.warn(f"{error}; training goes on, and tries again in {self.training.checkpoint_minutes:g} minutes")
        self.saved_at = time.monotonic()

    def _save_model(self, folder: Path) -> None:
        save_model(self.state, folder, source=self.texts.tokenizer.directory, lineage=self._lineage())

    def _log(self, step: int, **values: float) -> None:
        if self.metrics:
            self.metrics.write({"step": step, **values})
        for tracker in self.trackers:
            tracker.log(step, values)

    def _lineage(self) -> dict[str, Any]:
        return {
            "mark": self.mark,
            **self.job.about,
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "scores": self.scores,
            "data": {name: fingerprint(file.folder / "about.json") for name, file in self.texts.train.items()},
        }


def _checkpointed(checkpoint: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forget what a block computed on the way, and compute it again for the gradient (arXiv:1604.06174)."""
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


class _Metrics:
    """metrics.jsonl: what is after `step` belongs to a process that died, and comes again; -1: all of it, of another
    recipe that ended here before."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self.stream = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        try:
            self.stream.write(json.dumps(row) + "\n")
            self.stream.flush()
        except OSError as error:
            raise DataError(f"{self.stream.name} cannot be written ({error.strerror}): free some space and run the "
                            f"same command again, it goes on from the last checkpoint") from error  # fmt: skip

    def flush(self) -> None:
        """Force it to disk, so that a checkpoint never knows more than it."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows
