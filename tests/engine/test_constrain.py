"""Constrained output: whatever the model wants to say, what comes out has the form, and ends."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from bimo.engine import constrain
from bimo.engine.constrain import ConstraintFactory, choice, grammar, json_object, json_schema, regex
from bimo.errors import EngineError, UsageError
from bimo.tokenizer.load import Tokenizer
from tests.engine.schemas import SCHEMAS, Walker, bits
from tests.tokenizer.tiny import byte_level_metadata, load, sentencepiece_metadata


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_level_metadata(), tmp_path_factory.mktemp("byte"))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(sentencepiece_metadata(), tmp_path_factory.mktemp("spm"))


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
    factory = json_schema(tiny, SCHEMAS["numbers"])
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
    constraint, ids = json_schema(tiny, SCHEMAS["person_zh"])(), []
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
    jsonschema_rs.validator_for(SCHEMAS["person_zh"]).validate(json.loads(tiny.decode(ids)))


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


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "number"}, "-12.5e-10 123456789012345678 0.12345678901234", "1e999 1e-100 1234567890123456789"),
        ({"type": "number"}, "1.5E+99 12345678901234.5", "0.1234567890123456 123456789012345.5"),
        ({"type": "number", "exclusiveMaximum": 1}, "0.99999999999999", "0.99999999999999999999"),
        ({"type": "number", "exclusiveMinimum": 0}, "0.00000000000001 0.000000000000001", "0." + "0" * 40 + "1"),
        ({"type": "integer", "maximum": 2**63 - 1}, "0 999999999999999999", "9223372036854775807"),
        ({"const": 0.00000000000000000025}, "0.00000000000000000025", "0"),
        ({"type": "array", "items": {"type": "integer"}}, "[111111111111111111,222222222222222222]", "[1e5]"),
        ({"type": "string"}, '"1e9999" "\\"1234567890123456789012345678901234567890"', "1e9999"),
        ({"type": "object"}, '{"1234567890123456789012345":{"a":[1e99,"1e999"]}}', '{"a":1e999}'),
    ],
)
def test_numbers_keep_to_what_every_reader_takes_exactly(tiny: Tokenizer, schema: Any, right: str, wrong: str) -> None:
    factory = json_schema(tiny, schema)
    for text in right.split():
        assert follow(tiny, factory, text) in ("complete", "finished"), text
    for text in wrong.split():
        assert follow(tiny, factory, text) not in ("complete", "finished"), text


@pytest.mark.parametrize("digit", ["0", "3", "9"])
@pytest.mark.parametrize("schema", [{"type": "number"}, {"type": "number", "exclusiveMinimum": 0}, {"type": "integer"}])
def test_a_model_in_love_with_one_digit_still_answers(tiny: Tokenizer, schema: dict[str, Any], digit: str) -> None:
    constraint, ids = json_schema(tiny, schema)(), []
    favourite = np.array([bool(tiny.token_bytes(i)) and set(tiny.token_bytes(i)) <= set(digit.encode())
                          for i in range(tiny.vocab_size)])  # fmt: skip
    point, size = tiny.encode("."), tiny.vocab_size
    while not constraint.finished:
        allowed = bits(constraint.allowed_mask(), size)
        choices = np.flatnonzero(allowed & favourite)
        if ids == tiny.encode("0") and allowed[point[0]]:
            choices = np.array(point)
        if not choices.size and allowed[2]:
            break
        ids.append(int(choices[0]) if choices.size else int(np.flatnonzero(allowed)[0]))
        constraint.accept(ids[-1])
        assert len(ids) < 30, "no end in sight"
    jsonschema_rs.validator_for(schema).validate(json.loads(tiny.decode(ids)))


def test_a_key_has_one_spelling(tiny: Tokenizer) -> None:
    factory = json_schema(tiny, {"properties": {"a": {"type": "integer"}, "中\n": {"type": "null"}}})
    assert follow(tiny, factory, '{"a":1,"b":"x"}') == "finished"
    assert follow(tiny, factory, '{"中\\n":null}') == "finished"
    for key in ("\\u0061", "\\u4e2d\\n", "中\\u000a"):
        assert follow(tiny, factory, f'{{"{key}":"x"}}') == "refused"
    for text in ("\\u0001", "\\ud800", "\\/"):
        assert follow(tiny, json_schema(tiny, {"type": "string"}), f'"{text}"') == "refused"


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("^.$", ["a", "中", "🦊"], ["\n", "\r", "\u2028", ""]),
        ("^\\s$", [" ", "\u3000", "\ufeff"], ["\u0085", "a"]),
        ("^\\S$", ["\u0085", "中"], ["\ufeff", " "]),
        ("^[\\S]$", ["x", "中"], ["\ufeff", "\n"]),
        ("^[^\\s]$", ["x"], ["\ufeff", "\n"]),
        ("^\\d\\w$", ["1a", "0_"], ["٣a", "1é"]),
        ("^[[:alpha:]]$", ["[]", ":]", "a]"], ["b", "b]", "x"]),
        ("^[a&&b]$", ["&", "a", "b"], ["&&"]),
        ("^[+--]$", ["+", ",", "-"], ["."]),
        ("^[\\]\\[]$", ["[", "]"], ["\\"]),
        ("^a[^]$", ["ab", "a\n"], ["a"]),
        ("a|^b", ["xa", "bx"], ["xb"]),
        ("^[\\u4e00-\\u9fa5]{2}$", ["中文"], ["ab", "中"]),
        ("b\\.", ["ab.c"], ["bc"]),
    ],
)
def test_patterns_mean_what_javascript_means(tiny: Tokenizer, pattern: str, right: list[str], wrong: list[str]) -> None:
    factory = json_schema(tiny, {"type": "string", "pattern": pattern})
    for text in right:
        assert follow(tiny, factory, json.dumps(text, ensure_ascii=False)) in ("complete", "finished"), text
    for text in wrong:
        assert follow(tiny, factory, json.dumps(text, ensure_ascii=False)) in ("open", "refused"), text


def test_forced_tokens(tiny: Tokenizer) -> None:
    name = {"type": "object", "properties": {"姓名": {"type": "string"}}, "required": ["姓名"]}
    constraint, text = json_schema(tiny, name)(), '{"姓名'
    for token in tiny.encode('{"'):
        constraint.accept(token)
    forced = constraint.forced()
    assert forced and ('{"' + tiny.decode(forced)).startswith(text[:3])
    for token in forced:  # they are drafts, and may be taken one by one
        assert bits(constraint.allowed_mask(), tiny.vocab_size)[token]
        constraint.accept(token)
    free = regex(tiny, "(?s).*")()
    assert free.forced() == []
    free.accept(tiny.eos_token_ids[0])
    assert free.finished and free.forced() == []


# --- compiled once -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What llguidance was asked to compile."""
    sources: list[str] = []
    real = constrain._matcher

    def counted(vocabulary: Any, source: str, **more: Any) -> Any:
        sources.append(source)
        return real(vocabulary, source, **more)

    monkeypatch.setattr(constrain, "_matcher", counted)
    return sources


