"""Constrained output: whatever the model wants to say, what comes out has the form, and ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from bimo.engine.constrain import ConstraintFactory, choice, grammar, json_object, json_schema, regex
from bimo.errors import EngineError, UsageError
from bimo.tokenizer.load import Tokenizer
from tests.tokenizer.tiny import byte_level_metadata, load, sentencepiece_metadata


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_metadata(), tmp_path_factory.mktemp("byte"))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(sentencepiece_metadata(), tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(smollm2_dir)


def bits(mask: np.ndarray, size: int) -> np.ndarray:
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


SCHEMAS: dict[str, dict[str, Any]] = {
    "record": {
        "type": "object",
        "properties": {
            "名字": {"type": "string", "maxLength": 12},
            "年龄": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["🎉", "好", "ok", 3, None]}, "maxItems": 3},
            "ok": {"type": "boolean"},
        },
        "required": ["名字", "年龄", "ok"],
        "additionalProperties": False,
    },
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4},
    "emoji": {"anyOf": [{"type": "null"}, {"properties": {"k": {"const": "🧑‍🚀"}}, "required": ["k"], "type": "object",
              "additionalProperties": False}]},
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "pattern": {"type": "string", "pattern": "^\\d{3}-[一-龥]{2}$"},
    "length": {"type": "string", "minLength": 2, "maxLength": 5},
    "range": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7},
    "tuple": {"type": "array", "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "boolean"}], "items": False,
              "minItems": 2},
    "prefixes": {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False,
                 "maxProperties": 2},
    "both": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                       {"properties": {"b": {"enum": ["一", "二"]}}, "required": ["b"]}],
             "additionalProperties": True},
    "types": {"type": ["string", "null"], "maxLength": 4},
    "time": {"type": "string", "format": "time"},
    "moment": {"type": "object", "properties": {"t": {"type": "string", "format": "date-time"}}, "required": ["t"],
               "additionalProperties": False},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "old": {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"s": {"enum": ["旧"]}},
            "$ref": "#/definitions/s"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_json_satisfies_its_schema(tiny: Tokenizer, spm: Tokenizer, name: str) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for tokenizer in (tiny, spm):
        factory, walker, ended = json_schema(tokenizer, schema), Walker(tokenizer), 0
        for seed in range(12):
            text, finished = walker.walk(factory, seed)
            if finished:
                ended += 1
                validator.validate(json.loads(text))
        assert ended >= 6, f"only {ended} of 12 walks ended"


@pytest.mark.parametrize("name", ["record", "tree", "emoji", "moment"])
def test_on_the_real_vocabulary(smollm2: Tokenizer, name: str) -> None:
    validator = jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True)
    factory, walker = json_schema(smollm2, SCHEMAS[name]), Walker(smollm2)
    results = [walker.walk(factory, seed) for seed in range(6)]
    assert any(finished for _, finished in results)
    for text, finished in results:
        if finished:
            validator.validate(json.loads(text))


def test_any_object(tiny: Tokenizer) -> None:
    factory, walker = json_object(tiny), Walker(tiny)
    objects = [json.loads(text) for text, finished in (walker.walk(factory, seed) for seed in range(12)) if finished]
    assert len(objects) > 6 and all(isinstance(value, dict) for value in objects)
    assert any(objects)


def follow(tokenizer: Tokenizer, factory: ConstraintFactory, text: str) -> str:
    """ "refused", "open" (more must follow), "complete" (the end may follow) or "finished" (only the end may)."""
    constraint = factory()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if constraint.finished or not bits(constraint.allowed_mask(), tokenizer.vocab_size)[token]:
            return "refused"
        constraint.accept(token)
    if constraint.finished:
        return "finished"
    return "complete" if bits(constraint.allowed_mask(), tokenizer.vocab_size)[2] else "open"


def test_whitespace_is_bounded(tiny: Tokenizer) -> None:
    factory = json_schema(tiny, SCHEMAS["numbers"] | {"items": {"type": "integer"}})
    assert follow(tiny, factory, "[1,2]") == "finished"
    assert follow(tiny, factory, "[1, 2]") == "finished"
    assert follow(tiny, factory, "[\n    1,\n    2\n]") == "finished"
    assert follow(tiny, factory, "[\n" + " " * 16 + "1]") == "finished"
    assert follow(tiny, factory, "[\n" + " " * 17 + "1]") == "refused"
    assert follow(tiny, factory, "[\n\n1]") == "refused"
    assert follow(tiny, factory, "[1]\n") == "refused"
    assert follow(tiny, factory, " [1]") == "refused"


def test_a_model_in_love_with_whitespace_still_answers(tiny: Tokenizer) -> None:
    """vllm#38696: at each step take whitespace if it is allowed."""
    constraint, ids = json_schema(tiny, SCHEMAS["record"])(), []
    blank = np.array([bool(tiny.token_bytes(i)) and not tiny.token_bytes(i).strip() for i in range(tiny.vocab_size)])
    walker = Walker(tiny, closing=1.0)
    rng = np.random.default_rng(0)
    while not constraint.finished and len(ids) < 2000:
        allowed = bits(constraint.allowed_mask(), tiny.vocab_size)
        inside = tiny.decode(ids).count('"') % 2  # spaces inside strings are text
        pool = np.flatnonzero(allowed & blank) if not inside and (allowed & blank).any() else None
        if pool is None:
            pool = (
                np.flatnonzero(allowed & walker.closers)
                if (allowed & walker.closers).any()
                else np.flatnonzero(allowed)
            )
        ids.append(int(pool[rng.integers(len(pool))]))
        constraint.accept(ids[-1])
    assert constraint.finished
    jsonschema_rs.validator_for(SCHEMAS["record"]).validate(json.loads(tiny.decode(ids)))


