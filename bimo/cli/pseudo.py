"""Rounds of pseudo-labels in a stage: a trained model labels texts that nobody has, and the next one learns from them.

    texts, tally = add_pseudo_labels(data, texts, teacher / "model", 0, progress)

folder/NAME/unlabelled/    the texts, cleaned                      (data.pipeline)
            teacher-0/     the first model; in the stage's own folder lies the last
            tokens/train-pseudo-0/
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.data.documents import read_documents
from bimo.data.labels import PseudoTally, pseudo_labels
from bimo.data.pipeline import Prepared, prepare
from bimo.data.records import Document
from bimo.errors import DataError
from bimo.recipe import DataRecipe, PseudoLabelRecipe, StageRecipe
from bimo.registries.trouble import Progress

if TYPE_CHECKING:
    from bimo.cli.tuning import StageData
    from bimo.training.session import Texts

__all__ = ["add_pseudo_labels", "prepare_unlabelled"]


def prepare_unlabelled(stage: StageRecipe, wish: PseudoLabelRecipe, folder: Path, progress: Progress) -> Prepared:
    """The texts to be labelled, under folder/unlabelled. Raises DataError when there are none."""
    recipe = DataRecipe(sources=(wish.source,), clean=stage.clean, validation=0.0, passage_chars=stage.passage_chars)
    prepared = prepare(recipe, folder / "unlabelled", progress=progress)
    if not prepared.files("train"):
        raise DataError(f"no text of {wish.source.name} was left to label: {folder / 'unlabelled' / 'manifest.html'} "
                        f"says which step took them")  # fmt: skip
    return prepared


def add_pseudo_labels(
    data: StageData, texts: Texts, teacher: Path, number: int, progress: Progress
) -> tuple[Texts, dict[str, Any]]:
    """The stage's texts, and those of which the model in `teacher` is sure; and how many of each class those are.

    Texts that stand in the stage's own examples are passed over: validation text is never learned, and people's labels
    are better. Raises DataError when the model is sure of none.
    """
    from bimo.evaluation.classification import Classifier
    from bimo.training.finetune import PSEUDO, pseudo_folder

    stage, wish = data.stage, data.stage.pseudo_labels
    assert wish is not None
    prepared = prepare_unlabelled(stage, wish, data.folder, progress)
    known = {document.text.strip() for split in ("train", "validation") for document in data.documents(split)}
    place = data.folder / "tokens" / pseudo_folder(number)
    task = wish.task if len(stage.task) > 1 else None  # of one task classes have plain names
    tally, count = PseudoTally(), 0

    def unlabelled() -> Iterator[Document]:
        nonlocal count
        for document in read_documents(prepared.files("train")):
            if document.text.strip() not in known:
                count += 1
                progress(f"labelling {wish.source.name}", count, 0)
                yield document

    def sure() -> Iterator[Document]:
        classifier = Classifier(teacher, max_tokens=data.length)
        yield from pseudo_labels(classifier, unlabelled(), wish.threshold, tally=tally, task=task)

    lineage = json.loads((teacher / "bimo.json").read_text(encoding="utf-8"))
    mark = f"{lineage['mark']} {prepared.manifest['mark']} {wish.model_dump_json()}"
    file = data.write(place.name, sure, mark, chosen=False)
    about = place / "tally.json"
    if count or not about.is_file():
        kept = {"kept": dict(tally.kept), "unsure": tally.unsure, "in the examples": _num(prepared) - count}
        about.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    told = json.loads(about.read_text(encoding="utf-8"))
    if not told["kept"] and not told["unsure"]:
        raise DataError(f"all texts of {wish.source.name} stand in the examples already: name other texts, or leave "
                        f"pseudo_labels out")  # fmt: skip
    if not told["kept"]:
        raise DataError(
            f"the model is sure of none of {told['unsure']} texts of {wish.source.name}: lower "
            f"pseudo_labels.threshold ({wish.threshold:g}), or train longer"
        )
    classes = ", ".join(f"{name} {number}" for name, number in sorted(told["kept"].items()))
    told["about"] = (
        f"{sum(told['kept'].values())} texts are labelled ({classes}), {told['unsure']} are not sure enough, "
        f"{told['in the examples']} stand in the examples"
    )
    return replace(texts, train={**texts.train, PSEUDO: file}), told


def _num(prepared: Prepared) -> int:
    return sum(part["documents"] for part in prepared.manifest["parts"] if part["split"] == "train")
