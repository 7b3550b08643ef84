"""The recipe: one TOML file that says everything about a model, as data.

    recipe = load_recipe(Path("recipes/quickstart.toml"), ["training.steps=50"])
    recipe.data.sources[0].path

Unknown keys are refused and the nearest known one is named; values are checked before any work begins. The resolved
recipe (defaults filled in) is written beside every result by `save_recipe`, and reads back as the same recipe.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, model_validator

from bimo.errors import UsageError
from bimo.recipe.compare import CompareRecipe
from bimo.recipe.search import SearchRecipe
from bimo.recipe.sections import (
    OBJECTIVES,
    DataRecipe,
    ModelRecipe,
    ObjectiveRecipe,
    ReportRecipe,
    Section,
    TokenizerRecipe,
    TrainingRecipe,
)
from bimo.recipe.stages import StageRecipe

__all__ = ["Recipe", "load_recipe", "save_recipe", "settings_of"]

PATHS = ("toxic_words", "synonym_files", "words")  # keys whose values are lists of files


class Recipe(Section):
    """The whole file. `name` names the run's folder, `seed` everything that is random."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: DataRecipe = DataRecipe()
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    model: ModelRecipe = ModelRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    training: TrainingRecipe = TrainingRecipe()
    report: ReportRecipe = ReportRecipe()
    stage: tuple[StageRecipe, ...] = ()
    search: SearchRecipe | None = None
    compare: CompareRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_tokenizer(cls, raw: Any) -> Any:
        """An encoder's is WordPiece, if nothing else is said."""
        if isinstance(raw, dict) and (raw.get("model") or {}).get("kind") == "encoder":
            return {**raw, "tokenizer": {"kind": "wordpiece", **(raw.get("tokenizer") or {})}}
        return raw

    @model_validator(mode="after")
    def _fitting(self) -> Recipe:
        if not self.data.sources and not self.stage:
            raise ValueError("there is nothing to do: name [[data.sources]] to learn from, or a [[stage]]")
        if self.stage and not self.data.sources and self.stage[0].base is None:
            raise ValueError('stage.0.base names the model to begin with, e.g. "smollm2", as there are no data.sources '
                             "to pretrain one from")  # fmt: skip
        names = [stage.name for stage in self.stage]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {twice[0]}: give each a name")
        if self.objective_kind not in OBJECTIVES[self.model.kind]:
            can = " or ".join(OBJECTIVES[self.model.kind])
            raise ValueError(f"a model of kind {self.model.kind} learns {can}, not {self.objective_kind}")
        if self.report.questions and self.model.kind in ("encoder", "seq2seq"):
            raise ValueError(f"report.questions are a chat, which a model of kind {self.model.kind} does not hold: use "
                             f"report.prompts")  # fmt: skip
        if self.training.curriculum and self.objective_kind == "seq2seq":
            raise ValueError("training.curriculum has no effect on pairs, whose length is their own: leave it out")
        if self.objective.r_drop and self.objective_kind == "masked" and self.objective.next_sentence:
            raise ValueError("objective.r_drop is of words, not of relations: set objective.next_sentence to false")
        if self.objective.r_drop and not self.model.dropout:
            raise ValueError("objective.r_drop compares passes with different dropout: set model.dropout, e.g. to 0.1")
        return self

    @property
    def objective_kind(self) -> str:
        """The objective's kind, where it follows from the model too."""
        kind = self.objective.kind
        return OBJECTIVES[self.model.kind][0] if kind == "auto" else kind


