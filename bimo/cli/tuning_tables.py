"""Tables of a stage's report that are of one kind of task: how right told classes are, how well passages are found.

    table, figures = class_table(stage, place, progress) or (None, {})

Beside each stands a simple baseline on the same split: TF-IDF with a linear model.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared
from bimo.evaluation.run_report import Table
from bimo.recipe import StageRecipe
from bimo.registries.trouble import Progress

__all__ = ["class_table"]


def class_table(stage: StageRecipe, place: Path, progress: Progress) -> tuple[Table, dict[str, Any]] | None:
    """Accuracy and F1 on all validation texts of each task, of the model in place/model and of a linear one; None for a
    stage without classes."""
    from bimo.evaluation.classification import Classifier, ClassScores, score_classes
    from bimo.evaluation.linear import LinearClassifier
    from bimo.formats.huggingface import read_model_config
    from bimo.models.config import EncoderConfig
    from bimo.training.finetune import row_length

    if not (place / "model" / "config.json").is_file():
        return None
    config = read_model_config(place / "model")
    if not isinstance(config, EncoderConfig) or not config.labels:
        return None
    most = row_length(stage, config)  # positions behind it were never trained
    classifier, prepared = Classifier(place / "model", max_tokens=most), Prepared.open(place / "data")
    rows, figures = [], {}
    for task in stage.task:
        train, held_out = ([(d.text, d.label) for d in read_documents(prepared.files(split, task.name))]
                           for split in ("train", "validation"))  # fmt: skip
        if not held_out:
            continue
        texts, truth = [text for text, _ in held_out], [label for _, label in held_out]
        progress(f"telling classes of {task.name}", 0, 0)
        told = classifier(texts, task.name if len(stage.task) > 1 else None)
        linear = LinearClassifier.fit([text for text, _ in train], [label for _, label in train])(texts)
        scores: dict[str, ClassScores] = {
            name: score_classes(truth, [one.label for one in answers], [one.probability for one in answers])
            for name, answers in (("model", told), ("linear", linear))
        }
        figures[task.name] = {name: asdict(score) for name, score in scores.items()}
        for name, score in (("model 模型", scores["model"]), ("TF-IDF + linear 线性基线", scores["linear"])):
            each = ", ".join(f"{label} {value:.3f}" for label, value in score.f1.items())
            rows.append((f"{task.name}: {name}", _with_interval(score.accuracy, score.accuracy_interval),
                         _with_interval(score.macro_f1, score.macro_f1_interval), each,
                         f"{score.calibration_error or 0:.3f}"))  # fmt: skip
    if not rows:
        return None
    head = ("", "accuracy 准确率", "macro F1", "F1 of each 各类", "calibration error 校准误差")
    note = "all validation texts; intervals of 95 % by bootstrap 全部验证文本；95% 自助法区间"
    return Table("Classes 分类", head, rows, note), figures


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.4f} ({interval[0]:.4f}-{interval[1]:.4f})"
