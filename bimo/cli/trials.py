"""One trial of `bimo tune`: a training whose loss is compared with those of other settings.

    trials = Trials(search, interrupted=lambda: False, tell=print)
    trials.prepare(progress)
    search.work(trials)

All trials read the same text where their settings do not change it:

    folder/data/, tokenizer/, tokens/     of a pretraining, as `bimo run` makes them
           NAME/data/, replay/, tokens/   of a stage, as `bimo train` makes them
           trials/007/                    what is a trial's own: its training, and text that is only its
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from bimo.data.shards import fingerprint
from bimo.errors import UsageError
from bimo.recipe import RangeRecipe, Recipe, StageRecipe
from bimo.registries.trouble import Progress
from bimo.runtime import Ranks
from bimo.training.replay import NAME as REPLAY
from bimo.training.search import Report, Search, override
from bimo.training.session import Evaluation, Job, Texts, train_run
from bimo.training.validation import Score

__all__ = ["Trials", "searched_stage"]

# settings of a stage that change how is learned, not what
OWN = ("adapter", "training", "robust", "penalty", "dropout", "r_drop", "mixing_temperature")


class Trials:
    """Trains trials, one after the other. ranks: local_rank says on which GPU. interrupted: asked after each step."""

    def __init__(
        self,
        search: Search,
        *,
        interrupted: Callable[[], bool],
        tell: Callable[[str], None],
        ranks: Ranks = Ranks(),
    ) -> None:
        self.search, self.interrupted, self.tell, self.ranks = search, interrupted, tell, ranks
        self.base, self.folder = search.recipe, search.folder
        self.stage = searched_stage(search.recipe)
        self.counted = "token"  # what a loss is an average of

    def prepare(self, progress: Progress) -> None:
        """What all trials read, before they begin: errors of it are told once, and not by each."""
        space = self.search.wish.space
        first = {key: values.low if isinstance(values, RangeRecipe) else values[0] for key, values in space.items()}
        try:
            recipe = self.search.resolve([override(key, value) for key, value in first.items()])
        except UsageError:  # of values that do not go together; others may
            return
        if self._shared(recipe):
            job, _, _, texts, _ = self._inputs(recipe, self.folder, progress)
            tasks = recipe.stage[self.stage].task if self.stage is not None else ()
            own = {task.name for task in tasks if task.augment and task.augment.back_translation}
            self.search.claim_texts(_content(texts, {*job.beside, REPLAY, *own}, str(job.about.get("parent_mark"))))

    def __call__(self, recipe: Recipe, folder: Path, report: Report) -> float:
        """Train in `folder`, or go on there; the loss on validation text of the model that is kept.

        Raises UsageError and TrainingError for what settings cannot do; KeyboardInterrupt, with a checkpoint, when
        interrupted.
        """
        job, model, objective, texts, make_loader = self._inputs(recipe, folder, lambda label, done, total: None)

        def warn(text: str) -> None:
            self.tell(f"trial {int(folder.name)}: {text}")

        events = train_run(job, folder, model(), objective, texts, warn, self.ranks, make_loader)
        losses = _Losses(folder / "losses.json")
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, Evaluation):
                    metric, loss = _loss(event, job, self.counted)
                    self.search.name_metric(metric)
                    losses.add(event.step, loss)
                    if event.step and report(event.step, loss):
                        return loss
                if self.interrupted():
                    raise KeyboardInterrupt
        if not losses.by_step:
            raise UsageError("nothing was evaluated: there is less validation text than a row", "validation")
        return min(losses.by_step.values()) if job.training.early_stopping else losses.by_step[max(losses.by_step)]

    def _inputs(self, recipe: Recipe, folder: Path, progress: Progress) -> tuple[Any, ...]:
        """(job, makes the model, objective, texts, make_loader). One process at a time makes what several read."""
        with FileLock(self.folder / ".texts.lock"):
            make = self._of_text if self.stage is None else self._of_stage
            job, model, objective, texts, make_loader = make(recipe, folder, progress)
        if not set(texts.validation) - set(job.beside):
            raise UsageError("a search compares losses on validation text, and there is none: raise data.validation, "
                             "or the stage's validation", "validation")  # fmt: skip
        return job, model, objective, texts, make_loader

    def _of_text(self, recipe: Recipe, folder: Path, progress: Progress) -> tuple[Any, ...]:
        from bimo.cli.stages import make_tokenizer, make_tokens, prepare_data
        from bimo.objectives.kinds import make_objective
        from bimo.training.build import build_model, model_config
        from bimo.training.distributed import training_device

        data = self.folder if recipe.data == self.base.data else folder
        tokenizer_of = self.folder if self._shared(recipe) or self._same_words(recipe) else folder
        tokens = self.folder if self._shared(recipe) else folder
        prepared = prepare_data(recipe, data, workers=None, executor="local", progress=progress)
        tokenizer = make_tokenizer(recipe, tokenizer_of, prepared, progress)
        texts = make_tokens(recipe, tokens, prepared, tokenizer, progress)
        objective, make_loader = make_objective(recipe, tokenizer)
        config = model_config(recipe.model, recipe.objective, tokenizer)

        def model() -> Any:
            return build_model(config, recipe.seed).to(training_device(self.ranks))

        return Job.of(recipe), model, objective, texts, make_loader

    def _of_stage(self, recipe: Recipe, folder: Path, progress: Progress) -> tuple[Any, ...]:
        from bimo.cli.tuning import StageData, open_stage_base, prepare_stage, stage_folder, stage_texts
        from bimo.training.distributed import training_device
        from bimo.training.finetune import stage_job, tunable_model
        from bimo.training.stage_checks import check_stage

        assert self.stage is not None
        stage = recipe.stage[self.stage]
        place = stage_folder(self.folder, stage) if self._shared(recipe) else folder
        place.mkdir(parents=True, exist_ok=True)
        base = open_stage_base(recipe, stage, self.folder, progress)
        check_stage(stage, base.config)
        prepared = prepare_stage(stage, place, workers=None, progress=progress)
        data = StageData(recipe, stage, place, base, prepared, progress)
        texts, kind = stage_texts(data, self.tell), data.kind
        self.counted = {"classes": "text", "embeddings": "query"}.get(kind.name, "token")
        job = stage_job(recipe, stage, base, texts, kind.make_loader)

        def model() -> Any:
            device = str(training_device(self.ranks))
            return tunable_model(base, stage, kind.with_heads, seed=recipe.seed, training=job.training, device=device)

        return job, model, kind.loss, texts, kind.make_loader

    def _same_words(self, recipe: Recipe) -> bool:
        """An encoder-decoder's vocabulary has tokens that others lack."""
        kinds = (recipe.model.kind == "seq2seq", self.base.model.kind == "seq2seq")
        return (recipe.data, recipe.tokenizer, kinds[0]) == (self.base.data, self.base.tokenizer, kinds[1])

    def _shared(self, recipe: Recipe) -> bool:
        """Whether this trial reads the same tokens as the recipe itself would."""
        if self.stage is not None:
            stages = [_of_examples(one.stage[self.stage]) for one in (recipe, self.base)]
            return stages[0] == stages[1] and recipe.seed == self.base.seed  # the seed draws replay and alterations
        pairs = [one.objective_kind == "seq2seq" and one.model.context_length for one in (recipe, self.base)]
        return self._same_words(recipe) and pairs[0] == pairs[1]


