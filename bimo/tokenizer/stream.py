"""Turns a stream of token ids into a stream of text that is safe to show.

    stream = TextStream(tokenizer, stop=("\nUser:",))
    for token_id in ids:
        print(stream.push(token_id), end="")
        if stream.stopped is not None:
            break
    print(stream.flush(), end="")

Three things make text unsafe to show: a character whose last bytes are still to come, a suffix that may turn out to
be the beginning of a stop string, and a leading space that the tokenizer put there. The pieces, joined, equal
`tokenizer.decode(ids)`, cut at the stop string.

Cost: each byte is decoded once and each character advances each stop string's automaton, so a token costs O(1)
amortised, whatever came before it.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from bimo.errors import UnsupportedModelError, UsageError
from bimo.tokenizer.load import Tokenizer

__all__ = ["StopMatcher", "TextStream"]


class StopMatcher:
    """Recognises one string in a stream of characters: Knuth, Morris and Pratt (1977).

    `matched` is the length of the longest suffix read so far that is a prefix of `text`.
    """

    __slots__ = ("_failure", "matched", "steps", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self.steps = 0  # comparisons so far; tests count them
        failure, border = [0] * len(text), 0
        for place in range(1, len(text)):
            while border and text[place] != text[border]:
                border = failure[border - 1]
            border += text[place] == text[border]
            failure[place] = border
        self._failure = failure

    def feed(self, char: str) -> bool:
        """Read one character; True when the string is complete."""
        text, failure, matched = self.text, self._failure, self.matched
        self.steps += 1
        while matched and text[matched] != char:
            matched = failure[matched - 1]
            self.steps += 1
        matched += text[matched] == char
        self.matched = matched
        return matched == len(text)


class TextStream:
    """Incremental decoder of one sequence.

    stop          strings that end the text; the one that is complete first wins, of several the longest
    include_stop  whether the stop string found stays in the text
    min_tokens    so many tokens pass before stop strings are looked for
    stopped       the stop string that was found, else None; afterwards `push` gives ""

    Raises UsageError for an empty stop string, UnsupportedModelError for a tokenizer that cannot be streamed.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        if tokenizer.decoding.kind == "other":
            raise UnsupportedModelError(
                f"the tokenizer in {tokenizer.directory} decodes tokens by their neighbours, which cannot be "
                "streamed: byte-level BPE and SentencePiece tokenizers can"
            )
        if isinstance(stop, str):
            stop = (stop,)
        if not all(stop):
            raise UsageError("stop strings must not be empty", "stop")
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._tokens_to_pass = min_tokens
        self._matchers = [StopMatcher(text) for text in dict.fromkeys(stop)]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.decoding.strip  # leading spaces still to drop
        self._held: deque[str] = deque()  # text that may be the beginning of a stop string
        self._held_length = 0

    @property
    def steps(self) -> int:
        """Character comparisons made for the stop strings so far."""
        return sum(matcher.steps for matcher in self._matchers)

    def push(self, token_id: int) -> str:
        """Text that is safe to show now that `token_id` came; often "" and sometimes more than the token."""
        if self.stopped is not None:
            return ""
        self._tokens_to_pass -= 1
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """The rest, at the end: an unfinished character becomes U+FFFD, and what was held back is text after all."""
        if self.stopped is not None:
            return ""
        shown = self._release(self._decoder.decode(b"", final=True))
        if self.stopped is None:
            shown += "".join(self._held)
        self._held.clear()
        self._held_length = 0
        for matcher in self._matchers:
            matcher.matched = 0
        return shown

    def _release(self, text: str) -> str:
        """Pass decoded text through the stop strings; returns what may be shown."""
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        if not text or not self._matchers or self._tokens_to_pass >= 0:
            return text
        for place, char in enumerate(text):
            # every matcher must see every character, so no short-circuit
            complete = [matcher.text for matcher in self._matchers if matcher.feed(char)]
            if complete:
                return self._cut(text[: place + 1], max(complete, key=len))
        self._held.append(text)
        self._held_length += len(text)
        return self._take(self._held_length - max(matcher.matched for matcher in self._matchers))

    def _cut(self, text: str, stop: str) -> str:
        self.stopped = stop
        shown = "".join(self._held) + text
        self._held.clear()
        self._held_length = 0
        return shown if self._include_stop else shown[: len(shown) - len(stop)]

    def _take(self, length: int) -> str:
        """Remove `length` characters from the front of what is held."""
        pieces = []
        self._held_length -= length
        while length:
            piece = self._held.popleft()
            if len(piece) > length:
                self._held.appendleft(piece[length:])
                piece = piece[:length]
            pieces.append(piece)
            length -= len(piece)
        return "".join(pieces)
