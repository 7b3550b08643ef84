"""Streams of text: whole characters only, stop strings held back, exactly the text that decoding gives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.errors import UnsupportedModelError, UsageError
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.stream import StopMatcher, TextStream
from tests.tokenizer.tiny import SAMPLES


@dataclass
class Streamed:
    """A whole sequence pushed through a stream."""

    pieces: list[str]
    stream: TextStream

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def run(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), include: bool = False) -> Streamed:
    stream = TextStream(tokenizer, stop, include)
    return Streamed([stream.push(i) for i in ids] + [stream.flush()], stream)


def cut(text: str, stops: tuple[str, ...], include: bool) -> str:
    """The definition: cut at the stop string that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if include else text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    streamed = run(tokenizer, ids)
    assert streamed.text == tokenizer.decode(ids) == text
    assert all("\ufffd" not in piece for piece in streamed.pieces)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_ids_stream_to_what_decoding_gives(
    byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject
) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    emoji = tokenizer.encode("🧑‍🚀你好👨‍👩‍👧", add_special_tokens=False)
    one = st.integers(-1, tokenizer.vocab_size + 1) | st.sampled_from(emoji) | st.integers(3, 258)
    ids = data.draw(st.lists(one, max_size=40))
    assert run(tokenizer, ids).text == tokenizer.decode(ids)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_stop_strings_cut_where_the_definition_says(
    byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject
) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    text = data.draw(st.text("ab 你好🧑‍🚀\n", max_size=30))
    stops = tuple(data.draw(st.lists(st.text("ab 你好🧑‍🚀\n", min_size=1, max_size=5), max_size=4)))
    include = data.draw(st.booleans())
    streamed = run(tokenizer, tokenizer.encode(text), stops, include)
    assert streamed.text == cut(text, stops, include)
    assert (streamed.stream.stopped is not None) == any(stop in text for stop in stops)


def test_nothing_is_shown_that_must_be_taken_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["好的🎉"])
    shown = ""
    for token in tokenizer.encode("你好的🎊 你好的🎉 unseen"):
        shown += stream.push(token)
        assert "你好的🎊 你".startswith(shown) or shown == "你好的🎊 你"
    assert shown + stream.flush() == "你好的🎊 你"
    assert stream.stopped == "好的🎉"
    assert stream.push(5) == "" and stream.flush() == ""


def test_half_a_character_is_held_then_shown_as_one(byte_level: Tokenizer) -> None:
    by_byte = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size)}
    ids = [by_byte[bytes([byte])] for byte in "🎉".encode()]
    stream = TextStream(byte_level)
    assert [stream.push(i) for i in ids] == ["", "", "", "🎉"]
    unfinished = TextStream(byte_level)
    assert [unfinished.push(i) for i in ids[:3]] == ["", "", ""]
    assert unfinished.flush() == "\ufffd"


def test_special_tokens_leave_no_trace(byte_level: Tokenizer) -> None:
    by_byte = {byte_level.token_bytes(i): i for i in range(byte_level.vocab_size)}
    first, *rest = (by_byte[bytes([byte])] for byte in "好".encode())
    assert run(byte_level, [1, first, 2, *rest, 2]).text == "好"


def test_the_tokenizers_own_leading_space_is_not_text(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello the world")
    assert sentencepiece.token_bytes(ids[1]).startswith(b" ")
    streamed = run(sentencepiece, ids)
    assert streamed.text == "hello the world"


def test_smollm2_streams_chinese_and_emoji(smollm2: Tokenizer) -> None:
    for text in SAMPLES:
        streamed = run(smollm2, smollm2.encode(text), ("永不出现",))
        assert streamed.text == text


def test_the_first_complete_stop_string_wins(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("xx abc yy")
    assert run(byte_level, ids, ("abc", "b")).stream.stopped == "b"
    assert run(byte_level, ids, ("bc", "abc", "c")).stream.stopped == "abc"


@pytest.mark.parametrize(
    ("text", "stop"),
    [("a" * 4000, "a" * 3999 + "b"), ("ab" * 2000, "ab" * 1000 + "c"), ("你好" * 1000, "你好" * 900 + "！")],
)
def test_work_is_linear_in_the_text(byte_level: Tokenizer, text: str, stop: str) -> None:
    streamed = run(byte_level, byte_level.encode(text), (stop, stop + "2"))
    assert streamed.text == text
    assert streamed.stream.steps <= 2 * 2 * len(text)  # two stop strings, at most two comparisons a character amortised


@given(st.text("ab", max_size=40), st.text("ab", min_size=1, max_size=6))
def test_the_matcher_finds_what_find_finds(text: str, wanted: str) -> None:
    matcher = StopMatcher(wanted)
    ends = (place for place, char in enumerate(text) if matcher.feed(char))
    place = text.find(wanted)
    assert next(ends, None) == (None if place < 0 else place + len(wanted) - 1)


def test_bad_arguments(byte_level: Tokenizer) -> None:
    with pytest.raises(UsageError, match="must not be empty"):
        TextStream(byte_level, ["ok", ""])
    assert TextStream(byte_level, "single").stopped is None  # a lone string is one stop string, not six


def test_a_tokenizer_that_cannot_be_streamed_is_refused(byte_level: Tokenizer) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    bert = Tokenizer(backend, directory=byte_level.directory)
    assert bert.decode([1, 2]) == "ab"
    with pytest.raises(UnsupportedModelError, match="cannot be streamed"):
        TextStream(bert)


def test_pieces_do_not_depend_on_how_long_the_text_is(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("你好 world 🎉 " * 50)
    whole = run(byte_level, ids).pieces
    half = run(byte_level, ids[: len(ids) // 2]).pieces[:-1]
    assert list(itertools.islice(whole, len(half))) == half
