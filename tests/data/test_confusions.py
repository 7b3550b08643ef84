"""Sets of characters as the package lists them; a typo is one slip of the finger."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from nltk.metrics.distance import edit_distance

from bimo.data.confusions import _neighbours, confusions, read_confusions, typable, typo
from bimo.errors import DataError, DownloadError


def test_sets_are_those_of_the_package() -> None:
    try:
        sets = confusions(lambda label, done, total: None)
    except DownloadError as error:
        pytest.skip(f"pycorrector cannot be fetched: {error}")
    assert {"再", "载"} <= set(sets.homophones["在"])
    assert set(sets.shapes["骄"]) >= {"轿", "娇", "矫"} and "骄" in sets.shapes["轿"]
    for table in sets:
        assert len(table) > 2000
        assert all(len(char) == 1 and others and char not in others for char, others in table.items())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "package" / "pycorrector" / "data"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"same_pinyin\.txt cannot be read"):
        read_confusions(folder)
    (folder / "same_pinyin.txt").write_text("#汉字\t同音\n一\t壹\t漪\n\n孤\n", encoding="utf-8")
    (folder / "same_stroke.txt").write_bytes("鸟\t岛\n".encode()[:-2])
    with pytest.raises(DataError, match=r"same_stroke\.txt cannot be read"):
        read_confusions(folder)
    (folder / "same_stroke.txt").write_text("鸟\t岛\n岛\t捣\n", encoding="utf-8")
    sets = read_confusions(folder)
    assert sets.homophones == {"一": "壹漪"}
    assert sets.shapes == {"鸟": "岛", "岛": "鸟捣", "捣": "岛"}


@pytest.mark.parametrize("word", ["window", "the", "Bookkeeper", "naïve", "don't", "well-known", "FREE", "aaaa"])
def test_a_typo_is_one_slip_behind_the_first_letter(word: str) -> None:
    assert typable(word)
    found = {typo(word, Random(seed)) for seed in range(200)}
    assert word not in found and len(found) > 4
    for wrong in found:
        assert wrong[0] == word[0]
        assert edit_distance(word, wrong, transpositions=True) == 1
        assert wrong.count("'") == word.count("'") and wrong.count("-") == word.count("-")
    if word == "FREE":
        assert all(wrong.isupper() for wrong in found)


def test_words_of_other_scripts_and_short_ones_have_none() -> None:
    assert not typable("is") and not typable("привет") and not typable("天气好") and not typable("")
    assert typo("привет", Random(0)) == "привет" and typo("", Random(0)) == ""


def test_keys_are_neighbours_of_each_other() -> None:
    beside = _neighbours()
    assert set(beside["g"]) == set("fhtyvb") and set(beside["q"]) == set("wa") and set(beside["m"]) == set("njk")
    assert all(key in beside[other] for key, others in beside.items() for other in others)
