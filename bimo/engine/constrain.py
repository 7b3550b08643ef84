"""Answers that must have a form: JSON, a JSON schema, a regular expression, a grammar, one of several choices.

    factory = json_schema(tokenizer, {"type": "object", ...})      # compiled once; UsageError for what cannot be held
    Request(..., constraint=factory)                               # each sequence gets its own copy

Before each token, llguidance (Rust, no torch; derivatives of regular expressions and an Earley parser over the
vocabulary's prefix tree) says which tokens keep the answer inside the form. The end-of-sequence ids are allowed
where, and only where, the answer is complete, so every answer that ends by itself satisfies the form; one cut off by
max_tokens may not.

What can go wrong with constrained output, and what is done about it here:
  endless whitespace      between JSON tokens at most one line break and 16 spaces (`WHITESPACE`)
  endless numbers         18 digits, or 15 with a point (vocabulary.py)
  two spellings of a key  no \\uXXXX in JSON texts, so that "\\u0061" is not another "a"
  a keyword is ignored    every schema keyword is either enforced or refused by name (json_schema.py)
  hostile patterns        sizes are bounded, and a probe of the first tokens must succeed within the lexer's budget
  the same form again     compiled forms are kept, the last `MAX_KEPT` of them for each tokenizer
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from bimo.engine.json_schema import ReadySchema, canonical, prepare
from bimo.engine.request import Constraint
from bimo.engine.vocabulary import START, Place, Vocabulary, follow, vocabulary_of
from bimo.errors import EngineError, UsageError
from bimo.tokenizer.load import Tokenizer, check_text

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["WHITESPACE", "ConstraintFactory", "choice", "grammar", "json_object", "json_schema", "regex"]

ConstraintFactory = Callable[[], Constraint]

# What a person would write between two JSON tokens: nothing, a space, or a line break and an indentation.
WHITESPACE = r"(?: |\n {0,16}|\n\t{0,8})"
# No u: llguidance would let other keys be spelled like the named ones, and read neither as the other.
ESCAPES = 'nrbtf\\"'

# Characters: "a?" n times and "a" n times take time and memory that grow with the square of n.
MAX_REGEX = 10_000
MAX_GRAMMAR = 30_000
MAX_CHOICE = 200_000
MAX_CHOICES = 10_000
FUEL = 400_000  # steps of llguidance's lexer to build a form: under a second
PATTERN_FUEL = 50_000  # the same for one of many patterns
STACK = 128 << 20  # bytes; the longest chains that pass the limits of json_schema.py take about 60 MB
MAX_KEPT = 32  # compiled forms for each tokenizer; the largest that pass the limits take about 5 MB each


class _MatcherConstraint:
    """A `Constraint`: one sequence's place in a compiled grammar."""

    __slots__ = ("_address", "_mask", "_matcher", "_place", "_vocabulary")

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, place: Place | None) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._place = place  # in a JSON text; None for other forms
        self._mask = np.empty(vocabulary.words, dtype=np.int32)
        self._address = self._mask.ctypes.data  # asking for it costs as much as the mask, between two steps of a model

    def allowed_mask(self) -> np.ndarray:
        """int32 (ceil(vocab_size/32),), bit i % 32 of word i // 32 is 1 where token i may come next.

        Never empty: where nothing else may follow, the end-of-sequence ids may. Ids beyond the tokenizer's
        vocabulary (padding of the embedding) are not covered and never allowed. The array may be changed, and is
        overwritten by the next call. Raises EngineError when the grammar turns out to need more work than one step
        may cost.
        """
        if self._matcher.is_stopped():
            self._check()
            return self._vocabulary.ends.copy()
        mask = self._mask
        self._matcher.unsafe_compute_mask_ptr(self._address, mask.nbytes)
        self._check()
        if self._place is not None and (sensible := self._vocabulary.sensible_numbers(self._place)) is not None:
            for fewer in (sensible, self._vocabulary.not_zeros):
                if (some := mask & fewer).any():
                    return some
        return mask

    def forced(self) -> list[int]:
        """Tokens the form leaves no choice about, spelled as the tokenizer would: good drafts. Often none."""
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def accept(self, token_id: int) -> None:
        """Advance by a token that was allowed. Raises EngineError for one that was not."""
        if not self._matcher.consume_token(token_id):
            self._check()
            raise EngineError(f"token {token_id} is outside the constraint's grammar")
        if self._place is not None and token_id not in self._vocabulary.end_ids:
            self._place = follow(self._place, self._vocabulary.tokens[token_id])

    @property
    def finished(self) -> bool:
        """True once nothing but the end may follow, or the end was accepted."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"the constraint cannot be followed further: {_sentence(self._matcher.get_error())}")


class _Kept:
    """Factories by what they were compiled from, the most recently used `MAX_KEPT`.

    Threads that ask for the same form wait for one compilation; different forms are compiled side by side. What fails
    is not kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: OrderedDict[str, Future[ConstraintFactory]] = OrderedDict()

    def get(self, name: str, build: Callable[[], ConstraintFactory]) -> ConstraintFactory:
        with self._lock:
            future = self._futures.get(name)
            if missing := future is None:
                future = self._futures[name] = Future()
            self._futures.move_to_end(name)
            while len(self._futures) > MAX_KEPT:
                self._futures.popitem(last=False)
        if missing:
            try:
                future.set_result(build())
            except BaseException as error:
                with self._lock:
                    self._futures.pop(name, None)
                future.set_exception(error)
        return future.result()