def load_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `file`, with overrides such as "training.steps=50" or "data.sources.0.path=texts".

    Relative paths in it are made absolute, from the recipe's folder. Raises UsageError naming the line or the key.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
        raw = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}): give a recipe, a TOML file", "recipe") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{file}, line {line}: expected UTF-8, got the byte 0x{error.object[error.start]:02x}; save it as UTF-8 (a "
            f"Chinese recipe may be in GBK)",
            "recipe",
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is not TOML: {error}{_unquoted(text, str(error))}", "recipe") from None
    for override in overrides:
        _override(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{file}: {_explain(error)}", "recipe") from None
    return _rooted(recipe, file.absolute().parent)


def save_recipe(recipe: Recipe, file: Path) -> None:
    """Write the recipe with all defaults filled in; `load_recipe` reads it back as the same."""
    lines: list[str] = []
    _write_table(json.loads(recipe.model_dump_json()), "", lines)
    file.write_text("\n".join(lines).strip() + "\n", encoding="utf-8")


def _unquoted(text: str, error: str) -> str:
    """A hint where a key has letters that need quotes."""
    found = re.search(r"at line (\d+)", error)
    key = text.split("\n")[int(found[1]) - 1].partition("=")[0].strip() if found else ""
    if key.isascii() or key.startswith(('"', "'", "[", "#")):
        return ""
    return f'; keys of other letters than a-z stand in quotes: "{key}" = ...'


def _parts(key: str) -> list[str]:
    """Of a dotted key, some of which may be quoted: 'search.space."stage.0.length"'."""
    try:
        value: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:  # letters that TOML would have in quotes
        value = {}
    if not value:
        return [part.strip() for part in key.split(".")]
    parts = list[str]()
    while isinstance(value, dict):
        ((part, value),) = value.items()
        parts.append(part)
    return parts


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set takes key=value, e.g. training.steps=50, not {text!r}", "set")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a text
    *parents, last = _parts(key)
    place: Any = raw
    for part in parents:
        place = _step_into(place, part, key)
    if isinstance(place, list):
        _step_into(place, last, key)
        place[int(last)] = parsed
    else:
        place[last] = parsed


def _step_into(place: Any, part: str, key: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(part, {})
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    raise UsageError(f"--set {key}: there is no {part!r} to set in the recipe", "set")


def _explain(error: ValidationError) -> str:
    """The first mistake in one sentence; for an unknown key the nearest known one of that section."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in first["loc"][:-1]:
            if isinstance(part, str):
                section = _section_of(section.model_fields[part].annotation)
        near = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, n=1, cutoff=0.5)
        known = f"did you mean {near[0]}?" if near else f"known there: {', '.join(section.model_fields)}"
        return f"there is no key {place}; {known}"
    got = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f", not {first['input']!r:.80}"
    if first["type"] in ("model_type", "model_attributes_type"):  # pydantic names a class that no user knows
        return f"{place} is a table, such as {{key = value}}{got}"
    if first["type"] == "too_short":
        return f"{place} is empty: at least one is expected"
    if first["type"] == "string_pattern_mismatch":
        return f"{place} has letters, digits, dots, hyphens and underscores{got}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{place}: ".removeprefix(": ") + message + got


def _section_of(annotation: Any) -> Any:
    """The section class behind `X` or `tuple[X, ...]`."""
    return annotation if hasattr(annotation, "model_fields") else annotation.__args__[0]


def _rooted(recipe: Recipe, folder: Path) -> Recipe:
    """With every path absolute, which are relative to the recipe's folder."""

    def absolute(path: str) -> str:
        scheme = path.partition(":")[0]
        return path if scheme in ("pypi", "npm", "deb") else str(folder / Path(path).expanduser())

    def model(reference: str) -> str:
        """A name of the catalog stays one, also where a folder of that name lies about."""
        place = Path(os.path.normpath(folder / Path(reference).expanduser()))
        return (
            str(place)
            if reference.startswith(("./", "../", "~", "/")) or ("/" in reference and place.exists())
            else reference
        )

    def rooted(value: Any, key: str = "") -> Any:
        if isinstance(value, Section):
            changes = {name: rooted(getattr(value, name), name) for name in type(value).model_fields}
            return value.model_copy(update=changes)
        if isinstance(value, tuple) and value and isinstance(value[0], Section):
            return tuple(rooted(item) for item in value)
        if key == "path":
            return absolute(value)
        if key in PATHS:
            return tuple(absolute(path) for path in value)
        if key == "base":
            return value and model(value)
        if key == "back_translation":
            return value and tuple(model(reference) for reference in value)
        return value

    return cast(Recipe, rooted(recipe))


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    """TOML by hand: plain values first, then sub-tables and arrays of tables; None is left out, it has no word."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    arrays = {
        key: value for key, value in table.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    for key, value in table.items():
        if key not in tables and key not in arrays and value is not None:
            lines.append(f"{_quoted(key)} = {json.dumps(value, ensure_ascii=False)}")
    for key, rows in arrays.items():
        for row in rows:
            lines += ["", f"[[{prefix}{_quoted(key)}]]"]
            _write_table(row, f"{prefix}{_quoted(key)}.", lines)
    for key, value in tables.items():
        lines += ["", f"[{prefix}{_quoted(key)}]"]
        _write_table(value, f"{prefix}{_quoted(key)}.", lines)


def _quoted(key: str) -> str:
    """The keys of search.space have dots in them."""
    return key if key.isidentifier() and key.isascii() else json.dumps(key, ensure_ascii=False)


def settings_of(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """("training.steps", 50) and so on of a dumped recipe or a part of it, in the words of --set."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield key, value
        return
    for name, part in parts:
        yield from settings_of(part, f"{key}.{name}" if key else str(name))
