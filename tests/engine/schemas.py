"""Public-style JSON schemas, one feature or habit each; schemas that must be refused; and a model without a mind.

The kinds are those of public collections (API bodies, configuration files, function signatures, forms, records,
catalogues), the words our own. `SCHEMAS` can all be held; `REFUSED` names keyword and place of what cannot.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from bimo.engine.constrain import ConstraintFactory
from bimo.tokenizer.load import Tokenizer

__all__ = ["REFUSED", "SCHEMAS", "Walker", "bits", "random_schema"]


def bits(mask: np.ndarray, size: int) -> np.ndarray:
    """A constraint's mask as booleans, one for each token."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)


class Walker:
    """A model without a mind: takes any allowed token, with some love for tokens that bring an answer to an end."""

    def __init__(self, tokenizer: Tokenizer, closing: float = 0.6) -> None:
        self.tokenizer, self.closing = tokenizer, closing
        size = tokenizer.vocab_size
        closers = (b'"', b"}", b"]", b'"}', b'"]', b'",', b",", b'":', b":")
        self.closers = np.array([tokenizer.token_bytes(i).strip() in closers for i in range(size)])
        self.ends = np.zeros(size, bool)
        self.ends[list(tokenizer.eos_token_ids)] = True

    def walk(self, factory: ConstraintFactory, seed: int, limit: int = 400) -> tuple[str, bool]:
        """The text and whether it ended by itself."""
        rng, constraint, ids = np.random.default_rng(seed), factory(), []
        while not constraint.finished and len(ids) < limit:
            mask = constraint.allowed_mask()
            assert mask.shape == ((self.tokenizer.vocab_size + 31) // 32,) and mask.dtype == np.int32
            allowed = bits(mask, self.tokenizer.vocab_size)
            assert allowed.any()
            words, can_end = allowed & ~self.ends, (allowed & self.ends).any()
            if can_end and (not words.any() or rng.random() < 0.3):
                constraint.accept(self.tokenizer.eos_token_ids[0])
                assert constraint.finished
                break
            closers = words & self.closers
            pool = np.flatnonzero(closers if closers.any() and rng.random() < self.closing else words)
            token = int(pool[rng.integers(len(pool))])
            constraint.accept(token)
            ids.append(token)
        return self.tokenizer.decode(ids, skip_special_tokens=False), constraint.finished


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def text(length: int = 8, **more: Any) -> dict[str, Any]:
    """A string that a mindless model brings to an end."""
    return {"type": "string", "maxLength": length, **more}


SCHEMAS: dict[str, dict[str, Any]] = {
    # --- single values
    "anything": {},
    "null": {"type": "null"},
    "yes_or_no": {"type": "boolean"},
    "any_number": {"type": "number"},
    "any_integer": {"type": "integer"},
    "percentage": {"type": "integer", "minimum": 0, "maximum": 100},
    "temperature_range": {"type": "number", "minimum": -273.15, "exclusiveMaximum": 1000},
    "probability": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "below_zero": {"type": "integer", "maximum": -1, "minimum": -999},
    "price_in_cents": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 99.99},
    "quarter_hours": {"type": "integer", "multipleOf": 15, "minimum": 0, "maximum": 1440},
    "int32": {"type": "integer", "format": "int32"},
    "int64_bounds": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "short_text": {"type": "string", "minLength": 1, "maxLength": 5},
    "emoji_length": {"type": "string", "minLength": 2, "maxLength": 2},
    "hex_colour": {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
    "plate_zh": {"type": "string", "pattern": "^[京沪粤浙][A-Z]·[0-9A-Z]{5}$"},
    "no_spaces": {"type": "string", "pattern": "^\\S{1,6}$"},
    "one_line": {"type": "string", "pattern": "^.{1,8}$"},
    "version": {"type": "string", "pattern": "^(0|[1-9]\\d{0,2})\\.(0|[1-9]\\d{0,2})\\.(0|[1-9]\\d{0,2})$"},
    "alternatives": {"type": "string", "pattern": "^(GET|PUT)$|^HEAD$"},
    "nullable_text": {"type": ["string", "null"], "maxLength": 6},
    "many_types": {"type": ["integer", "string", "boolean"], "maxLength": 3, "minimum": 5, "maximum": 99},
    # --- formats
    "date": {"type": "string", "format": "date"},
    "moment": closed(at={"type": "string", "format": "date-time"}),
    "opening_time": {"type": "string", "format": "time"},
    "duration": {"type": "string", "format": "duration"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email", "maxLength": 30},
    "hostname": {"type": "string", "format": "hostname", "maxLength": 20},
    "addresses": closed(v4={"type": "string", "format": "ipv4"}, v6={"type": "string", "format": "ipv6"}),
    "link": {"type": "string", "format": "uri", "maxLength": 40},
    "date_of_the_twenties": {"type": "string", "format": "date", "pattern": "^202[0-9]"},
    # --- enums and constants
    "sentiment": {"enum": ["positive", "negative", "neutral"]},
    "sentiment_zh": {"enum": ["正面", "负面", "中性", "无法判断"]},
    "mixed_enum": {"enum": ["a", 1, 2.5, None, True, [1, "二"], {"k": []}, "", "🧑‍🚀"]},
    "typed_enum": {"type": "integer", "enum": [1, 2, 3, "four", 5.5]},
    "large_enum": {"enum": [f"部件-{i:04}" for i in range(3000)]},
    "constant": {"const": {"版本": 2, "tags": ["a", None], "x": {"y": 0.5}}},
    "escapes": {"enum": ['quo"te', "back\\slash", "line\nbreak", "tab\t", "/", "é", "e\u0301", "\u2028"]},
    # --- arrays
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4},
    "empty_list": {"type": "array", "maxItems": 0},
    "three_flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
    "point": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False, "minItems": 2},
    "head_and_rest": {"type": "array", "prefixItems": [{"const": "v1"}], "items": {"type": "integer"}, "minItems": 1,
                      "maxItems": 4},
    "matrix": {"type": "array", "maxItems": 3, "items": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2,
               "maxItems": 2}},
    "long_list_allowed": {"type": "array", "items": {"type": "null"}, "maxItems": 100000},
    # --- objects
    "empty_object": {"type": "object", "additionalProperties": False},
    "any_object": {"type": "object"},
    "person": closed(name=text(), age={"type": "integer", "minimum": 0, "maximum": 150}, member={"type": "boolean"}),
    "person_zh": {
        "type": "object",
        "title": "人员",
        "properties": {
            "姓名": {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "^[\\u4e00-\\u9fa5]+$"},
            "年龄": {"type": "integer", "minimum": 0, "maximum": 150, "description": "周岁"},
            "城市": {"enum": ["北京", "上海", "成都"]},
        },
        "required": ["姓名", "年龄"],
        "additionalProperties": False,
    },
    "odd_keys": closed(**{"": {"type": "null"}, 'a"b\\c': {"type": "null"}, "line\nbreak": {"type": "null"},
                          "🦊 é": {"type": "null"}, "$ref": {"type": "null"}, "type": {"const": "object"}}),
    "optional_all": {"type": "object", "properties": {"a": text(3), "b": {"type": "integer"}, "c": {"type": "null"}},
                     "additionalProperties": False},
    "open_object": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "map_of_scores": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
                      "maxProperties": 3},
    "one_key_at_least": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1,
                         "maxProperties": 2},
    "one_of_the_keys": {"type": "object", "properties": {"id": {"type": "integer"}, "name": text()},
                        "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
    "headers": {"type": "object", "patternProperties": {"^x-[a-z]{1,5}$": text(4)}, "additionalProperties": False,
                "maxProperties": 2},
    "pattern_and_named": {"type": "object", "properties": {"x1": {"minimum": 3}, "y": {"type": "null"}},
                          "patternProperties": {"^x": {"type": "integer"}}, "required": ["x1"],
                          "additionalProperties": {"type": "boolean"}},
    "required_but_not_described": {"type": "object", "required": ["b", "a"], "additionalProperties": text(3)},
    "forbidden_key": {"type": "object", "properties": {"a": {"type": "null"}, "b": False}, "required": ["a"]},
    # --- combinations
    "any_of": {"anyOf": [{"type": "integer"}, text(4), {"type": "null"}]},
    "any_of_with_siblings": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                             "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "additionalProperties": False},
    "one_of_types": {"oneOf": [{"type": "integer"}, text(3), {"type": "array", "maxItems": 0}]},
    "one_of_tagged": {
        "oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/square"}],
        "discriminator": {"propertyName": "shape"},
        "$defs": {
            "circle": closed(shape={"const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0}),
            "square": closed(shape={"const": "square"}, side={"type": "integer", "minimum": 1}),
        },
    },
    "one_of_numbers": {"oneOf": [{"type": "integer", "maximum": -1}, {"type": "integer", "minimum": 10}]},
    "one_of_nullable_ref": closed(parent={"oneOf": [{"$ref": "#/$defs/id"}, {"type": "null"}]})
    | {"$defs": {"id": {"type": "integer", "minimum": 1}}},
    "all_of": {"allOf": [closed(a={"type": "integer"}) | {"additionalProperties": True},
                         {"properties": {"b": {"enum": ["一", "二"]}}, "required": ["b"]}]},
    "all_of_bounds": {"type": "integer", "allOf": [{"minimum": 10}, {"maximum": 40}, {"multipleOf": 4},
                                                   {"multipleOf": 6}]},
    "extends_base": {"$defs": {"base": {"type": "object", "properties": {"id": {"type": "integer"}},
                                        "required": ["id"]}},
                     "allOf": [{"$ref": "#/$defs/base"}], "properties": {"kind": {"const": "dog"}},
                     "required": ["kind"]},
    "closed_before_all_of": {"additionalProperties": False, "allOf": [{"required": ["ab"]}],
                             "patternProperties": {"^a": {"type": "integer"}}, "type": "object"},
    # --- references and recursion
    "definitions": {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"s": {"enum": ["旧"]}},
                    "$ref": "#/definitions/s"},
    "references_zh": {"$defs": {"地 址": closed(街道=text(6))}, "$ref": "#/$defs/地 址"},
    "anchor": {"$defs": {"x": {"$anchor": "tag", "enum": ["t1", "t2"]}}, "type": "array", "maxItems": 2,
               "items": {"$ref": "#tag"}},
    "reference_with_siblings": {"$defs": {"n": {"type": "integer", "minimum": 0}},
                                "type": "object", "properties": {"n": {"$ref": "#/$defs/n", "maximum": 9}},
                                "required": ["n"], "additionalProperties": False},
    "reference_to_property": {"properties": {"a": {"enum": [1, 2]}, "b": {"$ref": "#/properties/a"}},
                              "required": ["a", "b"], "additionalProperties": False},
    "linked_list": {
        "$defs": {"node": closed(v={"enum": [1, 2]}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})},
        "$ref": "#/$defs/node",
    },
    "tree_zh": {
        "type": "object",
        "properties": {"名": {"enum": ["根", "枝", "叶"]},
                       "子": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
        "required": ["名"],
        "additionalProperties": False,
    },
    "expression": {
        "$defs": {
            "value": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"$ref": "#/$defs/sum"}]},
            "sum": closed(op={"enum": ["+", "-"]}, args={"type": "array", "items": {"$ref": "#/$defs/value"},
                                                         "maxItems": 2}),
        },
        "$ref": "#/$defs/value",
    },
    "deep": {"type": "array", "maxItems": 1,
             "items": closed(a=closed(b=closed(c=closed(d=closed(e={"const": "底"})))))},
    # --- as they come
    "function_call": closed(
        name={"const": "search_weather"},
        arguments={"type": "object", "properties": {"city": text(10), "unit": {"enum": ["°C", "°F"]},
                                                    "days": {"type": "integer", "minimum": 1, "maximum": 7}},
                   "required": ["city"], "additionalProperties": False},
    ),
    "article_metadata": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/article",
        "type": "object",
        "properties": {
            "title": text(12, description="as printed", examples=["On Trees"]),
            "authors": {"type": "array", "items": closed(family=text(6), given=text(6)), "minItems": 1, "maxItems": 2},
            "year": {"type": "integer", "minimum": 1400, "maximum": 2100},
            "doi": {"type": "string", "pattern": "^10\\.\\d{4}/[a-z0-9.]{1,8}$", "x-source": "publisher"},
            "open_access": {"type": "boolean", "default": False},
        },
        "required": ["title", "authors", "year"],
        "additionalProperties": False,
    },
    "server_config": {
        "type": "object",
        "properties": {
            "listen": {"type": "object", "properties": {"host": {"type": "string", "format": "ipv4"},
                                                        "port": {"type": "integer", "minimum": 1, "maximum": 65535}},
                       "required": ["port"], "additionalProperties": False},
            "log": {"enum": ["debug", "info", "error"]},
            "limits": {"type": "object", "additionalProperties": {"type": ["integer", "null"], "minimum": 0},
                       "maxProperties": 2},
        },
        "required": ["listen"],
        "additionalProperties": False,
    },
}  # fmt: skip