_stack_lock = threading.Lock()  # the size is the whole process's setting
_kept: WeakKeyDictionary[Tokenizer, _Kept] = WeakKeyDictionary()


def _compiled(
    tokenizer: Tokenizer, text: str, what: str, param: str, build: Callable[[Vocabulary], ConstraintFactory]
) -> ConstraintFactory:
    """The factory for `text`, of the kind `what`, from those kept or from `build`."""
    vocabulary = vocabulary_of(tokenizer)

    def building() -> ConstraintFactory:
        return _on_a_large_stack(lambda: build(vocabulary))

    name = hashlib.sha256(f"{what}\0{param}\0{text}".encode()).hexdigest()
    return _kept.setdefault(tokenizer, _Kept()).get(name, building)


def _on_a_large_stack(work: Callable[[], ConstraintFactory]) -> ConstraintFactory:
    """Call it in a thread of its own: llguidance follows references by recursion, about 6 kB for each level, and a
    chain of some thousand of them would overflow the usual 8 MB and kill the process. Unused stack costs nothing."""
    future: Future[ConstraintFactory] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    with _stack_lock:
        usual = threading.stack_size(STACK)
        try:
            threading.Thread(target=run, name="bimo-compile", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return future.result()


def json_object(tokenizer: Tokenizer, *, param: str = "response_format") -> ConstraintFactory:
    """Any JSON object (`response_format: {"type": "json_object"}`)."""
    return json_schema(tokenizer, {"type": "object"}, param=param)


def json_schema(
    tokenizer: Tokenizer, schema: Mapping[str, Any], *, param: str = "response_format"
) -> ConstraintFactory:
    """JSON that satisfies a JSON schema (draft 2020-12), properties in the schema's order.

    Raises UsageError naming `param`, the keyword and its place for what could not be guaranteed (`not`, `if`,
    `uniqueItems`, ...), for contradictions, references outside the schema, and schemas beyond the limits.
    """
    text = canonical(schema, param)

    def build(vocabulary: Vocabulary) -> ConstraintFactory:
        ready = prepare(text, param)
        _try_patterns(vocabulary, ready, param)
        matcher = _matcher(vocabulary, _schema_source(ready.schema))
        if reason := _probe(matcher, vocabulary):
            raise UsageError(f"the JSON schema cannot be used{_place_of(ready, reason)}: {_sentence(reason)}", param)
        return lambda: _MatcherConstraint(matcher.deep_copy(), vocabulary, START)

    return _compiled(tokenizer, text, "the JSON schema", param, build)


def regex(tokenizer: Tokenizer, pattern: str, *, param: str = "response_format") -> ConstraintFactory:
    """Text that matches a regular expression as a whole (Rust syntax: no look-around, no back-references)."""
    from llguidance import LLMatcher

    source_of = LLMatcher.grammar_from_regex
    return _text_form(tokenizer, pattern, source_of, "the regular expression", param, MAX_REGEX)


def grammar(tokenizer: Tokenizer, lark: str, *, param: str = "response_format") -> ConstraintFactory:
    """Text of a context-free grammar in llguidance's dialect of Lark; its first rule is `start`."""
    from llguidance import LLMatcher

    return _text_form(tokenizer, lark, LLMatcher.grammar_from_lark, "the grammar", param, MAX_GRAMMAR)


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
    lark = f"start: CHOICE\nCHOICE: {literals}"
    return _text_form(tokenizer, lark, LLMatcher.grammar_from_lark, "the choice", param, MAX_CHOICE)


def _text_form(
    tokenizer: Tokenizer, text: str, source_of: Callable[[str], str], what: str, param: str, limit: int
) -> ConstraintFactory:
    """A form given as one text; tried here, so that what cannot work fails before it is in a batch."""
    check_text(text, param)
    if not text.strip():
        raise UsageError(f"{what} is empty", param)
    if len(text) > limit:
        raise UsageError(f"{what} has {len(text)} characters; at most {limit} are accepted", param)

    def build(vocabulary: Vocabulary) -> ConstraintFactory:
        matcher = _matcher(vocabulary, source_of(text))
        if reason := _probe(matcher, vocabulary):
            raise UsageError(f"{what} cannot be used: {_sentence(reason)}", param)
        return lambda: _MatcherConstraint(matcher.deep_copy(), vocabulary, None)

    return _compiled(tokenizer, text, what, param, build)


def _schema_source(schema: Mapping[str, Any]) -> str:
    """A prepared schema in llguidance's words."""
    from llguidance import LLMatcher

    options = {
        "whitespace_pattern": WHITESPACE,
        "json_allowed_escapes": ESCAPES,
        "lenient": False,
        "coerce_one_of": True,  # proven to mean anyOf
    }
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)  # type: ignore[arg-type]


