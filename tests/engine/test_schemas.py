"""Every answer that ends satisfies its JSON schema; what could not be guaranteed is refused by name and place.

`schemas.py` has the schemas, and a model without a mind that finds what a real one would need years for.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from bimo.engine import constrain
from bimo.engine.constrain import choice, grammar, json_object, json_schema, regex
from bimo.engine.request import Request, SamplingParams
from bimo.engine.schema_logic import SchemaLogic
from bimo.errors import UsageError
from bimo.tokenizer.load import Tokenizer
from tests.engine.conftest import Answer, MakeEngine, run
from tests.engine.schemas import REFUSED, SCHEMAS, Walker, random_schema
from tests.tokenizer.tiny import byte_level_metadata, load, sentencepiece_metadata

PROMPTS = ["Describe it as JSON:", "用 JSON 描述：", "🦊 {"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [
        load(byte_level_metadata(), tmp_path_factory.mktemp("byte")),
        load(sentencepiece_metadata(), tmp_path_factory.mktemp("spm")),
    ]


def check(schema: dict[str, Any], text: str) -> None:
    """The text is JSON and satisfies the schema, formats included."""
    schema = json.loads(json.dumps(schema).replace("#/$defs/\\u5730 \\u5740", "#/$defs/%E5%9C%B0%20%E5%9D%80"))
    jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(text))


# --- without a model -----------------------------------------------------------------------------------------------


def test_the_list_is_long_enough() -> None:
    assert len(SCHEMAS) >= 50
    kinds = json.dumps(list(SCHEMAS.values()))
    for keyword in ("enum", "const", "anyOf", "oneOf", "allOf", "$ref", "patternProperties", "prefixItems", "format"):
        assert f'"{keyword}"' in kinds


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_satisfies_its_schema(tokenizers: list[Tokenizer], name: str) -> None:
    for tokenizer in tokenizers:
        factory, walker = json_schema(tokenizer, SCHEMAS[name]), Walker(tokenizer)
        ended = [text for text, finished in (walker.walk(factory, seed) for seed in range(12)) if finished]
        for text in ended:
            check(SCHEMAS[name], text)
        assert len(ended) >= 6, f"only {len(ended)} of 12 walks ended"


@pytest.mark.parametrize("seed", range(8))
def test_keywords_thrown_together(tokenizers: list[Tokenizer], seed: int) -> None:
    """Found by this: types narrowed inside a oneOf, definitions that only refer to themselves."""
    rng, walker, held, ended = random.Random(seed), Walker(tokenizers[0]), 0, 0
    for _ in range(60):
        schema = random_schema(rng)
        try:
            factory = json_schema(tokenizers[0], schema)
        except UsageError:
            continue
        held += 1
        for walk in range(2):
            text, finished = walker.walk(factory, walk, limit=200)
            if finished:
                ended += 1
                check(schema, text)
    assert held >= 20 and ended >= held


# --- in the engine -------------------------------------------------------------------------------------------------


def constrained(engine: Any, name: str, seed: int, **sampling: Any) -> Request:
    """A request for an answer of this form; the random model is given some love for tokens that end things."""
    closers = {
        i: 4.0 for i in range(engine.tokenizer.vocab_size) if engine.tokenizer.token_bytes(i) in (b'"', b"}", b"]")
    }
    settings = {"max_tokens": 120, "temperature": 1.5, "seed": seed, "logit_bias": closers} | sampling
    return Request(
        prompt_token_ids=engine.tokenizer.encode(PROMPTS[seed % len(PROMPTS)]),
        sampling=SamplingParams(**settings),
        constraint=json_schema(engine.tokenizer, SCHEMAS[name]),
    )


def free(engine: Any, seed: int) -> Request:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
    return Request(prompt_token_ids=engine.tokenizer.encode(PROMPTS[seed % len(PROMPTS)]), sampling=sampling)


def check_answer(engine: Any, name: str, answer: Answer, max_tokens: int = 120) -> None:
    (text,), (tokens,), (reason,) = answer.text, answer.tokens, answer.reasons
    if reason == "stop":
        check(SCHEMAS[name], text)
    else:  # cut off: said so, and not a token too many
        assert reason == "length" and len(tokens) == max_tokens
    words = [token for token in tokens if token not in engine.tokenizer.eos_token_ids]
    whole = engine.tokenizer.decode(words)
    # half a character at the end is one replacement character, streamed or whole
    assert text == whole, "streamed and whole answers differ"
    outside = re.sub(r'"(\\.|[^"\\])*"?', '""', text)
    assert not re.search(r"\n\s*\n|[ \t]{17}", outside), "endless whitespace"


def test_all_schemas_in_batches_with_free_answers(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=2048, max_batch=16)
    names = list(SCHEMAS)
    requests = [constrained(engine, name, seed) for seed, name in enumerate(names)]
    others = [free(engine, seed) for seed in range(12)]
    mixed = [request for i, shaped in enumerate(requests) for request in (shaped, *others[i // 7 : (i + 1) // 7])]
    found = dict(zip((r.request_id for r in mixed), run(engine, mixed), strict=True))
    for name, request in zip(names, requests, strict=True):
        check_answer(engine, name, found[request.request_id])
    assert sum(found[r.request_id].reasons == ["stop"] for r in requests) > len(names) // 2
    alone = run(make_engine(), others)
    for request, answer in zip(others, alone, strict=True):
        if request.request_id in found:
            assert found[request.request_id].tokens == answer.tokens, "a free answer noticed its neighbours' forms"


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_the_same_alone_and_in_a_batch(make_engine: MakeEngine, temperature: float) -> None:
    names = ["person_zh", "tree_zh", "numbers", "headers", "one_of_tagged", "email", "odd_keys", "large_enum"]
    engine = make_engine(num_blocks=512, max_batch=12)

    def requests() -> list[Request]:
        return [constrained(engine, name, i, temperature=temperature, n=2) for i, name in enumerate(names)]

    together = run(engine, [request for i, shaped in enumerate(requests()) for request in (shaped, free(engine, i))])
    for request, answer in zip(requests(), together[::2], strict=True):
        (alone,) = run(make_engine(num_blocks=512), [request])
        assert alone.tokens == answer.tokens and alone.text == answer.text
        assert alone.reasons == answer.reasons


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_drafts_change_no_form(make_engine: MakeEngine, temperature: float) -> None:
    """Several tokens of one step are each asked of the form, also where a draft would leave it."""
    prompt = '[[0, 1], [0, 1], [0, 1], [1, 0], [0, 1]] [["根", "枝", "根", "枝"]] ' * 2
    form = {"type": "array", "items": SCHEMAS["matrix"] | {"maxItems": 4}, "minItems": 3, "maxItems": 12}
    answers = []
    for speculation in ("ngram", "off"):
        engine = make_engine(num_blocks=512, speculation=speculation)
        sampling = SamplingParams(max_tokens=150, temperature=temperature, seed=5, n=1 if temperature == 0 else 4)
        factory = json_schema(engine.tokenizer, form)
        request = Request(prompt_token_ids=engine.tokenizer.encode(prompt), sampling=sampling, constraint=factory)
        (answer,) = run(engine, [request])
        assert bool(engine.stats.drafted_tokens) == (speculation == "ngram")
        for text, reason in zip(answer.text, answer.reasons, strict=True):
            if reason == "stop":
                check(form, text)
        answers.append((answer.tokens, answer.text, answer.reasons))
    assert answers[0] == answers[1]


def test_an_answer_that_is_cut_off_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for limit in (1, 5, 30):
        (answer,) = run(engine, [constrained(engine, "odd_keys", limit, max_tokens=limit)])
        assert answer.reasons == ["length"] and len(answer.tokens[0]) == limit
        check_answer(engine, "odd_keys", answer, limit)


def test_neither_penalties_nor_stop_strings_break_a_form(make_engine: MakeEngine) -> None:
    engine = make_engine()
    settings: list[dict[str, Any]] = [
        {"frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 1.5},
        {"top_k": 1}, {"top_p": 0.1}, {"min_tokens": 60}, {"ignore_eos": True}, {"logprobs": 3},
    ]  # fmt: skip
    for i, more in enumerate(settings):
        (answer,) = run(engine, [constrained(engine, "person", i, **more)])
        check_answer(engine, "person", answer)
    (stopped,) = run(engine, [constrained(engine, "person", 1, stop=("age",))])
    assert stopped.reasons == ["stop"] and stopped.stops == ["age"] and '"age"'[:1] in stopped.text[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("person", "Ada is 36 years old and a member. Write it as JSON."),
        ("person_zh", "李小明今年二十岁，住在成都。请用 JSON 写出姓名、年龄和城市。"),
        ("article_metadata", "Give the metadata of a book by Jane Austen as JSON."),
        ("function_call", "What will the weather be in 北京 for three days, in °C? Call the function."),
        ("sentiment_zh", "这家餐厅太好吃了！评价是什么？"),
        ("tree_zh", "画一棵小树，用 JSON。"),
        ("any_object", "Describe a fox in JSON."),
        ("moment", "When did the moon landing happen? JSON with a date-time."),
    ],
)
def test_the_real_model(smollm2_dir: Path, name: str, question: str) -> None:
    import bimo

    with bimo.load(str(smollm2_dir), kv_cache_tokens=8192) as model:
        form = json_schema(model.tokenizer, SCHEMAS[name])
        answers = [model.chat(question, constraint=form, temperature=0, max_tokens=300)]
        answers += model.chat(question, constraint=form, temperature=1, max_tokens=300, seed=1, n=4)
        streamed = "".join(
            model.stream([{"role": "user", "content": question}], constraint=form, temperature=0, max_tokens=300)
        )
    assert streamed == answers[0].text
    for answer in answers:
        assert answer.finish_reason in ("stop", "length")
        if answer.finish_reason == "stop":
            check(SCHEMAS[name], answer.text)
    assert any(answer.finish_reason == "stop" for answer in answers)


# --- refused, by name and place ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keyword", "place", "schema"), REFUSED, ids=[f"{k} {p}" for k, p, _ in REFUSED])
def test_what_cannot_be_guaranteed_is_refused_by_name(
    tokenizers: list[Tokenizer], keyword: str, place: str, schema: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as caught:
        json_schema(tokenizers[0], schema, param="tools")
    message = str(caught.value)
    assert f'"{keyword}"' in message and re.search(rf"at {re.escape(place)}, ", message), message
    assert caught.value.param == "tools" and "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"type": "string", "minLength": 5, "maxLength": 2}, 'at #, "minLength" 5 exceeds "maxLength" 2'),
        ({"type": "array", "minItems": 2, "maxItems": 1}, '"minItems" 2 exceeds "maxItems" 1'),
        ({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}}, "at #/properties/a, .*minimum"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "no number between"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "no number between"),
        ({"type": "integer", "minimum": 8, "maximum": 13, "multipleOf": 7}, "no number between"),
        ({"type": "object", "maxProperties": 1, "required": ["a", "b"]}, '"maxProperties" 1'),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False, "minProperties": 2}, "minProp"),
        ({"type": "object", "additionalProperties": False, "required": ["a"]}, "at #: .*'a'"),
        ({"items": {"allOf": [{"type": "string"}, {"type": "null"}]}, "minItems": 1}, "required item is unsatisfiable"),
        ({"type": "string", "enum": [1]}, "incompatible"),
        ({"enum": []}, 'has "enum": \\[\\] at #, .*not empty'),
        ({"anyOf": [{"enum": [1]}, {"enum": []}]}, "at #/anyOf/1, .*not empty"),
        ({"anyOf": []}, "a list of schemas"),
        ({"type": []}, "a type or a list of types"),
        ({"type": "string", "minLength": -1}, "a whole number from 0"),
        ({"type": "string", "maxLength": 10**12}, "a whole number from 0"),
        ({"type": "integer", "minimum": "3"}, "a number"),
        ({"required": "a"}, "a list of names"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "at #, since it always requires itself"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no finite text"),
        ({"properties": {"a": {"pattern": "a(?=b)", "type": "string"}}}, "pattern 'a\\(\\?=b\\)' at #/properties/a"),
        ({"patternProperties": {"^a": {}, "b$": {}}}, "at #: .*not disjoint"),
        ({"properties": {"a" * 500: {"not": {}}}}, "aaa\\.\\.\\.aaa"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tokenizers: list[Tokenizer], schema: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        json_schema(tokenizers[0], schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def nested(depth: int, key: str = "a") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {key: schema}}
    return schema


def doubling(depth: int, word: str) -> dict[str, Any]:
    steps = {f"d{i}": {word: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": steps | {f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def chain(length: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    steps = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": steps | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


CHOICES = [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(20)]
TAGS = {"anyOf": [{"type": "object", "properties": {"t": {"const": i}}, "required": ["t"]} for i in range(16)]}
HOSTILE: dict[str, tuple[Callable[..., Any], Any]] = {
    "a megabyte": (json_schema, {"description": "x" * 1_000_000}),
    "a thousand deep": (json_schema, nested(1000)),
    "deep with long names": (json_schema, nested(45, "n" * 10_000)),
    "an enum of 100,000": (json_schema, {"enum": [f"v{i}" for i in range(100_000)]}),
    "a list in a constant": (json_schema, {"const": [0] * 1_000_000}),
    "2^20 ways": (json_schema, {"type": "object", "allOf": CHOICES}),
    "2^30 conjunctions": (json_schema, doubling(30, "allOf")),
    "2^30 alternatives": (json_schema, doubling(30, "anyOf")),
    "2^30 exclusive ones": (json_schema, doubling(30, "oneOf")),
    "64 exclusive unions": (json_schema, {"oneOf": [{"allOf": [TAGS] * 8, "title": str(i)} for i in range(64)]}),
    "2^30 places": (json_schema, doubling(30, "prefixItems")),
    "a chain of references": (json_schema, chain(4000, lambda ref: ref)),
    "a chain of lists": (json_schema, chain(3000, lambda ref: {"items": ref})),
    "a chain of objects": (json_schema, chain(2400, lambda ref: {"properties": {"a": ref}, "required": ["a"]})),
    "a chain of unions": (json_schema, chain(2400, lambda ref: {"anyOf": [ref, {}]})),
    "a chain of conjunctions": (json_schema, chain(2400, lambda ref: {"allOf": [ref], "minLength": 1})),
    "1,001 patterns": (json_schema, {"anyOf": [{"type": "string", "pattern": f"^{i}$"} for i in range(1001)]}),
    "patterns that explode": (json_schema, {"anyOf": [{"type": "string", "pattern": f"^((x{{99}}){{99}}){{99}}{i}$"}
                                                      for i in range(90)]}),
    "5,000 properties": (json_schema, {"properties": {f"p{i}": {} for i in range(5000)}}),
    "a billion items": (json_schema, {"type": "array", "minItems": 10**9, "items": {"type": "null"}}),
    "a remainder too many": (json_schema, {"type": "integer", "multipleOf": 1_000_003}),
    "an unknown keyword of 100 kB": (json_schema, {"p" * 100_000: 1}),
    "a number of 5,000 digits": (json_schema, {"const": 10**5000}),
    "a tiny bound": (json_schema, {"type": "number", "minimum": 1e-300}),
    "nested quantifiers": (regex, "(((((x{10}){10}){10}){10}){10}){10}"),
    "a catastrophe elsewhere": (regex, "(a|a)*(a|aa)*(.*a){20}b"),
    "50,000 parentheses": (regex, "(" * 50_000 + ")" * 50_000),
    "30,000 optional letters": (regex, "a?" * 30_000 + "a" * 30_000),
    "as many as are accepted": (regex, "a?" * 3_300 + "a" * 3_300),
    "optional letters in a schema": (json_schema, {"type": "string", "pattern": "a?" * 5_000 + "a" * 5_000}),
    "counted optional letters": (json_schema, {"items": {"type": "string", "pattern": "^(a?){300}a{300}$"}}),
    "optional rules": (grammar, "start: " + "a? " * 9_000 + '\na: "x"'),
    "a schema in a grammar": (grammar, "start: %json " + json.dumps(chain(600, lambda ref: {"items": ref}))),
    "a grammar that doubles": (grammar, "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40))
                               + '\na40: "x"'),
    "a terminal that doubles": (grammar, "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40))
                                + '\nA40: "x"'),
    "ambiguity": (grammar, 'start: s\ns: s s | "a" | s s s'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_cost_little(tokenizers: list[Tokenizer], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Refused in a sentence, or held; by a bounded number of compilations, each with bounded fuel."""
    spent: list[int] = []
    real = constrain._matcher

    def counted(vocabulary: Any, source: str, *, fuel: int = constrain.FUEL) -> Any:
        spent.append(fuel)
        return real(vocabulary, source, fuel=fuel)

    monkeypatch.setattr(constrain, "_matcher", counted)
    make, argument = HOSTILE[name]
    try:
        factory = make(tokenizers[0], argument)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        Walker(tokenizers[0]).walk(factory, 0, limit=20)
    assert sum(spent) <= 3 * constrain.FUEL + 2 * 100 * constrain.PATTERN_FUEL


