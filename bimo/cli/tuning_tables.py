"""Tables of a stage's report that are of one kind of task: how right told classes are, how well passages are found, how
well texts are translated.

    for tables, figures in (class_tables(recipe, stage, place, lineage, progress), ...): ...

Each is ([], {}) for a stage of another kind. Beside each stands something simple on the same validation texts: TF-IDF
with a linear model, BM25, a translation memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared
from bimo.data.records import Document
from bimo.evaluation.run_report import Table
from bimo.recipe import Recipe, StageRecipe
from bimo.registries.trouble import Progress

if TYPE_CHECKING:
    from bimo.data.noise import Kind

__all__ = ["KINDS", "class_tables", "retrieval_tables", "translation_tables"]

Found = tuple[list[Table], dict[str, Any]]
NOISY = 400  # texts that are told once more with mistakes in them
NOISE_KINDS: dict[str, tuple[Kind, ...]] = {"zh": ("homophones", "dropped"), "en": ("typos", "dropped")}
NOISE_SEEDS = 3
SEARCHED = 2000  # pairs that are looked for


def class_tables(recipe: Recipe, stage: StageRecipe, place: Path, lineage: dict[str, Any], progress: Progress) -> Found:
    """Accuracy and F1 on all validation texts of each task, of the model in place/model and of a linear one."""
    from bimo.backends.adapters import find_model
    from bimo.evaluation.classification import Classifier, ClassScores, score_classes
    from bimo.evaluation.linear import LinearClassifier
    from bimo.formats.huggingface import read_model_config
    from bimo.training.finetune import row_length

    config = read_model_config(find_model(place / "model").directory)
    most = row_length(stage, config)  # positions behind it were never trained
    classifier, prepared = Classifier(place / "model", max_tokens=most), Prepared.open(place / "data")
    rows, noisy_rows, figures = [], list[Sequence[str]](), {}
    for task in stage.task:
        train, held_out = (list(read_documents(prepared.files(split, task.name))) for split in ("train", "validation"))
        if not held_out:
            continue
        texts, truth = [document.text for document in held_out], [document.label for document in held_out]
        progress(f"telling classes of {task.name}", 0, 0)
        name = task.name if len(stage.task) > 1 else None
        told = classifier(texts, name)
        linear = LinearClassifier.fit([one.text for one in train], [one.label for one in train])
        scores: dict[str, ClassScores] = {
            kind: score_classes(truth, [one.label for one in answers], [one.probability for one in answers])
            for kind, answers in (("model", told), ("linear", linear(texts)))
        }
        figures[task.name] = {kind: asdict(score) for kind, score in scores.items()}
        for kind, score in (("model 模型", scores["model"]), ("TF-IDF + linear 线性基线", scores["linear"])):
            each = ", ".join(f"{label} {value:.3f}" for label, value in score.f1.items())
            rows.append((f"{task.name}: {kind}", _with_interval(score.accuracy, score.accuracy_interval),
                         _with_interval(score.macro_f1, score.macro_f1_interval), each,
                         f"{score.calibration_error or 0:.3f}"))  # fmt: skip
        if recipe.report.noise:
            scorers = {"model": _accuracy(classifier, name), "linear": _accuracy(linear)}
            figures[task.name]["noise"] = _under_noise(
                task.name, recipe.report.noise, scorers, held_out, noisy_rows, progress
            )
    if not rows:
        return [], {}
    head = ("", "accuracy 准确率", "macro F1", "F1 of each 各类", "calibration error 校准误差")
    note = "all validation texts; intervals of 95 % by bootstrap 全部验证文本；95% 自助法区间"
    tables = [Table("Classes 分类", head, rows, note)]
    if noisy_rows:
        note = f"mistakes in {recipe.report.noise:.0%} of the words, at most {NOISY} texts 部分词语有误的文本"
        tables.append(
            Table("Under noise 含噪文本", ("", "accuracy 准确率", "TF-IDF + linear 线性基线"), noisy_rows, note)
        )
    return tables, {"classes": figures}


def _accuracy(classify: Any, *task: str | None) -> Any:
    def score(documents: Sequence[Document]) -> dict[str, float]:
        told = classify([document.text for document in documents], *task)
        hits = [one.label == document.label for one, document in zip(told, documents, strict=True)]
        return {"accuracy": sum(hits) / len(hits)}

    return score


def _under_noise(
    task: str,
    share: float,
    scorers: dict[str, Any],
    held_out: Sequence[Document],
    rows: list[Sequence[str]],
    progress: Progress,
) -> dict[str, Any]:
    """{kind of noise: {who: accuracy}}, and rows for the table; kinds that suit the text's language."""
    from bimo.data.language import identify
    from bimo.evaluation.robustness import noisy_scores

    some = held_out[:: max(1, len(held_out) // NOISY)][:NOISY]
    language = identify("\n".join(document.text[:200] for document in some[:50]))
    kinds = NOISE_KINDS.get(language, ("dropped",))
    tables = {
        name: noisy_scores(score, some, shares=(0, share), kinds=kinds, seeds=NOISE_SEEDS, progress=progress)
        for name, score in scorers.items()
    }
    figures: dict[str, Any] = {}
    for row, beside in zip(tables["model"].rows, tables["linear"].rows, strict=True):
        own, linear = row.scores["accuracy"], beside.scores["accuracy"]
        figures[row.kind] = {"model": own.mean, "linear": linear.mean}
        rows.append((f"{task}: {row.kind}", f"{own.mean:.4f}", f"{linear.mean:.4f}"))
    return figures


def retrieval_tables(
    recipe: Recipe, stage: StageRecipe, place: Path, lineage: dict[str, Any], progress: Progress
) -> Found:
    """How well the held-out queries find their passages: by words alone, by the base, by the model in place/model."""
    from bimo.backends.embedding import Embedder
    from bimo.evaluation.pairs import Pair
    from bimo.evaluation.retrieval import METRICS, Bm25, Ranker, dense, evaluate_retrieval

    prepared = Prepared.open(place / "data")
    found = [
        Pair(*(document.pair or (document.title, document.text)))
        for document in read_documents(prepared.files("validation"))
    ]
    pairs = [pair for pair in found if pair.source.strip() and pair.target.strip()]
    pairs = pairs[:: max(1, len(pairs) // SEARCHED)][:SEARCHED]
    if not pairs:
        return [], {}
    wish = stage.embedding
    prefixes = {"query_prefix": wish.query_prefix, "passage_prefix": wish.passage_prefix}
    progress(f"looking for {len(pairs)} passages", 0, 0)
    with Embedder.load(lineage["parent"]) as before, Embedder.load(str(place / "model")) as after:
        rankers: dict[str, Ranker] = {"bm25": Bm25, "before": dense(before, **prefixes)}
        table = evaluate_retrieval(rankers | {"after": dense(after, **prefixes)}, pairs)
    rows: list[Sequence[str]] = []
    figures: dict[str, Any] = {}
    for score in table.scores:
        means = {metric: interval.mean for metric, interval in score.metrics.items()}
        figures.setdefault(score.language, {})[score.name] = means
        cells = (f"{value.mean:.3f} ({value.low:.3f}-{value.high:.3f})" for value in score.metrics.values())
        rows.append((f"{score.language} ({score.num_queries}): {score.name}", *cells))
    for language in table.languages:
        gain = table.gain("before", "after", language, "recall@5")
        figures[language]["gain"] = {"recall@5": tuple(gain)}
        rows.append(
            (f"{language}: gain 提升 recall@5", f"{gain.mean:+.3f} ({gain.low:+.3f}-{gain.high:+.3f})", *[""] * 4)
        )
    note = (
        f"each of the held-out queries among {table.num_passages} passages; intervals of 95 % by bootstrap "
        f"留出的查询在全部段落中检索；95% 自助法区间"
    )
    return [Table("Retrieval 检索", ("", *METRICS), rows, note)], {"retrieval": figures}


def translation_tables(
    recipe: Recipe, stage: StageRecipe, place: Path, lineage: dict[str, Any], progress: Progress
) -> Found:
    """BLEU and chrF of held-out pairs: by the base, by the model in place/model, by what a memory would say."""
    import bimo
    from bimo.evaluation.pairs import Pair
    from bimo.evaluation.translation import ModelTranslator, TranslationScore, evaluate_translation

    prepared = Prepared.open(place / "data")
    rows: list[Sequence[str]] = []
    figures: dict[str, Any] = {}
    for task in stage.task:
        held_out, train = (
            [Pair(*document.pair) for document in read_documents(prepared.files(split, task.name)) if document.pair]
            for split in ("validation", "train")
        )
        wanted = held_out[:: max(1, len(held_out) // max(1, recipe.report.pairs))][: recipe.report.pairs]
        if not wanted:
            continue
        scores = list[TranslationScore]()
        for name, reference in (("before", lineage["parent"]), ("after", str(place / "model"))):
            with bimo.load(reference) as model:
                translator = ModelTranslator(
                    model.backend,
                    beams=recipe.report.beams,
                    progress=partial(progress, f"translating {task.name}, {name}"),
                )
                known = train if name == "after" else ()
                scores += evaluate_translation(translator, wanted, name=name, training_pairs=known).scores
        figures[task.name] = {score.name: {"bleu": score.bleu, "chrf": score.chrf} for score in scores}
        rows += [
            (f"{task.name}: {score.name}", f"{score.bleu:.1f} ± {score.bleu_interval:.1f}",
             f"{score.chrf:.1f} ± {score.chrf_interval:.1f}")
            for score in scores
        ]  # fmt: skip
    note = f"at most {recipe.report.pairs} held-out pairs of each task, {recipe.report.beams} beams 留出句对"
    tables = [Table("Held-out pairs 留出句对", ("", "BLEU", "chrF"), rows, note)] if rows else []
    return tables, {"translation": figures} if figures else {}


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.4f} ({interval[0]:.4f}-{interval[1]:.4f})"


KINDS = {"classes": class_tables, "embeddings": retrieval_tables, "pairs": translation_tables}