def test_the_same_form_is_compiled_once(tmp_path: Path, compiled: list[str]) -> None:
    tokenizer = load(byte_level_metadata(), tmp_path)
    for _ in range(3):
        json_schema(tokenizer, {"properties": {"a": {"const": 1}, "b": {}}})
        json_schema(tokenizer, json.loads('{ "properties" : {"a":{"const":1},\n"b":{}} }'))
        regex(tokenizer, "[0-9]+"), grammar(tokenizer, 'start: "[0-9]+"'), choice(tokenizer, ["[0-9]+"])
        json_object(tokenizer), json_schema(tokenizer, {"type": "object"})
    assert len(compiled) == 5
    json_schema(tokenizer, {"properties": {"b": {}, "a": {"const": 1}}})  # answers follow the order of properties
    json_schema(tokenizer, {"properties": {"a": {"const": True}, "b": {}}})
    assert len(compiled) == 7
    one, two = regex(tokenizer, "[0-9]+")(), regex(tokenizer, "[0-9]+")()
    one.accept(tokenizer.encode("1")[0])
    assert not bits(two.allowed_mask(), tokenizer.vocab_size)[2]  # two has no digit yet
    other = load(byte_level_metadata(), tmp_path / "other")
    json_object(other)
    assert len(compiled) == 8


