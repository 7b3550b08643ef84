"""The [search] of a recipe: which settings `bimo tune` tries, and how.

[search]
method = "tpe"
trials = 20

[search.space]
"training.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
"model.hidden_size" = [128, 192, 256]
"stage.0.adapter.rank" = { low = 4, high = 64, step = 4 }

A key is written as after `--set`; its values are a range or a list of choices.
"""

from __future__ import annotations

import difflib
import itertools
import math
from decimal import Decimal
from typing import Any, Literal

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from bimo.recipe.sections import Count, Section

__all__ = ["Choice", "RangeRecipe", "SearchRecipe"]

Number = StrictInt | StrictFloat
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Choice = Scalar | tuple[Scalar, ...]

TRIALS = 20  # of a search that does not say
LARGEST_GRID = 100  # that is tried without asking


class RangeRecipe(Section):
    """Numbers from `low` to `high`, both included; whole ones where all that is given is whole.

    step: only every so many. log: drawn evenly by size, as learning rates are: as often from 1e-4 to 1e-3 as from 1e-3
    to 1e-2.
    """

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    @model_validator(mode="after")
    def _a_range(self) -> RangeRecipe:
        low, high, step = self.low, self.high, self.step
        if not all(math.isfinite(number) for number in (low, high, step or 0)):
            raise ValueError("a range goes from a number to a number, nan and inf are none")
        if low >= high:
            raise ValueError(f"low {low} is not below high {high}: turn them round, or give a list of choices")
        if self.log and low <= 0:
            raise ValueError(f"log needs low above 0, not {low}")
        if step is not None:
            if self.log:
                raise ValueError("step and log cannot go together: leave one out, or give a list of choices")
            if step <= 0:
                raise ValueError(f"step is above 0, not {step}")
            if (rest := (_exact(high) - _exact(low)) % _exact(step)) != 0:
                raise ValueError(f"steps of {step} from {low} do not meet high {high}: make it {_exact(high) - rest}")
        return self

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @property
    def size(self) -> int | None:
        """How many numbers it has; None: it is continuous."""
        if self.step is None and not self.whole:
            return None
        return int((_exact(self.high) - _exact(self.low)) / _exact(self.step or 1)) + 1

    @property
    def values(self) -> list[int | float]:
        """All its numbers. Only of a range that has a `size`."""
        kind = int if self.whole else float
        low, step = _exact(self.low), _exact(self.step or 1)
        return [kind(low + number * step) for number in range(self.size or 0)]


class SearchRecipe(Section):
    """What `bimo tune` tries. What counts is the loss on validation text, so that wants to be enough of it.

    method: "grid", all combinations; "random" ones (Bergstra & Bengio, JMLR 13, 2012); "tpe", those that resemble the
        better ones so far (tree-structured Parzen estimator, NeurIPS 2011).
    trials: trainings, 20 if not given, and no more than there are combinations. A grid takes all of them, and asks by
        an error before it takes more than `trials`, or more than 100.
    startup: trials before tpe guides and pruning begins.
    prune: a trial that goes worse is stopped: by pruner "median", worse than half of the others were at the same step;
        "halving", not among the best third at steps that are three times as far each (arXiv:1810.05934).
    warmup: evaluations (training.eval_every) of a trial before it may be stopped.
    space: keys as after `--set`, and what they may be.
    """

    method: Literal["grid", "random", "tpe"] = "tpe"
    trials: Count | None = None
    startup: Count = 5
    prune: bool = True
    pruner: Literal["median", "halving"] = "median"
    warmup: int = Field(default=1, ge=0)
    space: dict[str, RangeRecipe | tuple[Choice, ...]]

    @field_validator("space", mode="before")
    @classmethod
    def _each(cls, raw: Any) -> Any:
        """One by one, so that a mistake is told with its key."""
        if not isinstance(raw, dict) or not raw:
            raise ValueError('search.space has a line for every key that is searched: "training.learning_rate" = '
                             "{ low = 1e-4, high = 1e-2, log = true }")  # fmt: skip
        return {key: _values(key, value) for key, value in raw.items()}

    @model_validator(mode="after")
    def _finite_grid(self) -> SearchRecipe:
        if self.method != "grid":
            return self
        for key, values in self.space.items():
            if _size(values) is None:
                raise ValueError(f"a grid cannot hold all of {key}, a continuous range: give it a step, list choices, "
                                 f'or set search.method to "tpe"')  # fmt: skip
        if (size := self.size or 0) > (limit := self.trials or LARGEST_GRID):
            told = f"search.trials {limit}" if self.trials else f"{limit}, which is asked about"
            raise ValueError(f"a grid of {size} combinations is more than {told}: set search.trials to {size} if they "
                             f'shall all be tried, give fewer values, or set search.method to "tpe"')  # fmt: skip
        return self

    @property
    def size(self) -> int | None:
        """How many combinations there are; None: no end."""
        sizes = [_size(values) for values in self.space.values()]
        return None if None in sizes else math.prod(size or 0 for size in sizes)

    @property
    def num_trials(self) -> int:
        if self.method == "grid":
            return self.size or 0
        wanted = self.trials or TRIALS
        return wanted if self.size is None else min(wanted, self.size)

    def grid(self) -> list[dict[str, Choice]]:
        """All combinations, the last key changing fastest."""
        axes = [values.values if isinstance(values, RangeRecipe) else values for values in self.space.values()]
        return [dict(zip(self.space, point, strict=True)) for point in itertools.product(*axes)]


def _exact(number: int | float) -> Decimal:
    """As it is written: 0.3 is three times 0.1."""
    return Decimal(str(number))


def _size(values: RangeRecipe | tuple[Choice, ...]) -> int | None:
    return values.size if isinstance(values, RangeRecipe) else len(values)


def _values(key: str, raw: Any) -> Any:
    if isinstance(raw, RangeRecipe):
        return raw
    if isinstance(raw, dict):
        if unknown := [name for name in raw if name not in RangeRecipe.model_fields]:
            known = ", ".join(RangeRecipe.model_fields)
            near = difflib.get_close_matches(unknown[0], RangeRecipe.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"a range has {known}"
            raise ValueError(f"{key} has no {unknown[0]}; {hint}")
        try:
            return RangeRecipe.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = f"{key}.{first['loc'][0]}" if first["loc"] else key
            raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None
    if not isinstance(raw, list | tuple):
        raise ValueError(f"{key} is a range such as {{ low = 1, high = 8 }} or a list of choices, not {raw!r:.80}")
    if not raw:
        raise ValueError(f"{key} is an empty list: there is nothing to choose from")
    for number, choice in enumerate(raw):
        parts = choice if isinstance(choice, list | tuple) else [choice]
        if not all(isinstance(part, bool | int | float | str) for part in parts):
            raise ValueError(
                f"a choice of {key} is a number, a text, true, false or a list of these, not {choice!r:.80}"
            )
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            raise ValueError(f"a choice of {key} is {choice!r}, with which nothing can be computed")
        if choice in raw[:number]:
            raise ValueError(f"{key} has the choice {choice!r:.80} twice")
    return tuple(raw)
