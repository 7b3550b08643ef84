"""Typed reading of settings that came from a file: every value is checked once, every complaint is one sentence.

    fields = Fields(json.loads(text), "config.json", defaults={"n_positions": 1024})
    fields.integer("n_embd")            # CorruptModelError when absent, not a whole number, or out of range

The same accessors serve GGUF metadata, which is turned into config.json's terms first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from bimo.errors import CorruptModelError, UnsupportedModelError

__all__ = ["Fields", "check_written"]

# Beyond every real model, and small enough that products of two sizes stay within 64 bits.
MAX_INTEGER = 2**31 - 1


class Fields:
    """A JSON object with typed accessors; an absent key and an explicit null both mean the default."""

    def __init__(self, raw: Any, where: str, defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(raw, Mapping):
            raise CorruptModelError(f"{where}: expected a JSON object of settings, got {_shown(raw)}")
        self.raw, self.where = raw, where
        self.defaults: Mapping[str, Any] = defaults or {}

    def has(self, key: str) -> bool:
        """Whether the key is given or has a family default (an explicit null counts as not given)."""
        return self.raw.get(key) is not None or (key not in self.raw and self.defaults.get(key) is not None)

    def _get(self, key: str, default: Any, expected: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = self.defaults.get(key, default)
        if value is None:
            raise CorruptModelError(f"{self.where}: {key} is missing, {expected} is needed")
        return value

    def _wrong(self, key: str, expected: str, value: Any) -> CorruptModelError:
        return CorruptModelError(f"{self.where}: {key} should be {expected}, not {_shown(value)}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER) -> int:
        """A whole number from `low` to `high`."""
        expected = f"a whole number from {low} to {high}"
        value = self._get(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, expected, value)
        return value

    def number(self, key: str, default: float | None = None, *, low: float | None = None) -> float:
        """A finite number above zero, or at least `low` when given."""
        expected = "a number above 0" if low is None else f"a number of at least {low:g}"
        value = self._get(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or math.isnan(value):
            raise self._wrong(key, expected, value)
        if value <= 0 if low is None else value < low:
            raise self._wrong(key, expected, value)
        return float(value)

    def share(self, key: str) -> float:
        """A number from 0 to 1."""
        value = self.number(key, low=0.0)
        if value > 1:
            raise CorruptModelError(f"{self.where}: {key} should be a share from 0 to 1, not {value:g}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default, "a string")
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._get(key, None, "a list of strings")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings", value)
        return value

    def section(self, key: str) -> Fields:
        """A nested object; an absent one is empty."""
        return Fields(self._get(key, {}, "an object"), f"{self.where}: {key}")

    def only(self, key: str, accepted: Any) -> None:
        """Refuse a setting whose value is not the one bimo computes; absent and null pass."""
        value = self.raw.get(key)
        if value is not None and value != accepted:
            wanted = f"only {key} = {accepted!r} is" if accepted is not None else "which is not"
            raise UnsupportedModelError(
                f"{self.where}: {key} is {_shown(value)}, {wanted} implemented by bimo; "
                f'serve this model with backend = "vllm", or use it through transformers'
            )


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def check_written(config: Any, read: Any, same: Callable[[str, Any, Any], bool] | None = None) -> None:
    """What was written is read back and compared, so nothing is lost silently.

    config, read: dataclasses. same: whether two values of a field that differ mean the same. Raises
    UnsupportedModelError for a setting that the family's config.json has no word for.
    """
    for item in dataclasses.fields(config):
        asked, got = getattr(config, item.name), getattr(read, item.name)
        if asked != got and not (same is not None and same(item.name, asked, got)):
            raise UnsupportedModelError(
                f"a {config.family} config.json cannot say {item.name} = {asked!r} (it would read as {got!r}): "
                f"choose another family or change the setting"
            )
