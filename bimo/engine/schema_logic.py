"""What follows from a JSON schema: which branches exclude each other, and whether anything finite satisfies it.

    SchemaLogic(root, target).overlapping()     # where there is a oneOf of branches not proven exclusive, or None
    SchemaLogic(root, target).endless()         # where there is a part each value of which would contain another

llguidance treats oneOf as anyOf when it is told that the branches exclude each other; its own proof does not look
through $ref, where most schemas keep them. Proofs here are sound and incomplete, and give up after `BUDGET` steps.
They are about the schema as it was given: a branch that `json_schema` narrowed may exclude what the reader's does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

__all__ = ["SchemaLogic", "Where", "subschemas"]

BUDGET = 20_000  # comparisons of two schemas
MAX_BRANCHES = 64  # compared pairwise
MAX_PARTS = 16  # schemas that one value has to satisfy at once, through allOf and $ref
MAX_NESTING = 4  # of properties within properties, and of unions
MAX_ROUNDS = 100  # of `endless`; longer chains of references pass for finite

_SINGLE = ("items", "additionalProperties")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})


class Where(NamedTuple):
    """A place in a schema; its pointer is spelled out only when somebody asks, for names may be long and many."""

    parent: Where | None = None
    parts: tuple[str, ...] = ()

    @property
    def pointer(self) -> str:
        """As JSON pointer, "#/properties/a"."""
        parts: list[str] = []
        place: Where | None = self
        while place is not None:
            parts[:0] = [part.replace("~", "~0").replace("/", "~1") for part in place.parts]
            place = place.parent
        return "/".join(["#", *parts])


def subschemas(node: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every schema directly inside a well-formed schema, after its part of the pointer."""
    for key in _SINGLE:
        if key in node:
            yield (key,), node[key]
    for key in _NAMED:
        for name, value in node.get(key, {}).items():
            yield (key, name), value
    for key in _LISTS:
        for place, value in enumerate(node.get(key, ())):
            yield (key, str(place)), value


def _kinds(node: dict[str, Any]) -> frozenset[str]:
    """The types a schema's own keywords allow; integers are numbers."""
    if "type" not in node and node.keys() & {"const", "enum"}:
        kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
        values = [node["const"]] if "const" in node else node["enum"]
        return frozenset(kinds.get(type(value), "null") for value in values)
    names = node.get("type", KINDS)
    return frozenset("number" if name == "integer" else name for name in ([names] if isinstance(names, str) else names))


def _lowest(node: dict[str, Any]) -> float:
    return max(node.get("minimum", -math.inf), node.get("exclusiveMinimum", -math.inf))


def _highest(node: dict[str, Any]) -> float:
    return min(node.get("maximum", math.inf), node.get("exclusiveMaximum", math.inf))


