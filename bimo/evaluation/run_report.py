"""report.html of a run: curves of the training, scores on text it was not trained on, and what the model writes.

    write_report(folder, recipe, [Sample("text", "The moon", "...")], [Table("5-gram model", ("", "bits"), [...])])

Everything it shows is read from the run's folder; the page is one file without scripts, in Chinese and English.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from bimo.evaluation.svg import COLOURS, picture
from bimo.recipe import Recipe
from bimo.training.session import read_metrics

__all__ = ["Sample", "Table", "render_page", "trained_words", "write_page", "write_report"]

NAMES = {"bits per byte": "每字节比特", "masked accuracy": "掩码准确率", "next sentence accuracy": "下句判断准确率",
         "accuracy": "逐词准确率", "masked nats": "掩码词的奈特"}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """kind: "text", which the model went on with, "chat", a question it answered, "pair", a source it wrote from, or
    "mask", a text whose masks it filled. others: (name, text) that stand beside the answer."""

    kind: str
    prompt: str
    answer: str
    others: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Table:
    """Figures to compare with: a title, the names of the columns, rows of texts, and a note below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_report(folder: Path, recipe: Recipe, samples: Sequence[Sample], tables: Sequence[Table] = ()) -> Path:
    """Write folder/report.html of a pretraining and return its path."""
    lineage, model, tokenizer = _lineage(folder), recipe.model, recipe.tokenizer
    facts = [
        ("model 模型", f"{model.kind}, {model.num_layers} layers, {model.hidden_size} wide, context "
                      f"{model.context_length}", ""),
        ("tokenizer 分词器", f"{tokenizer.kind}, {tokenizer.vocab_size}", ""),
        ("trained 训练量", trained_words(folder, lineage), ""),
        *(
            (f"{name.replace('_', ' ')}, {language} {NAMES.get(name.replace('_', ' '), '')}", f"{value:.3f}",
             "validation text, not trained on 验证集")
            for language, figures in lineage["scores"].items()
            for name, value in figures.items()
        ),
    ]  # fmt: skip
    return write_page(folder, recipe.name, "训练报告 · report of the run", facts, samples, tables)


def trained_words(folder: Path, lineage: dict[str, Any]) -> str:
    """ "400 steps, 1,638,400 tokens, 9,100 tokens/s"."""
    speeds = [row["tokens_per_second"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return f"{lineage['steps']} steps, {lineage['tokens']:,} tokens, {_median(speeds):,.0f} tokens/s"


def write_page(
    folder: Path,
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str, str]],
    samples: Sequence[Sample],
    tables: Sequence[Table] = (),
) -> Path:
    """Write folder/report.html: facts (name, value, note), tables, curves of folder/metrics.jsonl, samples, text."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    curves = {
        "loss": [("train", [(row["step"], row["loss"]) for row in steps])],
        **_validation_curves(rows),
        "learning rate": [("rate", [(row["step"], row["learning_rate"]) for row in steps])],
        "gradient norm": [("norm", [(row["step"], row["grad_norm"]) for row in steps])],
    }
    pictures = [
        (name, picture(partial(_curve, lines))) for name, lines in curves.items() if any(line for _, line in lines)
    ]
    parts = json.loads((folder / "data" / "manifest.json").read_text(encoding="utf-8"))["parts"]
    return render_page(folder / "report.html", title, subtitle, facts, tables, pictures, samples, parts)


def render_page(
    target: Path,
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str, str]] = (),
    tables: Sequence[Table] = (),
    pictures: Sequence[tuple[str, str]] = (),
    samples: Sequence[Sample] = (),
    parts: Sequence[dict[str, Any]] = (),
) -> Path:
    """One page of what there is. pictures: (title, SVG); parts: of a data manifest."""
    import jinja2
    from markupsafe import Markup

    template = files("bimo.evaluation").joinpath("run_report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=title, subtitle=subtitle, facts=facts, tables=tables, samples=samples, parts=parts,
        pictures=[(name, Markup(svg)) for name, svg in pictures],
    )  # fmt: skip
    target.write_text(page, encoding="utf-8", errors="replace")
    return target


def _validation_curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, list[tuple[int, float]]]]]:
    """{"bits per byte": [("zh", [(step, value), ...]), ...]} of all that was measured on validation text."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("validation/") and not key.endswith("/loss"):
                _, language, name = key.split("/")
                curves.setdefault(name.replace("_", " "), {}).setdefault(language, []).append((row["step"], value))
    return {name: list(lines.items()) for name, lines in curves.items()}


def _lineage(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "model" / "bimo.json").read_text(encoding="utf-8")))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _curve(lines: list[tuple[str, list[tuple[int, float]]]], axes: Any) -> None:
    for colour, (name, line) in zip(COLOURS, lines, strict=False):
        axes.plot(
            *zip(*line, strict=True), color=colour, linewidth=1.2, marker="." if len(line) < 30 else "", label=name
        )
    axes.set_xlabel("step")
    if len(lines) > 1:
        axes.legend(frameon=False)
