"""How right classes are: each figure written out, intervals against resampling itself; an encoder as a classifier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bimo.data.labels import PseudoTally, pseudo_labels
from bimo.data.records import Document
from bimo.errors import ModelNotFoundError, UnsupportedModelError, UsageError
from bimo.evaluation.classification import Classifier, calibration_error, score_classes
from bimo.formats.huggingface import load_encoder
from tests.encoders import TEXTS, make_encoder

ALL = [text for some in TEXTS.values() for text in some]
TRUTH = ["垃圾"] * 30 + ["正常"] * 60 + ["other"] * 10
TOLD = ["垃圾"] * 24 + ["正常"] * 6 + ["正常"] * 57 + ["垃圾"] * 3 + ["正常"] * 10


def f1_of(truth: list[str], told: list[str], label: str) -> float:
    pairs = list(zip(truth, told, strict=True))
    hits = pairs.count((label, label))
    return 2 * hits / (truth.count(label) + told.count(label))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_the_figures_are_their_definitions() -> None:
    scores = score_classes(TRUTH, TOLD, positive="垃圾")
    assert scores.num_texts == 100 and scores.labels == ("other", "垃圾", "正常")
    assert scores.accuracy == scores.micro_f1 == pytest.approx(0.81)
    for label in scores.labels:
        assert scores.f1[label] == pytest.approx(f1_of(TRUTH, TOLD, label))
    assert scores.macro_f1 == pytest.approx(sum(scores.f1.values()) / 3)
    assert (scores.precision, scores.recall) == (pytest.approx(24 / 27), pytest.approx(24 / 30))
    assert scores.positive_f1 == scores.f1["垃圾"]
    assert scores.confusion == ((0, 0, 10), (0, 24, 6), (0, 3, 57))
    assert scores.calibration_error is None
    assert json.loads(json.dumps(dataclasses.asdict(scores)))["f1"]["other"] == 0


def test_intervals_are_those_of_resampled_texts() -> None:
    scores = score_classes(TRUTH, TOLD, positive="垃圾", resamples=4000)
    truth, told, draws = np.array(TRUTH), np.array(TOLD), np.random.default_rng(1)
    found = []
    for _ in range(600):
        rows = draws.integers(0, 100, 100)
        one, two = truth[rows].tolist(), told[rows].tolist()
        there = sorted({*one, *two})
        f1 = {label: f1_of(one, two, label) for label in there}
        found.append((np.mean(truth[rows] == told[rows]), np.mean(list(f1.values())), f1["垃圾"]))
    expected = np.percentile(found, (2.5, 97.5), axis=0).T
    shown = [scores.accuracy_interval, scores.macro_f1_interval, scores.positive_f1_interval]
    assert np.abs(np.array(shown) - expected).max() < 0.03
    for value, (low, high) in zip((scores.accuracy, scores.macro_f1, scores.positive_f1), shown, strict=True):
        assert low < value < high
    assert score_classes(TRUTH, TOLD).accuracy_interval == score_classes(TRUTH, TOLD).accuracy_interval


def test_all_right_and_all_wrong() -> None:
    right = score_classes(["a", "b"] * 20, ["a", "b"] * 20, [1.0] * 40, positive="b")
    assert (right.accuracy, right.macro_f1, right.positive_f1, right.calibration_error) == (1, 1, 1, 0)
    assert right.accuracy_interval == (1, 1)
    wrong = score_classes(["a", "b"], ["b", "a"], [1.0, 1.0], positive="b")
    assert (wrong.accuracy, wrong.macro_f1, wrong.precision, wrong.calibration_error) == (0, 0, 0, 1)
    assert score_classes(["a"], ["a"]).macro_f1 == 1


def test_calibration_is_the_gap_bin_by_bin() -> None:
    draws = np.random.default_rng(0)
    chances = np.concatenate((draws.random(500), [0.0, 1.0, 1 / 15, 2 / 15]))
    hits = draws.random(504) < chances**2
    gap = 0.0
    for number in range(15):
        inside = (chances > number / 15) & (chances <= (number + 1) / 15)
        if number == 0:
            inside |= chances == 0
        if inside.any():
            gap += inside.sum() / 504 * abs(hits[inside].mean() - chances[inside].mean())
    assert calibration_error(chances, hits) == pytest.approx(gap)
    assert calibration_error([0.5] * 4, [True, False] * 2) == 0
    for bad in ([0.5, np.nan], [0.5, 1.5], [0.5], [-0.1, 0.5]):
        with pytest.raises(UsageError, match="probability from 0 to 1 for each of 2"):
            calibration_error(bad, [True, False])


def test_the_table_for_people() -> None:
    lines = score_classes(TRUTH, TOLD, [0.9] * 100, positive="垃圾").lines()
    assert lines[0].startswith("accuracy 0.8100 [0.") and "100 texts" in lines[0]
    assert lines[1].startswith("垃圾: F1 0.8421 [") and "recall 0.8000" in lines[1]
    assert lines[2] == "calibration error 0.0900"
    assert [row.split() for row in lines[4:]] == [
        ["other", "0", "0", "10"],
        ["垃圾", "0", "24", "6"],
        ["正常", "0", "3", "57"],
    ]
    many = [str(number) for number in range(40)]
    assert len(score_classes(many, many).lines()) == 1


@pytest.mark.parametrize(
    ("truth", "told", "positive", "said"),
    [
        ([], [], None, "0 texts have a true class"),
        (["a"], ["a", "b"], None, "1 texts have a true class and 2 a told one"),
        (["a"], ["spam"], "spam", "no text is 'spam': the classes are a"),
    ],
)
def test_mistakes_are_named(truth: list[str], told: list[str], positive: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        score_classes(truth, told, positive=positive)


# --- the classifier ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny", labels=("好", "bad", "neutral"))


def test_a_batch_says_what_each_text_says_alone(folder: Path) -> None:
    classifier, model = Classifier(folder, rows=3), load_encoder(folder)
    texts = ["", "🦊", *ALL, "[SEP] \u200b"]
    readings = classifier.read(texts)
    for text, chances, vector in zip(texts, *readings, strict=True):
        hidden = model(torch.tensor([classifier.tokenizer.encode(text)])) if "[" not in text else None
        if hidden is not None:
            expected = model.class_logits(hidden).softmax(-1)[0]
            assert torch.allclose(torch.from_numpy(chances), expected, atol=1e-5)
            assert torch.allclose(torch.from_numpy(vector), model.pooled(hidden)[0], atol=1e-5)
    assert np.allclose(readings.probabilities.sum(1), 1, atol=1e-5)
    told = classifier(texts)
    assert [one.label for one in told] == [classifier.labels.names[b] for b in readings.probabilities.argmax(1)]
    assert [one.probability for one in told] == pytest.approx(readings.probabilities.max(1).tolist())
    assert classifier.num_cut == 0


def test_nothing_gives_nothing_and_long_texts_are_cut_and_counted(folder: Path) -> None:
    classifier = Classifier(folder)
    assert classifier([]) == [] and classifier.read([]).probabilities.shape == (0, 3)
    assert classifier.read([]).embeddings.shape == (0, 32)
    classifier(["字" * 1000, "毛笔"])
    assert classifier.num_cut == 1 and classifier.max_tokens == 64
    short = Classifier(folder, max_tokens=5)
    assert np.allclose(short.probabilities(["毛笔用竹管"]), short.probabilities(["毛笔用羊毫"]), atol=1e-6)
    assert short.num_cut == 2
    with pytest.raises(UsageError, match="lone surrogate"):
        classifier(["\ud83e"])


def test_of_several_tasks_one_is_asked(tmp_path: Path) -> None:
    classifier = Classifier(make_encoder(tmp_path / "m", labels=("a::x", "a::y", "b::x", "b::z", "b::w")))
    assert classifier.probabilities(ALL, "b").shape == (10, 3)
    hidden = classifier.model(torch.tensor([classifier.tokenizer.encode(ALL[7])]))
    expected = classifier.model.class_logits(hidden)[0, 2:].softmax(-1)
    assert np.allclose(classifier.probabilities(ALL, "b")[7], expected.detach().numpy(), atol=1e-5)
    assert {one.label for one in classifier(ALL, "a")} <= {"x", "y"}
    with pytest.raises(UsageError, match="a, b apart: say which task"):
        classifier(ALL)


def test_models_that_are_no_classifiers_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match="is an encoder without classes"):
        Classifier(make_encoder(tmp_path / "plain"))
    with pytest.raises(UnsupportedModelError, match="multi_label_classification"):
        Classifier(make_encoder(tmp_path / "many", labels=("a", "b"), problem_type="multi_label_classification"))
    with pytest.raises(UsageError, match="is no encoder"):
        Classifier(tiny_model_dir)
    with pytest.raises(ModelNotFoundError):
        Classifier(tmp_path / "nowhere")


def test_it_labels_what_it_is_sure_of(folder: Path) -> None:
    classifier, tally = Classifier(folder), PseudoTally()
    documents = [Document(text, f"d#{n}", "web") for n, text in enumerate(ALL)]
    told = classifier(ALL)
    threshold = float(np.median([one.probability for one in told]))
    kept = list(pseudo_labels(classifier, documents, threshold, tally=tally))
    assert [(one.id, one.label) for one in kept] == [
        (f"d#{n}+pseudo", one.label) for n, one in enumerate(told) if one.probability >= threshold
    ]
    assert 0 < tally.unsure == 10 - len(kept) < 10