def searched_stage(recipe: Recipe) -> int | None:
    """Which [[stage]] the search is about; None: the pretraining. Raises UsageError if that cannot be told."""
    if recipe.search is None:
        return None
    keys = list(recipe.search.space)
    numbers = {key.split(".")[1] for key in keys if key.startswith("stage.")}
    common = [key for key in keys if not key.startswith("stage.") and key != "seed"]
    if not numbers:
        if not recipe.data.sources:
            raise UsageError("the recipe has only stages, so what is searched is a stage's: write stage.0.training."
                             "learning_rate, not training.learning_rate", "search")  # fmt: skip
        if recipe.objective_kind == "masked" and any(key.startswith("tokenizer.") for key in keys):
            raise UsageError("losses of masked words cannot be compared between vocabularies: leave the tokenizer out "
                             "of search.space", "search")  # fmt: skip
        return None
    if missing := [number for number in numbers if not (number.isdecimal() and int(number) < len(recipe.stage))]:
        there = ", ".join(f"stage.{number}" for number in range(len(recipe.stage)))
        raise UsageError(f"search.space names stage.{missing[0]}, and the recipe has {there or 'no [[stage]]'}",
                         "search")  # fmt: skip
    if recipe.stage[int(min(numbers))].pseudo_labels is not None:
        raise UsageError("a search trains each trial once, pseudo_labels train several times: leave them out, and add "
                         "them to the best recipe", "search")  # fmt: skip
    if common or len(numbers) > 1:
        other = common[0] if common else f"stage.{max(numbers)}"
        raise UsageError(f"a search is about one training, and search.space names stage.{min(numbers)} and {other}: "
                         f"search one after the other", "search")  # fmt: skip
    return int(numbers.pop())


def _of_examples(stage: StageRecipe) -> Mapping[str, Any]:
    return stage.model_dump(exclude=set(OWN))


def _content(texts: Texts, beside: set[str], *more: str) -> str:
    """Changes with what is read, and is the same on all machines. beside: what each machine writes itself."""
    files = [(name, file) for part in (texts.train, texts.validation) for name, file in sorted(part.items())]
    return fingerprint([(name, zlib.crc32(file.tokens.data)) for name, file in files if name not in beside], *more)


def _loss(event: Evaluation, job: Job, counted: str) -> tuple[str, float]:
    """Bits per byte, which compares between vocabularies too, where there are bytes; else by what is `counted`."""
    scores = [score for name, score in event.scores.items() if name not in job.beside]
    total = sum(scores, Score())
    return ("bits_per_byte", total.bits_per_byte) if total.num_bytes else (f"nats_per_{counted}", total.nats_per_token)


class _Losses:
    """{step: loss} of a trial, also of the part before it was killed."""

    def __init__(self, file: Path) -> None:
        self.file, self.by_step = file, dict(self._read(file))

    @staticmethod
    def _read(file: Path) -> Iterator[tuple[int, float]]:
        with contextlib.suppress(OSError, ValueError):
            for step, loss in json.loads(file.read_text(encoding="utf-8")).items():
                yield int(step), float(loss)

    def add(self, step: int, loss: float) -> None:
        self.by_step[step] = loss
        partial = self.file.with_name(f".{self.file.name}")
        partial.write_text(json.dumps(self.by_step), encoding="utf-8")
        os.replace(partial, self.file)
