"""Answers that must have a form: JSON, a JSON schema, a regular expression, a grammar, one of several choices.

    factory = json_schema(tokenizer, {"type": "object", ...})      # compiled once; UsageError for what cannot be held
    Request(..., constraint=factory)                               # each sequence gets its own copy

Before each token, llguidance (Rust, no torch; derivatives of regular expressions and an Earley parser over the
vocabulary's prefix tree) says which tokens keep the answer inside the form. The end-of-sequence ids are allowed
where, and only where, the answer is complete, so every answer that ends by itself satisfies the form; one cut off by
max_tokens may not.

What can go wrong with constrained output, and what is done about it here:
  endless whitespace      between JSON tokens at most one line break and 16 spaces (`WHITESPACE`)
  a keyword is ignored    every schema keyword is either enforced or refused by name
  hostile patterns        sizes are bounded, and a probe of the first tokens must succeed within the lexer's budget
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from bimo.engine.request import Constraint
from bimo.errors import EngineError, UsageError
from bimo.tokenizer.load import Tokenizer, check_text

if TYPE_CHECKING:
    import tokenizers
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["WHITESPACE", "ConstraintFactory", "choice", "grammar", "json_object", "json_schema", "regex"]

ConstraintFactory = Callable[[], Constraint]

# What a person would write between two JSON tokens: nothing, a space, or a line break and an indentation.
WHITESPACE = r"(?: |\n {0,16}|\n\t{0,8})"

MAX_DEPTH = 100  # nesting of a schema as JSON; llguidance's own parser stops at 128
MAX_NODES = 20_000  # JSON values in a schema
MAX_PROPERTIES = 2_000  # of one object; the compiler's time grows with the square
MAX_TEXT = 200_000  # characters of a regex or grammar
MAX_CHOICES = 10_000

# JSON Schema (draft 2020-12) by what is done with each keyword. A keyword in none of these is refused.
# fmt: off
_ENFORCED = frozenset({
    "type", "enum", "const", "$ref", "$defs", "definitions", "anyOf", "oneOf", "allOf",
    "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})
_ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$anchor", "title", "description", "default", "example", "examples",
    "deprecated", "readOnly", "writeOnly", "discriminator",
})
# fmt: on
# The library's idea of these formats includes second 60, which no calendar library reads, and small t and z.
_TIME = r"[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-][0-9:]+)$"
_STRICTER = {"time": f"^{_TIME}", "date-time": f"^[0-9-]+T{_TIME}"}
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties")


class _MatcherConstraint:
    """A `Constraint`: one sequence's place in a compiled grammar."""

    __slots__ = ("_ends", "_matcher", "_words")

    def __init__(self, matcher: LLMatcher, words: int, ends: np.ndarray) -> None:
        self._matcher = matcher
        self._words = words
        self._ends = ends  # mask of the end-of-sequence ids

    def allowed_mask(self) -> np.ndarray:
        """int32 (ceil(vocab_size/32),), bit i % 32 of word i // 32 is 1 where token i may come next.

        Never empty: where nothing else may follow, the end-of-sequence ids may. Ids beyond the tokenizer's
        vocabulary (padding of the embedding) are not covered and never allowed. Raises EngineError when the grammar
        turns out to need more work than one step may cost.
        """
        if self._matcher.is_stopped():
            self._check()
            return self._ends.copy()
        mask = np.empty(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by a token that was allowed. Raises EngineError for one that was not."""
        if not self._matcher.consume_token(token_id):
            self._check()
            raise EngineError(f"token {token_id} is outside the constraint's grammar")

    @property
    def finished(self) -> bool:
        """True once nothing but the end may follow, or the end was accepted."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"the constraint cannot be followed further: {_sentence(self._matcher.get_error())}")


class _Vocabulary:
    """A tokenizer as llguidance wants it: every token's bytes, and the ids that end an answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLTokenizer

        if not tokenizer.eos_token_ids:
            raise UsageError("this model has no end-of-sequence token, so a constrained answer could not end")
        self.words = (tokenizer.vocab_size + 31) // 32
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        bits[list(tokenizer.eos_token_ids)] = 1
        self.ends = np.packbits(bits, bitorder="little").view(np.int32)
        wrapper = _Wrapper(tokenizer)
        self.tokenizer: LLTokenizer = LLTokenizer(wrapper, eos_token=list(tokenizer.eos_token_ids))  # type: ignore[arg-type]


class _Wrapper:
    """The object llguidance reads a vocabulary from; must not refer to the Tokenizer, which keys the cache.

    Calling it gives the tokens of a text the grammar forces. They must spell exactly that text, as text: no space in
    front, no normalisation, no control token that happens to be spelled so.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i, skip_special_tokens=False) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | set(tokenizer.eos_token_ids))
        self._special = frozenset(self.special_token_ids)
        self._backend: tokenizers.Tokenizer = tokenizer.backend
        self._by_bytes: dict[bytes, int] = {}

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        data = text.encode() if isinstance(text, str) else text
        for lead in ("", "\n"):  # SentencePiece puts a space in front of a text, but none behind a line break
            ids = self._backend.encode(lead + plain, add_special_tokens=False).ids
            front = self._backend.encode(lead, add_special_tokens=False).ids
            rest = ids[len(front) :]
            exact = ids[: len(front)] == front and b"".join(self.tokens[i] for i in rest) == data
            if exact and self._special.isdisjoint(rest):
                return rest
        return self._longest_matches(data)

    def _longest_matches(self, data: bytes) -> list[int]:
        """Tokens that spell `data`, each as long as possible."""
        if not self._by_bytes:
            self._by_bytes = {text: i for i, text in enumerate(self.tokens) if text and i not in self._special}
            self._longest = max(map(len, self._by_bytes))
        ids, place = [], 0
        while place < len(data):
            ends = range(min(len(data), place + self._longest), place, -1)
            end = next((end for end in ends if data[place:end] in self._by_bytes), None)
            if end is None:
                break  # the vocabulary lacks this byte; llguidance goes on without the rest
            ids.append(self._by_bytes[data[place:end]])
            place = end
        return ids