def test_the_end_is_allowed_at_the_end_only(tiny: Tokenizer) -> None:
    factory = json_schema(tiny, {"type": "integer"})
    assert follow(tiny, factory, "") == "open"
    assert follow(tiny, factory, "-") == "open"
    assert follow(tiny, factory, "12") == "complete"
    constraint = json_schema(tiny, SCHEMAS["numbers"])()
    for token in tiny.encode("[1]"):
        assert not bits(constraint.allowed_mask(), tiny.vocab_size)[list(tiny.special_ids)].any()
        constraint.accept(token)
    assert constraint.finished
    assert set(np.flatnonzero(bits(constraint.allowed_mask(), tiny.vocab_size))) == set(tiny.eos_token_ids)


def test_control_tokens_never_pass_as_text(tiny: Tokenizer) -> None:
    constraint = regex(tiny, "(?s).*")()
    allowed = bits(constraint.allowed_mask(), tiny.vocab_size)
    assert set(np.flatnonzero(allowed[[0, 1, 2]])) == {0, 2}  # <|im_start|> is neither text nor an end
    assert allowed[tiny.backend.token_to_id("<think>")]


def test_copies_are_independent(tiny: Tokenizer) -> None:
    factory = choice(tiny, ["甲乙", "甲丙"])
    one, two = factory(), factory()
    for token in tiny.encode("甲乙"):
        one.accept(token)
    assert one.finished and not two.finished
    before = two.allowed_mask()
    before[:] = 0  # a mask is the caller's to change
    for token in tiny.encode("甲丙"):
        two.accept(token)
    assert two.finished


def test_a_token_outside_the_form_is_an_engine_error(tiny: Tokenizer) -> None:
    constraint = regex(tiny, "[0-9]+")()
    with pytest.raises(EngineError, match="constraint"):
        constraint.accept(tiny.encode("x")[0])


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[0-9]{2}", r"[一-龥]{2,4}🎉?", r"(yes|no|是|否)!*", r"(?i)a b\.", "^a+b$"]
)
def test_finished_text_matches_its_regex(tiny: Tokenizer, spm: Tokenizer, pattern: str) -> None:
    for tokenizer in (tiny, spm):
        factory, walker = regex(tokenizer, pattern), Walker(tokenizer)
        for seed in range(8):
            text, finished = walker.walk(factory, seed, limit=60)
            assert not finished or re.fullmatch(pattern, text), text


def test_a_grammar(tiny: Tokenizer) -> None:
    factory = grammar(tiny, 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]{1,2}/ | "(" sum ")" | "圆周率"')
    assert follow(tiny, factory, "1+(23+圆周率)") == "complete"
    assert follow(tiny, factory, "1+") == "open"
    assert follow(tiny, factory, "1+(2))") == "refused"