# keyword, its place, schema
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("not", "#", {"not": {"type": "null"}}),
    ("if", "#", {"if": {"type": "null"}, "then": False, "else": True}),
    ("then", "#/properties/a", {"properties": {"a": {"then": {}}}}),
    ("dependentSchemas", "#", {"type": "object", "dependentSchemas": {"a": {}}}),
    ("dependentRequired", "#", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependencies", "#/items", {"type": "array", "items": {"dependencies": {}}}),
    ("uniqueItems", "#/properties/标签", {"properties": {"标签": {"type": "array", "uniqueItems": True}}}),
    ("contains", "#/anyOf/1", {"anyOf": [{"type": "null"}, {"contains": {}}]}),
    ("minContains", "#", {"type": "array", "minContains": 1}),
    ("maxContains", "#", {"type": "array", "maxContains": 1}),
    ("unevaluatedProperties", "#/$defs/x", {"$defs": {"x": {"unevaluatedProperties": False}}}),
    ("unevaluatedItems", "#", {"type": "array", "unevaluatedItems": False}),
    ("propertyNames", "#/patternProperties/^a~1b~0", {"patternProperties": {"^a/b~": {"propertyNames": {}}}}),
    ("additionalItems", "#", {"type": "array", "additionalItems": False}),
    ("nullable", "#", {"type": "string", "nullable": True}),
    ("contentEncoding", "#", {"type": "string", "contentEncoding": "base64"}),
    ("contentMediaType", "#", {"type": "string", "contentMediaType": "text/html"}),
    ("contentSchema", "#", {"type": "string", "contentSchema": {}}),
    ("$dynamicRef", "#", {"$dynamicRef": "#x"}),
    ("$recursiveRef", "#", {"$recursiveRef": "#"}),
    ("$vocabulary", "#", {"$vocabulary": {}}),
    ("$id", "#/$defs/x", {"$defs": {"x": {"$id": "other"}}}),
    ("$ref", "#", {"$ref": "https://example.org/other.json"}),
    ("$ref", "#/items", {"type": "array", "items": {"$ref": "other.json#/a"}}),
    ("$ref", "#", {"$ref": "#/$defs/none"}),
    ("$ref", "#/items", {"type": "array", "default": {"not": {}}, "items": {"$ref": "#/default"}}),
    ("format", "#/prefixItems/0", {"type": "array", "prefixItems": [{"type": "string", "format": "iri"}]}),
    ("format", "#", {"type": "integer", "format": "date"}),
    ("multipleOf", "#", {"type": "number", "multipleOf": 0.3333333333}),
    ("multipleOf", "#/allOf/0", {"allOf": [{"type": "integer", "multipleOf": 99991}]}),
    ("multipleOf", "#", {"type": "integer", "multipleOf": 0}),
    ("multipleOf", "#", {"allOf": [{"type": "integer", "multipleOf": 4_000_000}, {"multipleOf": 9_765_625}]}),
    ("minProperties", "#", {"type": "object", "minProperties": 3}),
    ("minProperties", "#", {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2}),
    ("maxProperties", "#", {"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}),
    ("oneOf", "#/properties/n", {"properties": {"n": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}),
    ("x-guidance", "#", {"x-guidance": {"lenient": True}}),
    ("maximum", "#", {"type": "integer", "maximum": 9_007_199_254_740_993}),
    ("const", "#", {"const": 12_345_678_901_234_567_890}),
    ("enum", "#", {"enum": [[{"a": 9_007_199_254_740_993}]]}),
    ("exclusiveMinimum", "#", {"type": "integer", "minimum": 3, "exclusiveMinimum": True}),
    ("requred", "#/properties/a", {"properties": {"a": {"requred": []}}}),
]  # fmt: skip


def random_schema(rng: random.Random) -> dict[str, Any]:
    """Keywords thrown together, valid as a schema; most can be held, some contradict themselves."""
    body = _random_part(rng, 0)
    return {"$defs": {"x": _random_part(rng, 2), "y": _random_part(rng, 2)}, **(body if isinstance(body, dict) else {})}


def _random_part(rng: random.Random, depth: int) -> Any:
    if depth > 3 or rng.random() < 0.35:
        return _random_value(rng)
    kind = rng.choice(["object", "object", "object", "array", "union", "union", "reference"])
    if kind == "reference":
        beside = _random_part(rng, depth + 1) if rng.random() < 0.3 else {}
        return {"$ref": rng.choice(["#/$defs/x", "#/$defs/y"]), **(beside if isinstance(beside, dict) else {})}
    if kind == "union":
        beside = _random_part(rng, depth + 1) if rng.random() < 0.5 else {}
        parts = [_random_part(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        found = {**(beside if isinstance(beside, dict) else {}), rng.choice(["anyOf", "allOf", "oneOf"]): parts}
    elif kind == "array":
        found = {"type": "array", "maxItems": rng.randint(1, 4)}
        if rng.random() < 0.6:
            found["items"] = _random_part(rng, depth + 1)
        if rng.random() < 0.4:
            found["prefixItems"] = [_random_part(rng, depth + 1) for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.3:
            found["minItems"] = 1
    else:
        names = rng.sample(["a", "b", "ab", "c", "中"], rng.randint(0, 3))
        found = {"type": "object", "properties": {name: _random_part(rng, depth + 1) for name in names}}
        if rng.random() < 0.7:
            found["required"] = [name for name in names if rng.random() < 0.6] + ["z"] * (rng.random() < 0.1)
        if (more := rng.random()) < 0.6:
            found["additionalProperties"] = False if more < 0.4 else _random_part(rng, depth + 1)
        if rng.random() < 0.25:
            found["patternProperties"] = {rng.choice(["^a", "^x", "b$", "^[中]+$"]): _random_part(rng, depth + 1)}
        if rng.random() < 0.1:
            found["maxProperties"] = rng.randint(1, 4)
        if rng.random() < 0.15:
            del found["type"]
    items = list(found.items())
    if rng.random() < 0.3:
        rng.shuffle(items)
    return dict(items)


def _random_value(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-20, 20)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 30)},
            {"type": "number", "exclusiveMinimum": rng.choice([0, -1, 0.5]), "maximum": rng.choice([1, 2.5])},
            {"type": "integer", "multipleOf": rng.choice([2, 3, 5])},
            {"type": "number"},
            {"type": "string", "maxLength": rng.randint(1, 5)},
            {"type": "string", "pattern": rng.choice(["^a", "b$", "^[ab]{1,3}$", "\\S"])},
            {"type": "boolean"},
            {"type": "null"},
            {"type": rng.sample(["string", "integer", "null", "array", "object"], 2)},
            {"enum": rng.sample([1, 2, "a", "b", None, True, "中", [1], {"a": 1}], rng.randint(1, 4))},
            {"const": rng.choice([1, "a", {"a": 1}, [True]])},
            {"minimum": rng.randint(0, 5)},
            {"maxLength": 2},
            {},
        ]
    )