_vocabularies: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    """Built once for a tokenizer; about 0.1 s for 50,000 tokens."""
    if tokenizer not in _vocabularies:
        _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return _vocabularies[tokenizer]


def json_object(tokenizer: Tokenizer, *, param: str = "response_format") -> ConstraintFactory:
    """Any JSON object (`response_format: {"type": "json_object"}`)."""
    return json_schema(tokenizer, {"type": "object"}, param=param)


def json_schema(
    tokenizer: Tokenizer, schema: Mapping[str, Any], *, param: str = "response_format"
) -> ConstraintFactory:
    """JSON that satisfies a JSON schema (draft 2020-12), properties in the schema's order.

    Raises UsageError naming `param` for keywords that could not be guaranteed (`not`, `if`, `uniqueItems`, ...),
    contradictions, references outside the schema, and schemas beyond the limits above.
    """
    from llguidance import LLMatcher

    patterns = _check_schema(schema, param)
    for pattern in patterns:  # deep inside a schema, the probe in `_compile` would not meet them
        matcher = _matcher(_vocabulary(tokenizer), LLMatcher.grammar_from_regex(pattern))
        if (reason := _probe(matcher, _vocabulary(tokenizer))) and _too_complex(reason):
            raise UsageError(
                f"the pattern {pattern!r:.80} of the JSON schema cannot be used: {_sentence(reason)}", param
            )
    plain = _stricter({key: value for key, value in schema.items() if key != "$schema"})
    if "type" not in plain and plain.keys() & {"properties", "required", "additionalProperties"}:
        plain["type"] = "object"  # what is meant, though any other type would satisfy the letter
    options = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
    try:
        text = json.dumps(plain, allow_nan=False)
        source = LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"the JSON schema cannot be used: {_sentence(str(error))}", param) from error
    return _compile(tokenizer, source, "the JSON schema", param)


