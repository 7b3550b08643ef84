"""What of JSON Schema (draft 2020-12) can be guaranteed: schemas are checked, bounded and put into llguidance's words.

    text = canonical(schema, "response_format")      # bounded in size; equal schemas give equal texts
    ready = prepare(text, "response_format")         # UsageError with keyword and place for what cannot be held

llguidance enforces most of the language, silently misreads some of it and says "too large" without a place. Here each
keyword is enforced, harmless, or refused by name, with a JSON pointer to it ("#/properties/a"). Rewritten on the way:

  $ref               percent-encoded; resolved here, so that it leads to a checked schema and nowhere else
  date, email, ...   formats get a second pattern where the library is laxer than calendars and validators
  pattern            from ECMA's meaning of `.`, `\\s` and `[...]` to that of Rust's regular expressions
  oneOf              allowed where its branches can be proven to exclude each other (schema_logic.py)
  properties, ...    without "type" they mean an object, though any other type would satisfy the letter
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any
from urllib.parse import quote, unquote

from bimo.engine.schema_logic import SchemaLogic, Where, subschemas
from bimo.engine.schema_text import ENFORCED_FORMATS, NUMBER_FORMATS, STRICTER, rust_pattern
from bimo.errors import UsageError
from bimo.tokenizer.load import check_text

__all__ = ["ReadySchema", "canonical", "prepare"]

MAX_DEPTH = 100  # nesting of a schema as JSON; llguidance's own parser stops at 128
MAX_NODES = 20_000  # JSON values in a schema
MAX_CHARACTERS = 500_000  # of all its strings together
MAX_PROPERTIES = 2_000  # of one object; the compiler's time grows with the square
MAX_PATTERNS = 100  # each may have to be tried on its own
MAX_PATTERN_CHARACTERS = 10_000  # of all of them; their cost may grow with the square
MAX_COUNT = 1_000_000_000  # of minLength and the like
MAX_STEP = 10_000  # of multipleOf, without factors of 2 and 5: one state of the lexer for each remainder
MAX_WHOLE = 10**18  # whole numbers have at most 18 digits, see vocabulary.py

_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
_OBJECT = ("properties", "patternProperties", "additionalProperties")
_ENFORCED = frozenset(
    {"type", "enum", "const", "$ref", "required", "pattern", "format", *_COUNTS, *_BOUNDS, *_NAMED, *_LISTS, *_SINGLE}
)
# fmt: off
_ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$anchor", "title", "description", "default", "example", "examples",
    "deprecated", "readOnly", "writeOnly", "discriminator",
})
# fmt: on
_CASES = "list the cases with anyOf"
_MEND = {  # what a person can do about a keyword that is refused
    "not": "say what is allowed instead, with enum, pattern or anyOf",
    "if": _CASES, "then": _CASES, "else": _CASES, "dependencies": _CASES, "dependentRequired": _CASES,
    "dependentSchemas": _CASES,
    "uniqueItems": "remove it, and drop repeated items afterwards",
    "contains": "describe the first items with prefixItems", "minContains": "describe the first items with prefixItems",
    "maxContains": "describe the first items with prefixItems",
    "propertyNames": "use patternProperties with additionalProperties false",
    "unevaluatedProperties": "use additionalProperties", "unevaluatedItems": "use items",
    "additionalItems": 'use "prefixItems" and "items"',
    "nullable": 'write "type": [..., "null"] instead',
    "$dynamicRef": "use $ref", "$recursiveRef": "use $ref",
    "contentEncoding": "remove it, or describe the text with pattern",
    "contentMediaType": "remove it, or describe the text with pattern",
    "contentSchema": "remove it, or describe the text with pattern",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "uniqueItems": False, "nullable": False, "unevaluatedProperties": True, "unevaluatedItems": True,
}  # fmt: skip


@dataclass(frozen=True)
class ReadySchema:
    """A schema that may be compiled, and what is left to try before it is used."""

    schema: dict[str, Any]
    patterns: dict[str, Where]  # each with its first place
    parts: list[tuple[Where, dict[str, Any]]]  # its (sub)schemas, outermost first


def canonical(schema: Any, param: str) -> str:
    """The schema as JSON text; the order of its keys stays, since answers follow it. Raises UsageError if too big."""
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema must be an object, not {type(schema).__name__}", param)
    nodes: list[tuple[Any, int]] = [(schema, 1)]
    count = characters = 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise UsageError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep: make it flatter", param)
        if isinstance(node, str):
            characters += len(node)
            check_text(node, param)
        elif isinstance(node, Mapping | list | tuple) and len(node) > MAX_NODES:
            count += len(node)
        elif isinstance(node, Mapping):
            nodes.extend((value, depth + 1) for pair in node.items() for value in pair)
        elif isinstance(node, list | tuple):
            nodes.extend((value, depth + 1) for value in node)
        if count > MAX_NODES:
            raise UsageError(f"the JSON schema has more than {MAX_NODES} values: make it smaller", param)
        if characters > MAX_CHARACTERS:
            raise UsageError(f"the JSON schema has more than {MAX_CHARACTERS} characters: make it smaller", param)
    try:
        return json.dumps(schema, allow_nan=False, default=dict)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the JSON schema cannot be used: it is not JSON ({error})", param) from error


def prepare(text: str, param: str) -> ReadySchema:
    """Check a canonical schema, and rewrite it for llguidance. Raises UsageError for what could not be guaranteed."""
    return _Reader(json.loads(text, parse_float=_number), param).ready()


def _number(text: str) -> int | float:
    """2.0 is the integer 2, in JSON Schema too."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _types(node: dict[str, Any]) -> list[str]:
    kinds = node.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


