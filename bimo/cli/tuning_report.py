"""report.html of a stage: what it bought. Scores before and after, what was forgotten, answers side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bimo.cli.tuning import augmented_copies, left_out
from bimo.cli.tuning_tables import KINDS
from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared
from bimo.data.records import Document, Message
from bimo.evaluation.run_report import Sample, Table, trained_words, write_page
from bimo.recipe import Recipe, StageRecipe
from bimo.registries.trouble import Progress
from bimo.training.finetune import GENERAL
from bimo.training.session import read_metrics

__all__ = ["write_stage_report"]

UNITS = {  # of the loss, by what is learned
    "answers": ("nats a token", "每词元奈特"),
    "pairs": ("nats a token", "每词元奈特"),
    "classes": ("nats a text", "每文本奈特"),
    "embeddings": ("nats a query", "每查询奈特"),
}
LISTED = 20  # of what is left out
SHOWN = 8  # answers of a task, side by side
SCORED = 32  # answers of a task that are written for ROUGE-L


def write_stage_report(recipe: Recipe, stage: StageRecipe, folder: Path, kind: str) -> dict[str, Any]:
    """Write the stage's report.html; its path, the figures, and a line for people of each.

    kind: what the stage learned, a key of training.stage_kinds.STAGE_KINDS.
    """
    from bimo.cli.terminal import progress_display

    place = folder / stage.name
    lineage = json.loads((place / "model" / "bimo.json").read_text(encoding="utf-8"))
    table, figures = _losses(*_first_and_last(place), kind)
    samples = list[Sample]()
    with progress_display() as progress:
        if kind == "answers":
            tables, found = _answers(recipe, stage, place, lineage, samples, progress)
        else:
            tables, found = KINDS[kind](recipe, stage, place, lineage, progress)
    figures |= found
    if augmented := augmented_copies(place, stage):
        figures["augmented"] = augmented
        tables = [_copies(augmented), *tables]
    number, why = left_out(place, Prepared.open(place / "data"))
    if number:
        figures["left_out"] = number
        tables.append(_not_used(number, why))
    facts = [
        ("base 基座", lineage.get("parent", ""), ""),
        ("adapter 适配器", stage.adapter.kind if stage.adapter else "none: all weights 无：全部权重", ""),
        ("trained weights 训练的权重", f"{lineage.get('trained', 0):,} of {lineage.get('parameters', 0):,}", ""),
        ("trained 训练量", trained_words(place, lineage), ""),
    ]
    title = f"{recipe.name} · {stage.name}"
    page = write_page(place, title, "微调报告 · report of the stage", facts, samples, [table, *tables])
    return {"report": str(page), "figures": figures, "lines": _lines(figures, UNITS[kind][0])}


def _lines(figures: dict[str, Any], unit: str) -> dict[str, str]:
    """A line for people of each task or language."""
    lines = {name: f"{row['before']:.3f} -> {row['after']:.3f} {unit}" for name, row in figures["loss"].items()}
    for name, row in figures.get("classes", {}).items():
        lines[name] += (
            f"; accuracy {row['model']['accuracy']:.4f}, macro F1 {row['model']['macro_f1']:.4f} (TF-IDF and a "
            f"linear model: {row['linear']['accuracy']:.4f}, {row['linear']['macro_f1']:.4f})"
        )
    for name, row in figures.get("rouge_l", {}).items():
        lines[name] += f", ROUGE-L {row['before']:.3f} -> {row['after']:.3f}"
    for name, row in figures.get("translation", {}).items():
        before, after = row["before"], row["after"]
        lines[name] += (
            f", BLEU {before['bleu']:.1f} -> {after['bleu']:.1f}, chrF {before['chrf']:.1f} -> {after['chrf']:.1f}"
        )
    for language, row in figures.get("retrieval", {}).items():
        before, after, words = (row[name]["recall@5"] for name in ("before", "after", "bm25"))
        lines[f"search {language}"] = f"recall@5 {before:.3f} -> {after:.3f} (BM25 {words:.3f})"
    return lines


def _copies(augmented: dict[str, dict[str, dict[str, int]]]) -> Table:
    rows = [
        (f"{task}: {kind}", f"{count:,}", "dropped 舍弃" if what == "dropped" else "")
        for task, made in augmented.items()
        for what in ("copies", "dropped")
        for kind, count in made[what].items()
    ]
    note = "of training examples only, each with the id of its example 仅训练样例，编号含原样例"
    return Table("Altered copies 改写副本", ("", "examples 样例", ""), rows, note)


def _not_used(number: int, why: list[tuple[str, str]]) -> Table:
    shown = why[:LISTED]
    note = "rows that cannot be read, examples longer than a row 读不了的行，长过一行的样例"
    note += f"; the first {len(shown)} of {number:,} places" if number > len(shown) else ""
    return Table("Left out 未用", ("", "why 原因"), shown, note)


def _first_and_last(place: Path) -> tuple[dict[str, float], dict[str, float]]:
    """{task: nats a token} before the first step and of the model that was kept."""
    rows = [
        {key.split("/")[1]: value for key, value in row.items() if key.endswith("/loss")}
        for row in read_metrics(place / "metrics.jsonl")
        if any(key.startswith("validation/") for key in row)
    ]
    return (rows[0], rows[-1]) if rows else ({}, {})


def _losses(before: dict[str, float], after: dict[str, float], kind: str) -> tuple[Table, dict[str, Any]]:
    loss = {name: {"before": before[name], "after": after[name]} for name in after if name in before}
    rows = [
        (name if name != GENERAL else "general 通用（遗忘）", f"{row['before']:.3f}", f"{row['after']:.3f}",
         f"{row['after'] - row['before']:+.3f}")
        for name, row in loss.items()
    ]  # fmt: skip
    note = "{} of validation examples, never trained on 验证集样例的{}".format(*UNITS[kind])
    if GENERAL in loss:
        note += "; a higher general loss is what was forgotten 通用损失升高即遗忘"
    head = ("", "before 之前", "after 之后", "change 变化")
    return Table("Before and after 前后对比", head, rows, note), {"loss": loss}


def _answers(
    recipe: Recipe,
    stage: StageRecipe,
    place: Path,
    lineage: dict[str, Any],
    samples: list[Sample],
    progress: Progress,
) -> tuple[list[Table], dict[str, Any]]:
    """Held-out questions, answered by the base and by the tuned model; nothing where no task has any."""
    import bimo
    from bimo.evaluation.answers import rouge_l, write_answers

    chosen = {name: documents for name, documents in _held_out(stage, place).items() if documents}
    if not chosen or not recipe.report.pairs:
        return [], {}
    questions = [document.messages[:-1] for documents in chosen.values() for document in documents]
    references = [document.messages[-1].content for documents in chosen.values() for document in documents]
    written: list[list[str]] = []
    for label, reference in (("answers of the base", lineage["parent"]), ("answers after it", str(place / "model"))):
        with bimo.load(reference, progress=progress) as model:
            limit = recipe.report.max_tokens
            written.append(write_answers(model, questions, max_tokens=limit, progress=progress, label=label))
    scores: dict[str, Any] = {}
    rows: list[Sequence[str]] = []
    start = 0
    for name, documents in chosen.items():
        part = slice(start, start := start + len(documents))
        old, new = (rouge_l(texts[part], references[part]) for texts in written)
        scores[name] = {"before": old.mean, "after": new.mean, "interval": max(old.interval, new.interval)}
        rows.append((name, f"{old.mean:.3f} ± {old.interval:.3f}", f"{new.mean:.3f} ± {new.interval:.3f}"))
        for number in range(part.start, min(part.start + SHOWN, part.stop)):
            others = (("before 之前", written[0][number]), ("by people 参考", references[number]))
            samples.append(Sample("compared", _shown(questions[number]), written[1][number], others))
    note = f"{len(references)} held-out questions, greedy answers of at most {recipe.report.max_tokens} tokens"
    return [Table("ROUGE-L", ("", "before 之前", "after 之后"), rows, note)], {"rouge_l": scores}


def _held_out(stage: StageRecipe, place: Path) -> dict[str, list[Document]]:
    """Evenly over each task's validation dialogues."""
    prepared = Prepared.open(place / "data")
    chosen = {}
    for task in stage.task:
        found = [document for document in read_documents(prepared.files("validation", task.name)) if document.messages]
        chosen[task.name] = found[:: max(1, len(found) // SCORED)][:SCORED]
    return chosen


def _shown(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role != "system")