def test_only_so_many_forms_are_kept(tmp_path: Path, compiled: list[str]) -> None:
    tokenizer = load(byte_level_metadata(), tmp_path)
    for i in range(constrain.MAX_KEPT + 1):
        regex(tokenizer, f"a{{{i + 1}}}")
        regex(tokenizer, "a{1}")  # used again and again, so it stays
    assert len(compiled) == constrain.MAX_KEPT + 1
    regex(tokenizer, "a{3}")
    assert len(compiled) == constrain.MAX_KEPT + 1
    regex(tokenizer, "a{2}")  # was the first to go
    assert len(compiled) == constrain.MAX_KEPT + 2


def test_what_fails_is_not_kept(tmp_path: Path, compiled: list[str]) -> None:
    tokenizer = load(byte_level_metadata(), tmp_path)
    for count in (1, 2):
        with pytest.raises(UsageError):
            regex(tokenizer, "[")
        assert len(compiled) == count


def test_threads_share_one_compilation(tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(byte_level_metadata(), tmp_path)
    texts, failures = set(), []
    started = threading.Barrier(8)
    real = constrain._probe
    monkeypatch.setattr(constrain, "_probe", lambda *args: (threading.Event().wait(0.05), real(*args))[1])

    def work(number: int) -> None:
        started.wait()
        factory = choice(tokenizer, ["是", "否"])
        with pytest.raises(UsageError, match="unclosed") as caught:
            regex(tokenizer, "[")
        failures.append(caught.value)
        texts.update(Walker(tokenizer).walk(factory, seed)[0] for seed in range(number, number + 4))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert texts == {"是", "否"} and len(failures) == 8
    assert sum('"是"' in source for source in compiled) == 1


# --- refusals ------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"not": {}}, '"not" at #,'),
        ({"type": "object", "properties": {"a": {"if": {}}}}, '"if" at #/properties/a, .*anyOf'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "object", "propertyNames": {}}, '"propertyNames"'),
        ({"anyOf": [{"type": "null"}, {"contains": {}}]}, '"contains" at #/anyOf/1'),
        ({"$defs": {"x": {"unevaluatedProperties": False}}}, '"unevaluatedProperties"'),
        ({"type": "string", "contentEncoding": "base64"}, '"contentEncoding"'),
        ({"requred": ["a"]}, '"requred".*spelling'),
        ({"x-guidance": {"lenient": True}}, '"x-guidance"'),
        ({"type": "string", "nullable": True}, '"nullable".*"null"'),
        ({"items": [{}]}, 'use "prefixItems"'),
        ({"type": "string", "format": "banana"}, "banana"),
        ({"type": "foo"}, "foo"),
        ({"$ref": "http://example.com/schema"}, "not a schema inside this one"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "#"}, "no finite text"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "empty"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, '"oneOf" at #, .*"anyOf"'),
        ({"type": "string", "pattern": "["}, "unclosed character class"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "array", "items": {"type": "string", "pattern": "a{1000}{1000}"}}, "too complex"),
        ({"enum": [f"v{i}" for i in range(30_000)]}, "more than 20000 values"),
        ({"properties": {f"p{i}": {} for i in range(3000)}}, "more than 2000 properties"),
        (nested(60), "nested more than 100 levels"),
        (nested(100_000), "nested more than 100 levels"),
        ({"const": float("nan")}, "float"),
        ({"title": "\ud800"}, "lone surrogate"),
        ({"properties": [1]}, "where an object is expected"),
        ({"anyOf": {}}, "where a list of schemas is expected"),
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
        (regex, "x" * 300_000, "at most 10000"),
        (grammar, "start: " + "x" * 300_000, "at most 30000"),
        (choice, ["x" * 300_000], "at most 200000"),
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
