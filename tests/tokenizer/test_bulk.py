"""Corpora into tokens: the same ids as for one text alone, whatever the text, and by the quick way where it may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.errors import UsageError
from bimo.tokenizer.bulk import BORDER, BulkEncode, bulk_encoder
from bimo.tokenizer.load import Tokenizer, byte_level_alphabet
from bimo.tokenizer.train import LONGEST_WORD, save_tokenizer, train_tokenizer

TEXTS = Path(__file__).parents[2] / "benchmarks" / "texts"
KINDS = ("bpe", "unigram", "wordpiece")

# Everything that a rule about words turns on, runs of it too.
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(
        ["'s", "'S", "'ſ", "'ll", "’s", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\0", "١٢", "½", "Ⅷ", "〇"]
    ),
    st.sampled_from(
        ["the", " The", "model", "语言模型", "，", "。", "é", "e\u0301", "🤦🏽‍♀️", "ﷺ", "123", "_", "--", "!!!"]
    ),
    st.sampled_from(["<|endoftext|>", "<|im_end|>", BORDER, BORDER[:-1], BORDER[1:], "\U00031350", "\U0001e4d0", "\4"]),
    st.builds(lambda char, number: char * number, st.sampled_from("aé字- \n1\u0301٣\U00031350"), st.integers(1, 230)),
)
TEXT = st.lists(PIECES, max_size=12).map("".join)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    texts = [(TEXTS / f"{name}.txt").read_text(encoding="utf-8") for name in ("en", "zh")]
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        # runs of one letter are where two ways of merging would part first
        save_tokenizer(
            train_tokenizer([*texts, "aaaaaaa aaab --- -- 字字字字"] * 2, kind=kind, vocab_size=1500), folder
        )
        made[kind] = Tokenizer.from_directory(folder)
    return made


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """By `tokenizers`, alone."""
    backend = tokenizer.backend
    backend.encode_special_tokens = True
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    finally:
        backend.encode_special_tokens = False


def takes_the_quick_way(tokenizer: Tokenizer) -> bool:
    return bulk_encoder(tokenizer).__name__ == "quickly"


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    whole = json.loads(tokenizer.backend.to_str())
    change(whole)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(whole)), directory=tokenizer.directory)


@pytest.fixture(scope="session")
def encode(trained: dict[str, Tokenizer]) -> dict[str, BulkEncode]:
    return {kind: bulk_encoder(tokenizer) for kind, tokenizer in trained.items()}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT2S_WORDS = {
    "gpt2": BYTES,
    "digits": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
}


@pytest.fixture(scope="session")
def of_smollm2(smollm2: Tokenizer) -> dict[str, tuple[Tokenizer, BulkEncode]]:
    """Its vocabulary, with its own words and with two others'."""
    made = {"its own": smollm2}
    for name, way in GPT2S_WORDS.items():
        made[name] = changed(smollm2, lambda whole, way=way: whole.update(pre_tokenizer=way))  # type: ignore[misc]
    assert all(map(takes_the_quick_way, made.values()))
    return {name: (tokenizer, bulk_encoder(tokenizer)) for name, tokenizer in made.items()}


@given(texts=st.lists(TEXT, max_size=5))
@settings(max_examples=300, deadline=None)
def test_the_same_ids_as_one_text_alone(
    trained: dict[str, Tokenizer], encode: dict[str, BulkEncode], texts: list[str]
) -> None:
    for kind in KINDS:
        assert [ids.tolist() for ids in encode[kind](texts)] == [plain(trained[kind], text) for text in texts]


@given(texts=st.lists(TEXT, max_size=4))
@settings(max_examples=200, deadline=None)
def test_the_same_ids_with_gpt2s_words(of_smollm2: dict[str, tuple[Tokenizer, BulkEncode]], texts: list[str]) -> None:
    for tokenizer, encode_all in of_smollm2.values():
        assert [ids.tolist() for ids in encode_all(texts)] == [plain(tokenizer, text) for text in texts]


@pytest.mark.parametrize("number", [LONGEST_WORD - 2, LONGEST_WORD - 1, LONGEST_WORD, LONGEST_WORD + 1, 5000])
@pytest.mark.parametrize("char", ["a", "字", "-", " ", "\n", "é", "\u0301", "٣", "\U00031350"])
def test_words_at_the_limit_of_length(
    trained: dict[str, Tokenizer], encode: dict[str, BulkEncode], char: str, number: int
) -> None:
    run = char * number
    texts = [run, f"({run})", f"a{run}a", f"  {run}\n", f"字，{run}，'s", "short"]
    assert [ids.tolist() for ids in encode["bpe"](texts)] == [plain(trained["bpe"], text) for text in texts]


def test_who_takes_which_way(trained: dict[str, Tokenizer], smollm2: Tokenizer) -> None:
    assert takes_the_quick_way(trained["bpe"])
    assert takes_the_quick_way(smollm2)
    assert not takes_the_quick_way(trained["unigram"])
    assert not takes_the_quick_way(trained["wordpiece"])


def test_what_would_change_the_ids_takes_the_slow_way(trained: dict[str, Tokenizer]) -> None:
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda whole: whole.update(normalizer={"type": "NFC"}),
        lambda whole: whole.update(pre_tokenizer=None),
        lambda whole: whole["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda whole: whole["model"].update(dropout=0.1),
        lambda whole: whole["model"]["merges"].reverse(),
        lambda whole: whole["model"]["merges"].pop(),  # a token that nothing makes
        lambda whole: whole["added_tokens"][0].update(special=False),
    ]
    for change in changes:
        assert not takes_the_quick_way(changed(trained["bpe"], change))


def test_a_token_that_its_own_text_does_not_give_takes_the_slow_way() -> None:
    """The token abc was learned from a and bc, but ab comes first: merging by what a pair becomes would find it in abc,
    merging by pairs does not."""
    alphabet = sorted(byte_level_alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)} | {"ab": 256, "bc": 257, "abc": 258}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("a", "bc")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(backend, directory=Path())
    assert not takes_the_quick_way(tokenizer)
    assert [ids.tolist() for ids in bulk_encoder(tokenizer)(["abc"])] == [[256, vocabulary["c"]]]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_refused(trained: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        bulk_encoder(trained[kind])(["fine", "\ud83e"])


@pytest.mark.parametrize("pattern", [r"\p{L}", r"\p{N}", r"\s", r"(?i:'s|'t|'m|'d)"])
def test_both_libraries_have_the_same_tables_of_unicode(pattern: str) -> None:
    """A newer table in one would cut words with new letters in other places."""
    every = "".join(f"'{chr(code)} " for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    kept = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True)
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    found = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=bytes_only, special_tokens={}).encode_ordinary(
        every
    )
    if pattern.startswith("(?i"):  # one sees 's in 'ſ (U+017F) as well: both must
        assert bytes(found).decode().count("'") == sum(text.count("'") for text, _ in kept.pre_tokenize_str(every))
    assert bytes(found).decode() == "".join(text for text, _ in kept.pre_tokenize_str(every))