def regex(tokenizer: Tokenizer, pattern: str, *, param: str = "response_format") -> ConstraintFactory:
    """Text that matches a regular expression as a whole (Rust syntax: no look-around, no back-references)."""
    from llguidance import LLMatcher

    _check_size(pattern, "the regular expression", param)
    return _compile(tokenizer, LLMatcher.grammar_from_regex(pattern), "the regular expression", param)


def grammar(tokenizer: Tokenizer, lark: str, *, param: str = "response_format") -> ConstraintFactory:
    """Text of a context-free grammar in llguidance's dialect of Lark; its first rule is `start`."""
    from llguidance import LLMatcher

    _check_size(lark, "the grammar", param)
    return _compile(tokenizer, LLMatcher.grammar_from_lark(lark), "the grammar", param)


def choice(tokenizer: Tokenizer, choices: Sequence[str], *, param: str = "response_format") -> ConstraintFactory:
    """Exactly one of the given texts."""
    from llguidance import LLMatcher

    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise UsageError("a choice needs a list of at least one text", param)
    if len(choices) > MAX_CHOICES:
        raise UsageError(f"a choice has at most {MAX_CHOICES} texts, got {len(choices)}", param)
    for text in choices:
        check_text(text, param)
        if not text:
            raise UsageError("the texts of a choice must not be empty", param)
    # JSON's string syntax is Lark's. One terminal, not one rule an alternative: the lexer shares their prefixes.
    literals = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(choices))
    _check_size(literals, "the choice", param)
    return _compile(tokenizer, LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {literals}"), "the choice", param)


def _compile(tokenizer: Tokenizer, source: str, what: str, param: str) -> ConstraintFactory:
    """Compile a grammar and try its first two tokens, so that what cannot work fails here and not in a batch."""
    vocabulary = _vocabulary(tokenizer)
    matcher = _matcher(vocabulary, source)
    if reason := _probe(matcher, vocabulary):
        raise UsageError(f"{what} cannot be used: {_sentence(reason)}", param)

    def factory() -> Constraint:
        return _MatcherConstraint(matcher.deep_copy(), vocabulary.words, vocabulary.ends)

    return factory


def _matcher(vocabulary: _Vocabulary, source: str) -> LLMatcher:
    """Never raises: a grammar that does not compile gives a matcher in the error state."""
    from llguidance import LLMatcher, LLParserLimits

    # The defaults allow 250,000 lexer states of 1-2 kB each, and half a second for a single mask.
    limits = LLParserLimits(initial_lexer_fuel=400_000, max_lexer_states=20_000, verbose_errors=False)
    return LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=limits)


def _probe(matcher: LLMatcher, vocabulary: _Vocabulary) -> str:
    """What is wrong with a fresh matcher, as the library says it; "" when its first two masks can be made."""
    if matcher.is_error():
        return matcher.get_error()
    mask = np.empty(vocabulary.words, dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
        return matcher.get_error()
    allowed = np.flatnonzero(np.unpackbits((mask & ~vocabulary.ends).view(np.uint8), bitorder="little"))
    if not allowed.size:
        return "" if matcher.is_accepting() else "NoExtension"
    probe = matcher.deep_copy()
    probe.consume_token(int(allowed[-1]))
    if not probe.is_stopped():
        probe.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return probe.get_error()


def _too_complex(message: str) -> bool:
    return any(sign in message for sign in ("too many", "too big", "too large", "limit", "max is"))


def _sentence(message: str) -> str:
    """The library's report, of many lines, as one sentence."""
    lines = [line.strip() for line in message.splitlines()] or ["unknown reason"]
    if "NoExtension" in lines[0]:
        return "no text satisfies it"
    if _too_complex(lines[0]):
        return f"it is too complex ({lines[0].split(';')[0]}): make it smaller"
    if lines[0].startswith("oneOf"):
        return '"oneOf" needs branches that exclude each other (by a const property, for instance): use "anyOf"'
    reason = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), "")
    return f"{lines[0]} {reason}".strip()[:300]


def _check_size(text: str, what: str, param: str) -> None:
    check_text(text, param)
    if not text.strip():
        raise UsageError(f"{what} is empty", param)
    if len(text) > MAX_TEXT:
        raise UsageError(f"{what} has {len(text)} characters; at most {MAX_TEXT} are accepted", param)