class _Reader:
    """One schema being read, and complaints about its places."""

    def __init__(self, root: dict[str, Any], param: str) -> None:
        self.root, self.param = root, param
        self.known: set[int] = set()  # of the dicts that are schemas
        self.anchors: dict[str, str] = {}
        self.patterns: dict[str, Where] = {}
        self.steps: list[Fraction] = []

    def ready(self) -> ReadySchema:
        places: list[tuple[Where, Any]] = [(Where(), self.root)]
        for where, node in places:  # grows meanwhile: outermost first
            if isinstance(node, dict):
                self.known.add(id(node))
                self.check(where, node)
                places += [(Where(where, part), value) for part, value in subschemas(node)]
            elif not isinstance(node, bool):
                raise self.error(where, f"has {json.dumps(node):.60}", "where a schema is expected")
        for where, node in places:
            if isinstance(node, dict) and "$ref" in node and id(self.target(node["$ref"])) not in self.known:
                why = "which is not a schema inside this one: put it under #/$defs"
                raise self.error(where, f'has "$ref": {node["$ref"]!r:.80}', why)
        if len(self.patterns) > MAX_PATTERNS or sum(map(len, self.patterns)) > MAX_PATTERN_CHARACTERS:
            most = f"{MAX_PATTERNS} patterns, or {MAX_PATTERN_CHARACTERS} characters in them"
            raise UsageError(f"the JSON schema has more than {most}: make it smaller", self.param)
        self.check_steps()
        if overlap := SchemaLogic(self.root, self.target).overlapping():
            why = 'which needs branches that exclude each other (by a const property, for instance): use "anyOf"'
            raise self.error(overlap, 'uses "oneOf"', why)
        schema = _rewritten(self.root, self.anchors)
        logic = SchemaLogic(schema, lambda reference: _at(schema, unquote(reference)))
        if endless := logic.endless():
            raise self.error(endless, "is satisfied by no finite text", "since it always requires itself again")
        return ReadySchema(schema, self.patterns, logic.places)

    def target(self, reference: str) -> Any:
        """What a $ref leads to, None if nothing."""
        return _at(self.root, _pointer(reference, self.anchors))

    def error(self, where: Where, what: str, why: str) -> UsageError:
        pointer = where.pointer
        place = pointer if len(pointer) <= 120 else f"{pointer[:50]}...{pointer[-60:]}"
        return UsageError(f"the JSON schema {what} at {place}, {why}", self.param)

    # -- checks -------------------------------------------------------------------------------------------------------

    def check(self, where: Where, node: dict[str, Any]) -> None:
        for key, value in node.items():
            self.check_keyword(where, key, value)
        if kinds := [kind for kind in _types(node) if kind not in _TYPES]:
            raise self.error(where, f'has "type": {kinds[0]!r:.60}', f"which is none of {', '.join(sorted(_TYPES))}")
        self.check_numbers(where, node)
        self.check_object(where, node)
        if "format" in node:
            self.check_format(where, node)
        keys = [rust_pattern(pattern) for pattern in node.get("patternProperties", ())]
        if len(set(keys)) < len(keys):
            raise self.error(where, 'uses "patternProperties"', "with two patterns that mean the same: join them")
        for pattern in [*keys, *([rust_pattern(node["pattern"])] if "pattern" in node else [])]:
            self.patterns.setdefault(pattern, where)
        if "$anchor" in node:
            self.anchors[node["$anchor"]] = where.pointer

    def check_keyword(self, where: Where, key: str, value: Any) -> None:
        """Whether the keyword is known, and its value of the right kind."""
        if key not in _ENFORCED and key not in _ANNOTATIONS:
            if (key.startswith("x-") and key != "x-guidance") or _WITHOUT_EFFECT.get(key) is value:
                return
            if key == "id" and where.parent is None and isinstance(value, str):
                return  # draft 4's name for $id
            near = difflib.get_close_matches(key[:40], _ENFORCED, 1)
            mend = _MEND.get(key) or f"remove it, or check its spelling{f' (is it {near[0]!r}?)' if near else ''}"
            raise self.error(where, f'uses "{key:.60}"', f"which cannot be guaranteed: {mend}")
        expected = ""
        if key in _NAMED:
            expected = "" if isinstance(value, dict) else "an object"
        elif key in _LISTS:
            expected = "" if isinstance(value, list) and value else "a list of schemas"
        elif key == "enum":
            expected = "" if isinstance(value, list) and value else "a list that is not empty"
        elif key == "required":
            strings = isinstance(value, list) and all(isinstance(name, str) for name in value)
            expected = "" if strings else "a list of names"
        elif key == "type":
            names = [value] if isinstance(value, str) else value
            named = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
            expected = "" if named else "a type or a list of types"
        elif key in ("pattern", "format", "$ref", "$anchor", "$id", "$schema"):
            expected = "" if isinstance(value, str) else "a text"
        elif key in _COUNTS:
            whole = isinstance(value, int) and not isinstance(value, bool)
            expected = "" if whole and 0 <= value <= MAX_COUNT else f"a whole number from 0 to {MAX_COUNT}"
        elif key in _BOUNDS:
            expected = "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
        elif key == "items" and isinstance(value, list):
            raise self.error(where, 'has a list as "items"', 'where one schema is expected: use "prefixItems"')
        if expected:
            raise self.error(where, f'has "{key}": {json.dumps(value):.60}', f"where {expected} is expected")
        if key == "$id" and where.parent is not None:
            raise self.error(where, 'uses "$id"', "which cannot be guaranteed below the root: remove it")

    def check_numbers(self, where: Where, node: dict[str, Any]) -> None:
        """Bounds that contradict each other, and numbers that a float64 does not hold."""
        for less, more in zip(_COUNTS[::2], _COUNTS[1::2], strict=True):
            if node.get(less, 0) > node.get(more, math.inf):
                raise self.error(where, "contradicts itself", f'"{less}" {node[less]} exceeds "{more}" {node[more]}')
        for key in ("enum", "const"):
            pending = [node[key]] if key in node else []
            for value in pending:
                if isinstance(value, dict | list):
                    pending += value.values() if isinstance(value, dict) else value
                elif isinstance(value, int | float) and not isinstance(value, bool) and not _exact(value):
                    raise self.error(where, f'has {value} in "{key}"', "more than a JSON number holds: make it a text")
        bounds = {key: node[key] for key in _BOUNDS if key in node}
        for key, value in bounds.items():
            if not _exact(value) and not _idle(key, value):
                raise self.error(where, f'has "{key}": {value}', "which a JSON number does not hold: round it")
        # of equal ones the exclusive bound; it comes first in the alphabet
        low = min(((-bounds[key], key) for key in ("minimum", "exclusiveMinimum") if key in bounds), default=None)
        high = min(((bounds[key], key) for key in ("maximum", "exclusiveMaximum") if key in bounds), default=None)
        step = self.step(where, bounds["multipleOf"]) if "multipleOf" in bounds else None
        if step is None and _types(node) == ["integer"]:
            step = Fraction(1)
        if low and high and _empty(low, high, step):
            between = f'"{low[1]}" {-low[0]} and "{high[1]}" {high[0]}'
            raise self.error(where, "contradicts itself", f"there is no number between {between}")

    def step(self, where: Where, value: int | float) -> Fraction:
        """`multipleOf` as llguidance will read it: a decimal of few digits, found by multiplying by ten."""
        read, places = float(value), 0
        while read % 1 and places < 20:
            read, places = read * 10, places + 1
        rest = int(read)
        while rest and rest % 2 == 0:
            rest //= 2
        while rest and rest % 5 == 0:
            rest //= 5
        exact = Fraction(Decimal(repr(value)))
        if value <= 0 or read % 1 or exact != Fraction(int(read), 10**places) or read >= 2**32 or rest > MAX_STEP:
            raise self.error(where, f'uses "multipleOf": {value}', "which cannot be guaranteed: use a rounder number")
        self.steps.append(exact)
        return exact

    def check_steps(self) -> None:
        """Several multipleOf may meet in one number, by allOf or $ref; llguidance multiplies them in 32 bits."""
        common = 1
        denominator = math.lcm(*(step.denominator for step in self.steps))
        for step in sorted(set(self.steps)):
            scaled = int(step * denominator)
            if common * scaled >= 2**32:
                raise self.error(
                    Where(), 'uses "multipleOf"', "with steps that have no small common multiple: round them"
                )
            common = math.lcm(common, scaled)

    def check_object(self, where: Where, node: dict[str, Any]) -> None:
        properties, required = node.get("properties", {}), set(node.get("required", ()))
        if len(properties) > MAX_PROPERTIES:
            raise self.error(where, f"has more than {MAX_PROPERTIES} properties", "make it smaller")
        at_least, at_most = node.get("minProperties", 0) - len(required), node.get("maxProperties", math.inf)
        if len(required) > at_most:
            raise self.error(where, "contradicts itself", f'"required" names more than "maxProperties" {at_most}')
        closed = node.get("additionalProperties") is False and not node.get("patternProperties")
        names = required | set(properties)
        if closed and at_least + len(required) > len(names):
            raise self.error(where, "contradicts itself", '"minProperties" exceeds the number of its properties')
        capped = at_most < (len(names) if closed else math.inf)
        if len(names) > len(required) and (at_least > 0 or capped):
            one = closed and at_least <= 1 and (not capped or at_most - len(required) == 1)
            if not one:
                key = "minProperties" if at_least > 0 else "maxProperties"
                why = "which cannot be guaranteed while some of its properties are optional: require them or list cases"
                raise self.error(where, f'uses "{key}"', why)
        elif at_least > 1 and not closed:
            why = "which cannot be guaranteed, since keys may repeat: name the properties and require them"
            raise self.error(where, 'uses "minProperties"', why)

    def check_format(self, where: Where, node: dict[str, Any]) -> None:
        kind, numeric = node["format"], bool(_types(node)) and {"number", "integer", "null"}.issuperset(_types(node))
        if kind not in (NUMBER_FORMATS if numeric else ENFORCED_FORMATS):
            known = ", ".join(NUMBER_FORMATS if numeric else ENFORCED_FORMATS)
            raise self.error(where, f'uses "format": {kind!r:.60}', f"which cannot be guaranteed; known are {known}")


