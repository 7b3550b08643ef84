"""Means, intervals and differences of a comparison, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bimo.evaluation.comparison import Comparison, costs, measured, write_comparison

VARIANTS = {
    "plain": [{"accuracy, 中文": 0.5}, {"accuracy, 中文": 0.6}, {"accuracy, 中文": 0.7}],
    "fgm": [{"accuracy, 中文": 0.6}, {"accuracy, 中文": 0.7}, {"accuracy, 中文": 0.8}],
    "other": [{"accuracy, 中文": 0.7}, {"accuracy, 中文": 0.5}, {}],
}


def comparison() -> Comparison:
    spent = {name: [{"trained": 1000.0, "seconds": 2.0}, {"seconds": 4.0}] for name in VARIANTS}
    return Comparison(VARIANTS, {"linear": {"accuracy, 中文": 0.65}}, spent)


def test_the_interval_is_students_and_differences_are_seed_by_seed() -> None:
    found = comparison()
    plain = found.interval("plain", "accuracy, 中文")
    assert plain is not None and plain.mean == pytest.approx(0.6)
    assert plain.half == pytest.approx(4.302652729696142 * 0.1 / math.sqrt(3))
    gain = found.difference("fgm", "accuracy, 中文")  # seeds differ much, the choice always buys 0.1
    assert gain is not None and gain.mean == pytest.approx(0.1) and gain.half == pytest.approx(0, abs=1e-9)
    other = found.difference("other", "accuracy, 中文")  # of the two seeds that both have
    assert other is not None and other.mean == pytest.approx(0.05)
    assert found.difference("plain", "accuracy, 中文") is None
    rows = {row[1]: row for row in found.rows()}
    assert rows["fgm"][3].endswith("*") and not rows["other"][3].endswith("*")
    assert rows["(linear)"][2] == "0.6500"


def test_the_table_and_the_page(tmp_path: Path) -> None:
    lines = comparison().lines()
    assert lines[0].split() == ["MEASURED", "VARIANT", "MEAN", "OF", "3", "DIFFERENCE"]
    assert "1,000" in lines[-1] and lines[-1].split()[-1] == "3"
    page = write_comparison(tmp_path, "<b>&", comparison()).read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "accuracy, 中文" in page and page.count("<svg") == 1


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    one = Comparison({"a": [{"loss": 1.0}], "b": [{"loss": 0.5}]}, {}, {"a": [{}], "b": [{}]})
    assert [row[2:] for row in one.rows()] == [["1.0000", ""], ["0.5000", "-0.5000"]]
    assert write_comparison(tmp_path, "one", one).is_file()


def test_what_a_report_measured() -> None:
    classes = {"model": {"accuracy": 0.9, "macro_f1": 0.8}, "linear": {"accuracy": 0.7, "macro_f1": 0.6},
               "noise": {"clean": {"model": 0.9, "linear": 0.7}, "typos": {"model": 0.5, "linear": 0.4}}}  # fmt: skip
    metrics = {"recall@5": 0.5, "MRR": 0.4}
    figures = {
        "loss": {"zh": {"before": 3.0, "after": 2.0}},
        "classes": {"zh": classes},
        "rouge_l": {"zh": {"before": 0.1, "after": 0.2, "interval": 0.01}},
        "translation": {"zh": {"before": {"bleu": 1.0, "chrf": 2.0}, "after": {"bleu": 3.0, "chrf": 4.0}}},
        "retrieval": {"en": {"bm25": metrics, "before": metrics, "after": metrics, "gain": {}}},
    }
    rows = measured(figures)
    assert rows["after"]["accuracy, zh with typos"] == 0.5 and rows["linear"]["accuracy, zh"] == 0.7
    assert rows["before"]["ROUGE-L, zh"] == 0.1 and rows["after"]["chrF, zh"] == 4.0
    assert rows["bm25"] == {"recall@5, en": 0.5, "MRR, en": 0.4}
    assert costs({"trained": 5, "seconds": 1.5, "peak_memory": None}) == {"trained": 5.0, "seconds": 1.5}