class SchemaLogic:
    """Of one checked schema; `target` gives what a $ref leads to."""

    def __init__(self, root: dict[str, Any], target: Callable[[str], Any]) -> None:
        self.root, self.target = root, target
        self.budget = BUDGET
        self.places: list[tuple[Where, dict[str, Any]]] = [(Where(), root)]  # outermost first
        for where, node in self.places:  # grows meanwhile
            self.places += [(Where(where, part), value) for part, value in subschemas(node) if isinstance(value, dict)]

    # -- oneOf --------------------------------------------------------------------------------------------------------

    def overlapping(self) -> Where | None:
        """The first schema with a oneOf of which two branches may hold at once, None where there is none."""
        for where, node in self.places:
            if len(node.get("oneOf", ())) > 1:
                beside = {key: value for key, value in node.items() if key != "oneOf"}
                if not self._all_exclusive(node["oneOf"], self._kinds(self._parts(beside))):
                    return where
        return None

    def _all_exclusive(self, branches: list[Any], kinds: set[str]) -> bool:
        values = [self._values(branch) for branch in branches]
        if all(found is not None for found in values):
            found = [value for some in values for value in some or ()]
            return len(found) == len(set(found))
        if len(branches) > MAX_BRANCHES:
            return False
        return all(self.exclusive(a, b, kinds) for i, a in enumerate(branches) for b in branches[:i])

    def exclusive(self, a: Any, b: Any, kinds: Iterable[str] = KINDS, depth: int = 0) -> bool:
        """Whether no value of these kinds satisfies both, as far as can be seen."""
        if depth > MAX_NESTING:
            return False
        in_a, in_b = self._parts(a), self._parts(b)
        common = self._kinds(in_a) & self._kinds(in_b) & set(kinds)
        return not common or any(self._apart(x, y, common, depth) for x in in_a for y in in_b)

    def _parts(self, node: Any) -> list[Any]:
        """Schemas that hold wherever `node` does: itself, allOf, and what $ref leads to."""
        parts = [node]
        for part in parts:
            if isinstance(part, dict) and len(parts) < MAX_PARTS:
                parts += [self.target(part["$ref"])] if "$ref" in part else []
                parts += part.get("allOf", ())[:MAX_PARTS]
        return parts

    def _kinds(self, parts: list[Any]) -> set[str]:
        """The types a value may have that satisfies all parts."""
        kinds = set(KINDS)
        for part in parts:
            kinds &= _kinds(part) if isinstance(part, dict) else KINDS if part else set()
        return kinds

    def _apart(self, a: Any, b: Any, common: set[str], depth: int) -> bool:
        """Whether no value of the types `common` satisfies these two parts."""
        self.budget -= 1
        if self.budget < 0 or not isinstance(a, dict) or not isinstance(b, dict):
            return False
        in_a, in_b = self._values(a), self._values(b)
        if in_a is not None and in_b is not None:
            return in_a.isdisjoint(in_b)
        if common == {"number"} and (_highest(a) < _lowest(b) or _highest(b) < _lowest(a)):
            return True
        if common == {"object"} and (self._differ(a, b, depth) or self._lacks(a, b) or self._lacks(b, a)):
            return True
        return any(
            all(self.exclusive(option, other, common, depth + 1) for option in one[key])
            for one, other in ((a, b), (b, a))
            for key in ("anyOf", "oneOf")
            if key in one
        )

    def _values(self, node: Any) -> set[str] | None:
        """All values, spelled, where the schema lists them."""
        if not isinstance(node, dict) or not node.keys() & {"const", "enum"}:
            return None
        values = [node["const"]] if "const" in node else node["enum"]
        return {json.dumps(value, sort_keys=True) for value in values}

    def _property(self, node: dict[str, Any], name: str) -> Any:
        """What a property's value has to satisfy, at least."""
        if name in node.get("properties", {}):
            return node["properties"][name]
        return True if "patternProperties" in node else node.get("additionalProperties", True)

    def _differ(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        """A property that both have, with values that exclude each other: a tag, for instance."""
        names = set(a.get("required", ())) | set(b.get("required", ()))
        both = [name for name in names if name in a.get("required", ()) and name in b.get("required", ())]
        return any(self.exclusive(self._property(a, name), self._property(b, name), depth=depth + 1) for name in both)

    def _lacks(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        """A property that `a` must have and `b` must not."""
        return any(self._property(b, name) is False for name in a.get("required", ()))

    # -- recursion ----------------------------------------------------------------------------------------------------

    def endless(self) -> Where | None:
        """The first schema whose values would never be complete, None where there is none."""
        finite: set[int] = set()

        def ends(node: Any) -> bool:
            return isinstance(node, bool) or id(node) in finite  # what is forbidden is llguidance's to complain about

        open_places = self.places
        for _ in range(MAX_ROUNDS):
            for _, node in reversed(open_places):
                if self._ends(node, ends):
                    finite.add(id(node))
            still = [(where, node) for where, node in open_places if id(node) not in finite]
            if len(still) in (0, len(open_places)):
                return still[0][0] if still else None
            open_places = still
        return None

    def _ends(self, node: dict[str, Any], ends: Callable[[Any], bool]) -> bool:
        """Whether the schema has a finite value, when those that pass `ends` have one."""
        if "$ref" in node and not ends(self.target(node["$ref"])):
            return False
        if not all(ends(part) for part in node.get("allOf", ())):
            return False
        if any(not any(ends(part) for part in node[key]) for key in ("anyOf", "oneOf") if key in node):
            return False
        kinds = _kinds(node)
        if kinds - {"object", "array"} or node.keys() & {"const", "enum"}:
            return True
        if "object" in kinds and all(ends(self._property(node, name)) for name in node.get("required", ())):
            return True
        first = node.get("prefixItems", [])
        needed = node.get("minItems", 0)
        rest = needed <= len(first) or ends(node.get("items", True))
        return "array" in kinds and rest and all(ends(part) for part in first[:needed])