def test_the_whole_schema_is_bounded_before_it_is_compiled(
    tokenizers: list[Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain, "_matcher", None)  # would fail
    for name in (
        "a megabyte",
        "a thousand deep",
        "an enum of 100,000",
        "1,001 patterns",
        "5,000 properties",
        "optional letters in a schema",
    ):
        with pytest.raises(UsageError, match="more than"):
            json_schema(tokenizers[0], HOSTILE[name][1])


# --- what follows from a schema ------------------------------------------------------------------------------------

TAGGED = [{"properties": {"k": {"const": k}}, "required": ["k"]} for k in ("a", "b")]


@pytest.mark.parametrize(
    ("schema", "exclusive"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, True),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, False),
        ({"oneOf": [{"const": 1}, {"enum": [2, "一"]}]}, True),
        ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, False),
        ({"oneOf": [{"const": "a"}, {"type": "integer"}]}, True),
        ({"oneOf": TAGGED}, False),  # 5 satisfies both: they say nothing about numbers
        ({"type": "object", "oneOf": TAGGED}, True),
        ({"allOf": [{"type": "object"}], "oneOf": TAGGED}, True),
        ({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, False),
        ({"type": "object", "oneOf": [{"required": ["a"]}, {"properties": {"a": False}}]}, True),
        ({"oneOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 5}]}, False),
        ({"oneOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 4}]}, True),
        ({"oneOf": [{"anyOf": [{"type": "null"}, {"type": "integer"}]}, {"type": "string"}]}, True),
        ({"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 4}]}, False),  # not seen
        ({"oneOf": [True, False]}, True),
        ({"items": {"oneOf": [{"type": "null"}]}}, True),
    ],
)  # fmt: skip
def test_exclusive_branches(schema: dict[str, Any], exclusive: bool) -> None:
    assert (SchemaLogic(schema, lambda reference: None).overlapping() is None) == exclusive


def test_forms_beside_schemas(make_engine: MakeEngine) -> None:
    """A regex, a grammar, a choice, any object and free text in one batch."""
    engine = make_engine(num_blocks=512)
    tokenizer = engine.tokenizer
    forms: list[tuple[Any, Callable[[str], bool]]] = [
        (regex(tokenizer, "[一-龥]{2,3}!?"), lambda text: bool(re.fullmatch("[一-龥]{2,3}!?", text))),
        (grammar(tokenizer, 'start: "选" ("甲"|"乙")+ "。"'), lambda text: bool(re.fullmatch("选[甲乙]+。", text))),
        (choice(tokenizer, ["是", "否"]), lambda text: text in ("是", "否")),
        (json_object(tokenizer), lambda text: isinstance(json.loads(text), dict)),
        (None, lambda text: True),
    ]
    requests = [
        Request(
            prompt_token_ids=tokenizer.encode(PROMPTS[1]),
            sampling=SamplingParams(max_tokens=60, temperature=1.5, seed=3),
            constraint=form,
        )
        for form, _ in forms
    ]
    for (_, fits), answer in zip(forms, run(engine, requests), strict=True):
        assert answer.reasons == ["length"] or fits(answer.text[0])
