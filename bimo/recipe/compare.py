"""The [compare] of a recipe: what `bimo compare` trains side by side, and how often.

[compare]
seeds = 3

[compare.variants]
plain = []
fgm = ["stage.0.robust.kind=fgm"]
adapter = ["stage.0.adapter.kind=lora", "stage.0.adapter.rank=8"]

The values are what stands after `--set`; the first variant is what the others are compared with.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from bimo.recipe.sections import Section

__all__ = ["CompareRecipe"]

NAME = re.compile(r"[\w.+-]+")  # of a folder


class CompareRecipe(Section):
    """seeds: trainings of each variant, with seed, seed + 1, ...; one tells nothing of chance. variants: a name, and
    what is set."""

    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    variants: dict[str, tuple[str, ...]] = Field(min_length=1)

    @field_validator("variants", mode="before")
    @classmethod
    def _each(cls, raw: Any) -> Any:
        """One by one, so that a mistake is told with its name."""
        if not isinstance(raw, dict):
            raise ValueError('compare.variants has a line for each variant: lora = ["stage.0.adapter.kind=lora"]')
        for name, settings in raw.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"a variant is called by letters, digits and .+-_ (it names a folder), not {name!r}")
            if not isinstance(settings, list | tuple) or not all(
                isinstance(one, str) and "=" in one for one in settings
            ):
                raise ValueError(f'{name} is a list of settings such as ["stage.0.dropout=0.1"], not {settings!r:.80}')
            for one in settings:
                if one.partition("=")[0].strip() == "seed" or one.startswith("compare."):
                    raise ValueError(f"{name} sets {one}, which says how is compared: compare.seeds gives the seeds")
        return raw
