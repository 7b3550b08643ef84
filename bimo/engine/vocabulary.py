"""A tokenizer's vocabulary as constraints need it: every token's bytes, the ids that end an answer, and which tokens
may go on with a JSON number.

    vocabulary = vocabulary_of(tokenizer)       # built once for a tokenizer; about 0.1 s for 50,000 tokens
    vocabulary.index                            # llguidance's prefix tree over it
    place = follow(place, data)                 # where in a JSON text its last byte stands
    vocabulary.sensible_numbers(place)          # mask of the tokens that keep a number short enough there

JSON lets a number have any length, and llguidance with it. A model in love with zeros would never end its answer,
`1e999` fits no float, and 0.99999999999999999999 is read as 1, outside an exclusive maximum of 1. So numbers keep to
what every reader takes exactly: whole ones 18 digits (a signed 64-bit integer), others 15 digits (a float64), exponents
two. Where the form itself asks for more digits it has them, zeros last: behind a minimum of more than 0, zeros could
go on for ever.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from bimo.errors import UsageError
from bimo.tokenizer.load import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from llguidance import LLTokenizer

__all__ = ["START", "Place", "Vocabulary", "follow", "vocabulary_of"]

Place = tuple[int, int]  # what the last byte belongs to, and how many digits its number has so far
_PLAIN, _TEXT, _ESCAPE, _WHOLE, _FRACTION, _EXPONENT = range(6)
_DIGITS = {_WHOLE: 18, _FRACTION: 15, _EXPONENT: 2}  # the point counts those in front of it too
START: Place = (_PLAIN, 0)

_QUOTE, _BACKSLASH, _POINT = b'"\\.'
_GOES_ON = re.compile(rb"[eE]?[+-]?[0-9.]")  # tokens that may make a number longer begin so
_LONG = re.compile(rb"[0-9.]{15}|[eE][+-]?[0-9]{3}")  # may be too long on its own


def follow(place: Place, data: bytes) -> Place:
    """The place after `data`, bytes of a well-formed JSON text."""
    kind, digits = place
    if kind == _TEXT and _QUOTE not in data and _BACKSLASH not in data:
        return place
    for byte in data:
        kind, digits = _step(kind, digits, byte)
    return kind, digits


def _step(kind: int, digits: int, byte: int) -> Place:
    if kind == _TEXT:
        return (_PLAIN if byte == _QUOTE else _ESCAPE if byte == _BACKSLASH else _TEXT), 0
    if kind == _ESCAPE:
        return _TEXT, 0
    if byte == _QUOTE:
        return _TEXT, 0
    if 0x30 <= byte <= 0x39:
        return (_WHOLE if kind == _PLAIN else kind), digits + 1
    if byte == _POINT:
        return _FRACTION, digits
    if byte in b"eE" and kind in (_WHOLE, _FRACTION):
        return _EXPONENT, 0
    return (kind, digits) if byte in b"+-" else START


def _too_long(place: Place, data: bytes) -> bool:
    """Whether a number in `data`, written at `place`, outgrows its limit on the way."""
    kind, digits = place
    for byte in data:
        if byte == _POINT and digits >= _DIGITS[_FRACTION]:
            return True  # no digit could come behind it
        kind, digits = _step(kind, digits, byte)
        if digits > _DIGITS.get(kind, 0):
            return True
    return False


class Vocabulary:
    """Shared by all constraints of one tokenizer. Must not refer to the Tokenizer, which keys the table of these."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLTokenizer

        if not tokenizer.eos_token_ids:
            raise UsageError("this model has no end-of-sequence token, so a constrained answer could not end")
        self.size = tokenizer.vocab_size
        self.words = (self.size + 31) // 32
        self.end_ids = frozenset(tokenizer.eos_token_ids)
        self.ends = self.mask(self.end_ids)
        wrapper = _Wrapper(tokenizer)
        self.tokens: list[bytes] = wrapper.tokens
        self.index: LLTokenizer = LLTokenizer(wrapper, eos_token=list(tokenizer.eos_token_ids))  # type: ignore[arg-type]
        special = set(wrapper.special_token_ids)
        self._numeric = [
            i for i, data in enumerate(self.tokens) if i not in special and (_GOES_ON.match(data) or _LONG.search(data))
        ]
        self.not_zeros = ~self.mask([i for i in self._numeric if not self.tokens[i].strip(b"0")])
        self._sensible: dict[Place, np.ndarray | None] = {}

    def mask(self, token_ids: frozenset[int] | list[int]) -> np.ndarray:
        """int32 (words,) with the bits of these ids set."""
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        bits[list(token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def sensible_numbers(self, place: Place) -> np.ndarray | None:
        """Mask of all tokens but those that make a number too long at `place`; None where there are none."""
        if place[0] in (_TEXT, _ESCAPE):
            return None
        if place not in self._sensible:
            banned = [i for i in self._numeric if _too_long(place, self.tokens[i])]
            self._sensible[place] = ~self.mask(banned) if banned else None
        return self._sensible[place]


class _Wrapper:
    """The object llguidance reads a vocabulary from.

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


_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer's vocabulary. Raises UsageError where no token ends an answer."""
    if (found := _vocabularies.get(tokenizer)) is None:
        found = _vocabularies.setdefault(tokenizer, Vocabulary(tokenizer))
    return found
