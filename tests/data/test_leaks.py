"""Text that stands in the index is found in part and whole, in both languages; text that does not, never."""

from __future__ import annotations

import pickle
import random
import time

import pytest

from bimo.data.leaks import GRAM, LeakIndex, grams

WORDS = [f"{a}{b}{c}" for a in "bdgklmnp" for b in "aeiou" for c in "nrst"]
HAN = [chr(point) for point in range(0x4E00, 0x5600)]


def made_up(seed: int, language: str, num_words: int) -> str:
    rng = random.Random(f"{language}{seed}")
    return "".join(rng.choices(HAN, k=num_words)) if language == "zh" else " ".join(rng.choices(WORDS, k=num_words))


def index_of(*texts: str) -> LeakIndex:
    index = LeakIndex()
    for text in texts:
        index.add(text)
    return index


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e f g h i j k l m", 1),
        ("a b c d e f g h i j k l", 0),
        ("a b c d e f g h i j k l m n o", 3),
        ("床前明月光疑是地上霜举头望", 1),
        ("床前明月光，疑是地上霜。举头望明月，低头思故乡。", 8),
        ("用 Python 写 hello world 程序", 0),
        ("！？。" * 20, 0),
        ("", 0),
    ],
)
def test_a_gram_is_thirteen_words_or_characters(text: str, expected: int) -> None:
    assert len(grams(text)) == expected


def test_grams_do_not_depend_on_their_place_on_case_or_on_punctuation() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert grams(f"zero {words}")[1] == grams(words)[0]
    assert grams(words.title().replace(" ", ", "))[0] == grams(words)[0]
    assert grams("天" + "床前明月光疑是地上霜举头望")[1] == grams("床前明月光，疑是地上霜。举头望")[0]


def test_other_words_are_other_grams() -> None:
    texts = [
        "ab c d e f g h i j k l m n",
        "ba c d e f g h i j k l m n",
        "a bc d e f g h i j k l m n",
        "c ab d e f g h i j k l m n",
    ]
    assert len({int(grams(text)[0]) for text in texts}) == 4


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_passage_is_found_by_its_share(language: str) -> None:
    join = "" if language == "zh" else " "
    test, own = made_up(1, language, 100), made_up(2, language, 100)
    index = index_of(test, made_up(3, language, 50))
    assert index.share(test) == 1.0
    assert index.share(own) == 0.0
    both = index.share(own + join + test)
    assert both == pytest.approx((100 - GRAM + 1) / (200 - GRAM + 1))


def test_short_texts_are_found_only_whole() -> None:
    index = index_of("法国的首都是哪里？", "What is it?")
    assert index.share("法国的首都是哪里？") == 1.0
    assert index.share("WHAT  is it?") == 1.0
    assert index.share("德国的首都是哪里？") == 0.0


def test_an_index_grows_and_travels() -> None:
    index = LeakIndex()
    texts = [made_up(seed, "en", 40) for seed in range(300)]
    for seed, text in enumerate(texts):
        index.add(text)
        if seed % 50 == 0:
            assert index.share(text + " end") > 0.9
    other = pickle.loads(pickle.dumps(index))
    assert len(other) == len(index) == 300
    assert all(other.share(text + " end") > 0.9 for text in texts)


@pytest.mark.parametrize(
    "text",
    ["", " \n", "a" * 10**6, "字" * 10**6, "a " * 500_000, "👨‍👩‍👧" * 99, "עברית " * 20, "\u0301" * 50, "\x00" * 50],
)
def test_hostile_texts_are_no_trouble(text: str) -> None:
    index = index_of(made_up(1, "zh", 50))
    start = time.perf_counter()
    assert index.share(text) == 0.0
    index.add(text)
    assert index.share(text) == (1.0 if text.strip() else 0.0)
    assert time.perf_counter() - start < 5