def _rewritten(node: Any, anchors: dict[str, str]) -> Any:
    """The schema, or a part of it, in llguidance's words: without annotations, stricter, in an order it reads well."""
    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {}
    group = [key for key in node if key in _OBJECT]  # read apart from each other when something stands between them
    keys = [k for key in node if key not in group[1:] for k in (group if key in group else [key])]
    more: list[dict[str, Any]] = []  # to be satisfied too
    for key in keys:
        value = node[key]
        if key in _NAMED:
            name_of = rust_pattern if key == "patternProperties" else str
            out[key] = {name_of(name): _rewritten(entry, anchors) for name, entry in value.items()}
        elif key in _LISTS:
            out[key] = [_rewritten(entry, anchors) for entry in value]
        elif key in _SINGLE:
            out[key] = _rewritten(value, anchors)
        elif key == "$ref":
            out[key] = quote(_pointer(value, anchors), safe="#/~$!&'()*+,;=:@")
        elif key == "pattern":
            out[key] = rust_pattern(value)
        elif key == "format":
            more += [{"pattern": pattern} for pattern in STRICTER.get(value, ())]
            if value in ENFORCED_FORMATS:
                out[key] = value
            elif NUMBER_FORMATS[value]:
                more.append(NUMBER_FORMATS[value])
        elif key in _ENFORCED and not (key in _BOUNDS and _idle(key, value)):
            out[key] = value
    names = set(node.get("required", ())) | set(node.get("properties", ()))
    closed = out.get("additionalProperties") is False and not out.get("patternProperties")
    if closed and len(names) <= out.get("maxProperties", -1):
        del out["maxProperties"]  # holds anyway
    if more:
        out["allOf"] = [*out.get("allOf", ()), *more]
    if not out.keys() & {"type", "$ref", "enum", "const", "anyOf", "oneOf", "allOf"}:
        if out.keys() & {*_OBJECT, "required", "minProperties", "maxProperties"}:
            out["type"] = "object"
        elif out.keys() & {"items", "prefixItems", "minItems", "maxItems"}:
            out["type"] = "array"
    return out