def test_a_choice(tiny: Tokenizer) -> None:
    choices = ["是", "否", "🧑‍🚀", 'quo"te\\', "line\nbreak", "a", "ab", "<|im_end|>"]
    factory, walker = choice(tiny, choices), Walker(tiny)
    texts = {text for text, finished in (walker.walk(factory, seed) for seed in range(80)) if finished}
    assert texts == set(choices)
    assert follow(tiny, factory, "a") == "complete"
    assert follow(tiny, choice(tiny, [f"选{i:04}" for i in range(4000)]), "选3999") == "finished"


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a\u0301 é", " leading", "</s>你好", "▁", "\ufffd🎉", "the the", "<0x41>"]
)
def test_forced_text_comes_out_as_it_is(tmp_path: Path, spm: Tokenizer, tiny: Tokenizer, text: str) -> None:
    composing = load(byte_level_metadata() | {"tokenizer.ggml.pre": "qwen2"}, tmp_path)
    for tokenizer in (tiny, spm, composing):
        for seed in range(3):
            written, finished = Walker(tokenizer).walk(json_schema(tokenizer, {"const": text}), seed)
            assert finished and json.loads(written) == text
            written, finished = Walker(tokenizer).walk(choice(tokenizer, [text + "!", text + "?"]), seed)
            assert finished and written.strip() in (text.strip() + "!", text.strip() + "?")


# --- refusals ------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"not": {}}, '"not" at \\$,'),
        ({"type": "object", "properties": {"a": {"if": {}}}}, r'"if" at \$\.properties\.a'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "object", "propertyNames": {}}, '"propertyNames"'),
        ({"anyOf": [{"type": "null"}, {"contains": {}}]}, r'"contains" at \$\.anyOf\[1\]'),
        ({"$defs": {"x": {"unevaluatedProperties": False}}}, '"unevaluatedProperties"'),
        ({"type": "string", "contentEncoding": "base64"}, '"contentEncoding"'),
        ({"requred": ["a"]}, '"requred".*spelling'),
        ({"x-guidance": {"lenient": True}}, '"x-guidance"'),
        ({"type": "string", "nullable": True}, '"nullable".*"null"'),
        ({"items": [{}]}, 'use "prefixItems"'),
        ({"type": "string", "format": "banana"}, "banana"),
        ({"type": "foo"}, "foo"),
        ({"$ref": "http://example.com/schema"}, "only \"#...\" can be resolved"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "empty"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, '"oneOf".*"anyOf"'),
        ({"type": "string", "pattern": "["}, "unclosed character class"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "array", "items": {"type": "string", "pattern": "a{1000}{1000}"}}, "too complex"),
        ({"enum": [f"v{i}" for i in range(30_000)]}, "more than 20000 values"),
        ({"properties": {f"p{i}": {} for i in range(3000)}}, "more than 2000 properties"),
        (nested(60), "nested more than 100 levels"),
        (nested(100_000), "nested more than 100 levels"),
        ({"const": float("nan")}, "float"),
        ({"title": "\ud800"}, "lone surrogate"),
        ({"properties": [1]}, "must be an object"),
        ({"anyOf": {}}, "must be a list"),
        ({"allOf": [3]}, "where a schema is expected"),
        ("{}", "must be an object"),
        (None, "must be an object"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_guaranteed_are_refused(tiny: Tokenizer, schema: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        json_schema(tiny, schema)
    assert caught.value.param == "response_format"
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("make", "argument", "match"),
    [
        (regex, "", "is empty"),
        (regex, "[", "unclosed"),
        (regex, "(a)\\1", "backreferences"),
        (regex, "a{1000}{1000}", "too complex"),
        (regex, "[^\\s\\S]", "no text satisfies it"),
        (regex, "\ud800", "lone surrogate"),
        (regex, "x" * 300_000, "at most 200000"),
        (regex, 3, "expected text"),
        (grammar, "start: 无", "cannot be used"),
        (grammar, "start: foo", "foo"),
        (grammar, "begin: 'a'", "cannot be used"),
        (grammar, 'start: start "a"', "no text satisfies it"),
        (choice, [], "at least one"),
        (choice, "abc", "needs a list"),
        (choice, ["a", ""], "must not be empty"),
        (choice, [1], "expected text"),
        (choice, ["a"] * 10_001, "at most 10000"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny: Tokenizer, make: Callable[..., Any], argument: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        make(tiny, argument, param="structured_outputs")
    assert caught.value.param == "structured_outputs"
    assert "\n" not in str(caught.value)


def test_harmless_keywords_are_accepted(tiny: Tokenizer) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "题",
        "properties": {"a": {"type": "string", "description": "d", "default": "x", "x-order": 1, "examples": ["y"]}},
        "required": ["a"],
    }
    text, finished = Walker(tiny).walk(json_schema(tiny, schema), 1)
    assert finished and isinstance(json.loads(text)["a"], str)  # an object, though the schema forgot to say so


def test_a_model_without_an_end_is_refused(tiny: Tokenizer) -> None:
    endless = Tokenizer(tiny.backend, directory=tiny.directory)
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        json_object(endless)
