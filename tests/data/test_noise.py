"""Noise changes the share of words it says, of the kind it says, always the same way, and nothing that must stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bimo.data.noise as module
from bimo.data.confusions import Confusions
from bimo.data.noise import (
    KINDS,
    Noise,
    confused,
    dropped,
    how_many,
    misspelt,
    mixed,
    question_of,
    random_of,
    with_question,
)
from bimo.data.records import Document, Message
from bimo.data.words import cut, kept
from bimo.errors import UsageError

ENGLISH = "Please open the document at https://example.org and write the letter to [EMAIL] before 5 pm. " * 20
CHINESE = "今天天气很好，我们去公园看花，请把照片发到[EMAIL]，一共300张。" * 20


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """A small set of homophones in the place of those that are fetched."""
    small = dict(zip("天气好我们去看花请把照片发到", "田汽号窝门趣砍华情爸赵骗法道", strict=True))
    monkeypatch.setattr(module, "confusions", lambda progress: Confusions(small, {}))
    return small


def changed_words(text: str, noisy: str) -> float:
    """The share of words that differ, of a noise that drops none."""
    before, after = text.split(), noisy.split()
    assert len(before) == len(after)
    return sum(map(str.__ne__, before, after)) / len(before)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_the_share_is_that_of_words(share: float, sets: Mapping[str, str]) -> None:
    shares, left, hit = [], [], []
    num_words, num_chinese = len(cut(ENGLISH).words), len(cut(CHINESE).words)
    for seed in range(20):
        shares.append(changed_words(ENGLISH, Noise("typos", share, seed)(ENGLISH)) * len(ENGLISH.split()) / num_words)
        left.append(len(cut(Noise("dropped", share, seed)(CHINESE)).words))
        noisy = Noise("homophones", share, seed)(CHINESE)
        assert len(noisy) == len(CHINESE)
        hit.append(sum(map(str.__ne__, CHINESE, noisy)) / num_chinese)
    assert sum(shares) / 20 == pytest.approx(share, abs=0.01)
    assert sum(hit) / 20 == pytest.approx(share, abs=0.01)
    assert sum(left) / 20 == pytest.approx((1 - share) * num_chinese, rel=0.1)  # new neighbours are cut anew


def test_numbers_of_words_are_right_on_average() -> None:
    random = Random(0)
    counts = [how_many(0.1, 5, random, 0) for _ in range(2000)]
    assert set(counts) == {0, 1} and sum(counts) / 2000 == pytest.approx(0.5, abs=0.05)
    assert how_many(0.1, 5, random, 1) == 1 and how_many(0.1, 0, random, 1) == 0 and how_many(1, 5, random, 0) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_same_seed_makes_the_same_mistakes_and_keeps_what_must_stay(
    kind: str, text: str, sets: Mapping[str, str]
) -> None:
    noise = Noise(kind, 0.2, 3)
    noisy = noise(text)
    noise("something between")
    assert noise(text) == noisy == Noise(kind, 0.2, 3)(text)
    assert kept(noisy) == kept(text)
    suits = kind in ("dropped", "mixed") or (kind == "typos") == (text is ENGLISH)
    assert (noisy != text) == suits == (Noise(kind, 0.2, 4)(text) not in (noisy, text))
    assert Noise(kind, 0.0, 3)(text) == text


def test_homophones_are_of_the_set_and_mixed_is_of_every_kind(sets: Mapping[str, str]) -> None:
    noisy = confused(sets, cut(CHINESE), 0.5, Random(0))
    assert all(one == other or sets[one] == other for one, other in zip(CHINESE, noisy, strict=True))
    text = "open 天气 window 照片 letter 看花 " * 50
    both = mixed(sets, cut(text), 0.5, Random(0))
    assert len(both.split()) < len(text.split())
    assert set("汽砍赵") & set(both) and any(word not in text for word in both.split() if word.isascii())


@pytest.mark.parametrize(
    ("text", "seeds", "expected"),
    [
        ("Say hello, world", 40, {"hello, world", "Say, world", "Say hello,"}),
        ("one two", 20, {"one", "two"}),
        ("打开文件！", 20, {"打开！", "文件！"}),
        ("alone", 5, {"alone"}),
        ("", 3, {""}),
        ("300 [EMAIL]", 3, {"300 [EMAIL]"}),
    ],
)
def test_dropping_a_word_leaves_one_space_and_one_word(text: str, seeds: int, expected: set[str]) -> None:
    assert {dropped(cut(text), 0.3, Random(seed), 1) for seed in range(seeds)} == expected
    everything = dropped(cut(text), 1.0, Random(0))
    assert len(cut(everything).words) == min(1, len(cut(text).words))


@settings(max_examples=60)
@given(
    st.text(alphabet=st.sampled_from("ab C1.,[]<|>{}`天气好\n 😀é\u0301'-/@：，\ud800"), max_size=60), st.integers(0, 5)
)
def test_any_text_can_be_noisy(text: str, seed: int) -> None:
    pieces = cut(text)
    for edit in (misspelt, dropped):
        assert isinstance(edit(pieces, 0.5, Random(seed), 1), str)
    assert len(mixed({"天": "田"}, pieces, 1.0, Random(seed))) >= 0
    assert "".join(pieces.parts) == text  # the pieces serve every edit


def test_of_a_document_the_question_is_altered(sets: Mapping[str, str]) -> None:
    dialogue = Document(
        "你好\n请看天气\n好的",
        "chat#1",
        "chat",
        messages=(Message("system", "请看天气"), Message("user", "请看天气"), Message("assistant", "请看天气")),
        group="g",
    )
    noisy = Noise("homophones", 1.0, 0).document(dialogue)
    assert [message.role for message in noisy.messages] == ["system", "user", "assistant"]
    assert noisy.messages[0] == dialogue.messages[0] and noisy.messages[2] == dialogue.messages[2]
    assert noisy.messages[1].content != "请看天气" and noisy.messages[1].content in noisy.text
    assert (noisy.id, noisy.group) == (dialogue.id, dialogue.group)
    labelled = Document("open the window", "a", "s", label="spam")
    assert Noise("typos", 1.0, 0).document(labelled).label == "spam"
    assert Noise("homophones", 1.0, 0).document(labelled) is labelled
    assert question_of(Document("x", "y", "z", messages=(Message("assistant", "x"),))) == ""
    assert question_of(with_question(labelled, "closed")) == "closed"


def test_random_numbers_hang_on_their_parts_alone() -> None:
    # stated here, so that another version of Python or of bimo does not change everyone's copies unnoticed
    assert random_of(1, "faq.csv#7").getrandbits(32) == 3_440_993_309
    assert random_of(1, "a").random() != random_of(1, "b").random()
    random_of("\ud800")


def test_what_noise_cannot_be_is_told() -> None:
    with pytest.raises(UsageError, match=r"noise is typos, homophones, dropped, mixed, not 'blur'"):
        Noise("blur", 0.1, 0)  # type: ignore[arg-type]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="from 0 to 1"):
            Noise("typos", share, 0)


def test_english_needs_no_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIMO_HOME", str(tmp_path / "home"))
    assert Noise("mixed", 1.0, 0)("open the window") != "open the window"
    assert not (tmp_path / "home").exists()