def _pointer(reference: str, anchors: dict[str, str]) -> str:
    """A $ref as JSON pointer, "" if it leads outside."""
    target = unquote(reference)
    target = anchors.get(target[1:], target) if target[:1] == "#" else ""
    return target if target == "#" or target.startswith("#/") else ""


def _at(root: Any, pointer: str) -> Any:
    """What a JSON pointer leads to, None if nothing."""
    if not pointer:
        return None
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(root, dict) and name in root:
            root = root[name]
        elif isinstance(root, list) and name.isdecimal() and int(name) < len(root):
            root = root[int(name)]
        else:
            return None
    return root


def _exact(value: int | float) -> bool:
    """Whether a JSON reader of float64 and one of exact decimals see the same number."""
    if abs(value) >= MAX_WHOLE:
        return False
    return abs(value) < 2**53 or Decimal(repr(float(value))) == int(value)


def _idle(key: str, value: int | float) -> bool:
    """A bound beyond all numbers of 18 digits changes nothing."""
    too_high = key in ("maximum", "exclusiveMaximum") and value >= MAX_WHOLE
    return too_high or (key in ("minimum", "exclusiveMinimum") and value <= -MAX_WHOLE)


def _empty(low: tuple[float, str], high: tuple[float, str], step: Fraction | None) -> bool:
    """Whether no number, or no multiple of `step`, lies between two bounds, (-value, keyword) and (value, keyword)."""
    first, last = Fraction(Decimal(repr(-low[0]))), Fraction(Decimal(repr(high[0])))
    open_low, open_high = low[1] == "exclusiveMinimum", high[1] == "exclusiveMaximum"
    if step is not None:
        wanted = math.ceil(first / step) * step
        if open_low and wanted == first:
            wanted += step
        first, open_low = wanted, False
    return first > last or (first == last and (open_low or open_high))