def _matcher(vocabulary: Vocabulary, source: str, *, fuel: int = FUEL) -> LLMatcher:
    """Never raises: a grammar that does not compile gives a matcher in the error state."""
    from llguidance import LLMatcher, LLParserLimits

    # The defaults allow 250,000 lexer states of 1-2 kB each, and half a second for a single mask.
    limits = LLParserLimits(initial_lexer_fuel=fuel, max_lexer_states=20_000, verbose_errors=False)
    return LLMatcher(vocabulary.index, source, log_level=0, limits=limits)


def _probe(matcher: LLMatcher, vocabulary: Vocabulary) -> str:
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


def _try_patterns(vocabulary: Vocabulary, ready: ReadySchema, param: str) -> None:
    """UsageError for a pattern that cannot be followed; deep inside a schema `_probe` would not meet it.

    Tried all at once, because one may take half a second to be found too complex; one by one only to name it.
    """
    patterns = list(ready.patterns)
    if not patterns or not _wrong_pattern(vocabulary, patterns, FUEL):
        return
    for pattern, where in ready.patterns.items():
        if reason := _wrong_pattern(vocabulary, [pattern], PATTERN_FUEL):
            what = f"the pattern {pattern!r:.80} at {where.pointer:.120} of the JSON schema"
            raise UsageError(f"{what} cannot be used: {_sentence(reason)}", param)


def _wrong_pattern(vocabulary: Vocabulary, patterns: list[str], fuel: int) -> str:
    """What is wrong with one of these, as a part of a text (as in a schema) or as the whole of one (the dear part)."""
    from llguidance import LLMatcher

    texts = [{"type": "string", "pattern": pattern} for pattern in patterns]
    if reason := _probe(_matcher(vocabulary, _schema_source({"anyOf": texts}), fuel=fuel), vocabulary):
        return reason
    whole = LLMatcher.grammar_from_regex("|".join(f"({pattern})" for pattern in patterns))
    reason = _probe(_matcher(vocabulary, whole, fuel=fuel), vocabulary)
    return reason if _too_complex(reason) else ""


def _place_of(ready: ReadySchema, reason: str) -> str:
    """ " at #/..." for the innermost part that fails for the same reason on its own, "" where none is found."""
    from llguidance import LLMatcher

    shared = {key: ready.schema[key] for key in ("$defs", "definitions") if key in ready.schema}
    for where, node in reversed(ready.parts[:300]):
        wrong, found = LLMatcher.validate_grammar_with_warnings(_schema_source(node | shared))
        if wrong and found and _sentence(found[0]) == _sentence(reason):
            return f" at {where.pointer:.120}"
    return ""


def _too_complex(message: str) -> bool:
    signs = ("too many", "too big", "too large", "limit", "max is", "Current row has", "assertion failed")
    return any(sign in message for sign in signs)


def _sentence(message: str) -> str:
    """The library's report, of many lines, as one sentence."""
    lines = [line.strip() for line in message.splitlines()] or ["unknown reason"]
    if "NoExtension" in lines[0]:
        return "no text satisfies it"
    if lines[0].startswith("Unable to determine if regex is empty"):
        return "pattern or format are too complex together with the length: leave out one of them"
    if _too_complex(lines[0]):
        return f"it is too complex ({lines[0].split(';')[0]:.100}): make it smaller"
    reason = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), "")
    return f"{lines[0]} {reason}".strip()[:300]
