"""MinHash estimates what it should, copies are found, and texts that only share a language are not copies."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimo.data.dedup import NUM_MINIMA, bands, exact_key, find_duplicates, signature
from bimo.errors import UsageError

HAN = [chr(point) for point in range(0x4E00, 0x5600)]
LATIN = [*"abcdefghijklmnopqrstuvwxyz", *"     "]


def made_up(seed: int, language: str, length: int) -> str:
    rng = random.Random(f"{language}{seed}")
    return "".join(rng.choices(HAN if language == "zh" else LATIN, k=length)).strip()


def shingles(text: str) -> set[str]:
    plain = " ".join(text.lower().split())
    return {plain[i : i + 5] for i in range(len(plain) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def duplicates(texts: list[str], threshold: float) -> list[int]:
    keys = np.array([exact_key(text) for text in texts], np.uint64)
    signatures = np.array([signature(text) for text in texts], np.uint32).reshape(len(texts), NUM_MINIMA)
    return find_duplicates(keys, signatures, threshold).tolist()


def scattered(text: str, seed: int) -> str:
    """Every twentieth character, at random places, is another one."""
    rng, characters = random.Random(seed), list(text)
    for place in rng.sample(range(len(text)), len(text) // 20):
        characters[place] = "☆"
    return "".join(characters)


def rewritten(text: str, seed: int) -> str:
    """One stretch of a twentieth of the text reads differently."""
    length = len(text) // 20
    place = random.Random(seed).randrange(len(text) - length)
    return text[:place] + "☆" * length + text[place + length :]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["zh", "en"]), st.integers(50, 600), st.floats(0, 1))
def test_the_estimate_is_close_to_the_truth(seed: int, language: str, length: int, share: float) -> None:
    a = made_up(seed, language, length)
    b = a[: int(len(a) * share)] + made_up(seed + 1, language, length - int(len(a) * share))
    estimate = (signature(a) == signature(b)).mean()
    assert abs(estimate - jaccard(a, b)) < 5 * 0.0442  # five standard deviations of 128 minima


def test_the_estimate_is_right_on_average() -> None:
    errors = []
    for seed in range(200):
        a = made_up(seed, "zh", 300)
        b = a[:240] + made_up(seed + 1000, "zh", 60)
        errors.append((signature(a) == signature(b)).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(("edit", "threshold"), [(rewritten, 0.8), (scattered, 0.5)])
def test_planted_copies_are_found_and_nothing_else(language: str, edit: object, threshold: float) -> None:
    originals = [made_up(seed, language, 200 + seed) for seed in range(300)]
    copies = [edit(text, seed) for seed, text in enumerate(originals)]  # type: ignore[operator]
    found = duplicates(originals + copies, threshold)
    assert found[:300] == [-1] * 300
    assert all(copy in (-1, place) for place, copy in enumerate(found[300:]))
    assert sum(copy >= 0 for copy in found[300:]) >= 0.95 * 300


def test_poems_and_short_definitions_have_near_copies_too() -> None:
    poem = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
    other = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
    assert duplicates([poem, other, poem.replace("。举", "；举")], 0.5) == [-1, -1, 0]


def test_exact_copies_by_any_case_and_spacing() -> None:
    texts = ["Hello World", "你好", "hello\n world ", "你 好", "你好吗", "", " "]
    assert duplicates(texts, 1.0) == [-1, -1, 0, 1, -1, -1, 5]


def test_short_texts_are_only_equal_or_different() -> None:
    assert duplicates(["一", "二", "ab", "cd", "一"], 0.5) == [-1, -1, -1, -1, 0]


def test_a_chain_has_one_survivor() -> None:
    base = made_up(1, "zh", 400)
    chain = [base[start : start + 300] for start in range(0, 100, 20)]  # each like the next, the ends not alike
    assert jaccard(chain[0], chain[-1]) < 0.6 < 0.85 < jaccard(chain[0], chain[1])
    assert duplicates([*chain[::-1], made_up(2, "zh", 300)], 0.8) == [-1, 0, 0, 0, 0, -1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_every_copy_points_to_the_first_of_its_group(groups: list[int]) -> None:
    texts = [made_up(group, "en", 100) for group in groups]
    assert duplicates(texts, 0.8) == [
        -1 if groups.index(group) == place else groups.index(group) for place, group in enumerate(groups)
    ]


def test_many_documents_and_many_copies_of_one_are_quick(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.memmap(tmp_path / "signatures", np.uint32, "w+", shape=(50_000, NUM_MINIMA))
    rows[:] = rng.integers(0, 2**32, rows.shape, np.uint32)
    rows[25_000:] = rows[0]
    keys = np.arange(50_000, dtype=np.uint64)
    start = time.perf_counter()
    found = find_duplicates(keys, rows, 0.8)
    assert time.perf_counter() - start < 5
    assert (found[:25_000] == -1).all()
    assert (found[25_000:] == 0).all()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_miss_little_at_the_threshold(threshold: float) -> None:
    num_bands, rows = bands(threshold)
    assert num_bands * rows <= NUM_MINIMA
    assert (1 - threshold**rows) ** num_bands <= 0.02


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1])
def test_a_threshold_that_makes_no_sense_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="similarity"):
        find_duplicates(np.zeros(1, np.uint64), np.zeros((1, NUM_MINIMA), np.uint32), threshold)


def test_keys_and_signatures_are_the_same_in_every_run() -> None:
    script = "from bimo.data.dedup import *; print(exact_key('你好 Hi'), signature('你好世界 Hello')[:4].tolist())"
    runs = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout for _ in range(2)}
    assert runs == {f"{exact_key('你好 Hi')} {signature('你好世界 Hello')[:4].tolist()}\n"}


@pytest.mark.parametrize(
    "text", ["", "a" * 10**6, "👨‍👩‍👧" * 1000, "שלום" * 10, "\u0301" * 10, "\x00" * 10, "\ud800" * 9]
)
def test_hostile_text_has_a_signature(text: str) -> None:
    assert signature(text).shape == (NUM_MINIMA,)
    assert 0 <= exact_key(text) < 2**64


def test_no_documents_no_copies() -> None:
    assert find_duplicates(np.empty(0, np.uint64), np.empty((0, NUM_MINIMA), np.uint32), 0.8).tolist() == []