def _check_schema(schema: Any, param: str) -> list[str]:
    """Bound the schema's size, make sure that every keyword in it is enforced or harmless; returns its patterns."""
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema must be an object, not {type(schema).__name__}", param)
    nodes: list[tuple[Any, int]] = [(schema, 1)]
    count = 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise UsageError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep: make it flatter", param)
        if count > MAX_NODES:
            raise UsageError(f"the JSON schema has more than {MAX_NODES} values: make it smaller", param)
        if isinstance(node, str):
            check_text(node, param)
        elif isinstance(node, Mapping):
            nodes.extend((value, depth + 1) for pair in node.items() for value in pair)
        elif isinstance(node, list | tuple):
            nodes.extend((value, depth + 1) for value in node)
    places: list[tuple[str, Any]] = [("$", schema)]
    patterns: list[str] = []
    while places:
        where, node = places.pop()
        if isinstance(node, Mapping):
            _check_keywords(where, node, param)
            places.extend(_subschemas(where, node, param))
            patterns += [node["pattern"]] if isinstance(node.get("pattern"), str) else []
            patterns += node.get("patternProperties", ())
        elif not isinstance(node, bool):
            raise UsageError(f"the JSON schema has {node!r:.60} at {where}, where a schema is expected", param)
    return list(dict.fromkeys(patterns))


def _stricter(node: Any) -> Any:
    """A copy of a checked schema in which loosely read formats have a pattern too."""
    if isinstance(node, list | tuple):
        return [_stricter(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    copy: dict[str, Any] = {}
    for key, value in node.items():
        if key in _NAMED_SCHEMAS:
            copy[key] = {name: _stricter(entry) for name, entry in value.items()}
        else:
            copy[key] = _stricter(value) if key in _SCHEMAS or key in _SCHEMA_LISTS else value
    if isinstance(kind := copy.get("format"), str) and kind in _STRICTER:
        copy.setdefault("pattern", _STRICTER[kind])
    return copy


def _check_keywords(where: str, node: Mapping[str, Any], param: str) -> None:
    for key, value in node.items():
        if key in _ENFORCED or key in _ANNOTATIONS or (key.startswith("x-") and key != "x-guidance"):
            continue
        if key == "nullable" and value is False:
            continue
        mend = {
            "nullable": 'write "type": [..., "null"] instead',
            "additionalItems": 'use "prefixItems" and "items"',
            "dependencies": "list the combinations with anyOf",
            "dependentRequired": "list the combinations with anyOf",
        }.get(key, "remove it, or check its spelling")
        raise UsageError(f'the JSON schema uses "{key}" at {where}, which cannot be guaranteed: {mend}', param)
    if isinstance(node.get("items"), list):
        raise UsageError(f'the JSON schema has a list as "items" at {where}: use "prefixItems"', param)
    reference = node.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise UsageError(f'the JSON schema refers to {reference!r:.80} at {where}; only "#..." can be resolved', param)
    if isinstance(node.get("properties"), Mapping) and len(node["properties"]) > MAX_PROPERTIES:
        raise UsageError(f"the JSON schema has more than {MAX_PROPERTIES} properties at {where}", param)


def _subschemas(where: str, node: Mapping[str, Any], param: str) -> list[tuple[str, Any]]:
    """Every schema directly inside a schema, with its place."""
    found = [(f"{where}.{key}", node[key]) for key in _SCHEMAS if key in node]
    for key in _NAMED_SCHEMAS:
        if key in node:
            if not isinstance(node[key], Mapping):
                raise UsageError(f'"{key}" at {where} of the JSON schema must be an object', param)
            found += [(f"{where}.{key}.{name}", value) for name, value in node[key].items()]
    for key in _SCHEMA_LISTS:
        if key in node:
            if not isinstance(node[key], list | tuple):
                raise UsageError(f'"{key}" at {where} of the JSON schema must be a list', param)
            found += [(f"{where}.{key}[{place}]", value) for place, value in enumerate(node[key])]
    return found
