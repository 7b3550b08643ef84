"""What another labelled text is worth, and whether choosing it (`bimo data select`) is better than chance.

    python -m benchmarks.learning_curve recipes/topics.toml                        # the first task of the first stage
    python -m benchmarks.learning_curve recipes/spam.toml --counts 50 100 200 400 --seeds 5

The stage's training examples are the pool, whose labels are looked at only where a method chose the text; each model is
trained anew from the stage's base, `--epochs` over what is labelled, and scored on the stage's validation examples.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bimo.cli.follow import note
from bimo.cli.train import fit_stage
from bimo.cli.tuning import StageData, open_stage_base, prepare_stage, task_documents
from bimo.data.selection import METHODS
from bimo.errors import UsageError
from bimo.evaluation.classification import Classifier, score_classes
from bimo.evaluation.learning_curve import Numbers, Trained, curve_lines, learning_curve
from bimo.evaluation.linear import LinearClassifier
from bimo.recipe import load_recipe
from bimo.runtime import Ranks
from bimo.training.session import Texts


def quiet(label: str, done: int, total: int) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--counts", nargs="+", type=int, default=[50, 100, 200])
    parser.add_argument("--methods", nargs="+", default=["random", "margin", "uncertainty+diversity"], choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--pool", type=int, default=1000, help="texts of the pool at most")
    parser.add_argument("--held-out", type=int, default=500, help="validation texts at most")
    arguments = parser.parse_args()

    wishes = [f"stage.0.training.epochs={arguments.epochs}", "stage.0.training.eval_every=100000"]
    recipe = load_recipe(arguments.recipe, wishes)
    stage = recipe.stage[0].model_copy(update={"task": recipe.stage[0].task[:1]})
    task = stage.task[0]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        base = open_stage_base(recipe, stage, place, quiet)
        prepared = prepare_stage(stage, place, workers=None, progress=quiet)
        data = StageData(recipe, stage, place, base, prepared, quiet)
        pool, held_out = (list(task_documents(prepared, split, task)) for split in ("train", "validation"))
        for documents in (pool, held_out):
            random.Random(0).shuffle(documents)
        pool, held_out = pool[: arguments.pool], held_out[: arguments.held_out]
        truth = [document.label for document in held_out]

        def train_and_score(chosen: Numbers, seed: int) -> Trained:
            folder = place / "training"
            shutil.rmtree(folder, ignore_errors=True)
            file = data.write(f"train-{task.name}", lambda: [pool[number] for number in chosen], repr(chosen.tolist()))
            texts = Texts({task.name: file}, {}, base.tokenizer)
            seeded = recipe.model_copy(update={"seed": seed})
            fit_stage(seeded, stage, folder, data, texts, Ranks())
            classifier = Classifier(folder / "model", max_tokens=data.length)
            told = classifier([document.text for document in held_out])
            score = score_classes(truth, [one.label for one in told]).macro_f1
            note(f"{len(chosen)} texts, seed {seed}: macro F1 {score:.4f}")

            def read(numbers: Numbers) -> Any:
                return classifier.read([pool[number].text for number in numbers])

            return Trained(score, read)

        points = learning_curve(train_and_score, len(pool), arguments.counts, arguments.methods, range(arguments.seeds))
        print(f"macro F1 of {len(held_out)} held-out texts, mean of {arguments.seeds} seeds; pool of {len(pool)}")
        print("\n".join(curve_lines(points)))
        for count in arguments.counts:
            scores = []
            for seed in range(arguments.seeds):
                some = [pool[number] for number in np.random.default_rng(seed).permutation(len(pool))[:count]]
                with contextlib.suppress(UsageError):  # of one class only
                    linear = LinearClassifier.fit([one.text for one in some], [one.label for one in some])
                    told = linear([document.text for document in held_out])
                    scores.append(score_classes(truth, [one.label for one in told]).macro_f1)
            print(f"TF-IDF + linear, {count} random texts: {np.mean(scores):.4f}")


if __name__ == "__main__":
    main()
