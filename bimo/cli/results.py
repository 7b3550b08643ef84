"""What came of a run, for its report: samples of what the model writes, and what simpler models reach on the same text.

    results = gather(recipe, folder, progress)
    results.samples, results.tables

decoder, lstm   goes on with the prompts, answers the questions; beside it an n-gram model of the same text
encoder         fills in the masks of the prompts; beside it the most frequent word
seq2seq         writes from the prompts, and all held-out pairs; beside it a translation memory and a lexicon
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bimo.data.documents import read_documents
from bimo.data.pipeline import Prepared
from bimo.data.shards import TokenFile
from bimo.evaluation.run_report import Sample, Table
from bimo.recipe import Recipe
from bimo.registries.trouble import Progress
from bimo.tokenizer.load import Tokenizer

__all__ = ["Results", "gather"]

FILLINGS = 5  # words told for a mask


@dataclass
class Results:
    """samples and tables as the report shows them; figures: the same for programs."""

    samples: list[Sample] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def gather(recipe: Recipe, folder: Path, progress: Progress) -> Results:
    """All that the recipe's [report] wants of the finished model in folder/model."""
    results = Results()
    tokenizer = Tokenizer.from_directory(folder / "model")
    if recipe.model.kind == "encoder":
        results.samples += _fill_masks(recipe, folder, tokenizer)
        _add_unigrams(results, recipe, folder, tokenizer)
        return results
    _write(results, recipe, folder, progress)
    if recipe.objective_kind == "causal" and recipe.report.ngram:
        progress(f"counting {recipe.report.ngram}-grams", 0, 0)
        _add_ngrams(results, recipe, folder, tokenizer)
    return results


def _files(folder: Path, split: str) -> dict[str, TokenFile]:
    """The token files of "train" by source, of "validation" by language."""
    places = sorted((folder / "tokens").glob(f"{split}-*"))
    files = {place.name.removeprefix(f"{split}-"): TokenFile.open(place) for place in places}
    return {name: file for name, file in files.items() if len(file.tokens)}


# --- what generates ---------------------------------------------------------------------------------------------------


def _write(results: Results, recipe: Recipe, folder: Path, progress: Progress) -> None:
    import bimo

    wishes, translates = recipe.report, recipe.model.kind == "seq2seq"
    settings: dict[str, Any] = {"max_tokens": wishes.max_tokens, "temperature": 0.7, "seed": recipe.seed}
    if translates:
        settings = {"max_tokens": wishes.max_tokens, "num_beams": wishes.beams}
    with bimo.load(str(folder / "model")) as model:
        for prompt in wishes.prompts:
            kind = "pair" if translates else "text"
            results.samples.append(Sample(kind, prompt, str(model.generate(prompt, **settings))))
        for question in wishes.questions:
            answer = model.chat(question, max_tokens=wishes.max_tokens, temperature=0)
            results.samples.append(Sample("chat", question, str(answer)))
        if recipe.objective_kind == "seq2seq" and wishes.pairs:
            _add_translations(results, recipe, folder, model.backend, progress)


def _add_translations(results: Results, recipe: Recipe, folder: Path, backend: Any, progress: Progress) -> None:
    from bimo.evaluation.pairs import Pair
    from bimo.evaluation.translation import ModelTranslator, evaluate_translation

    prepared = Prepared.open(folder / "data")

    def pairs(split: str) -> list[Pair]:
        return [Pair(*document.pair) for document in read_documents(prepared.files(split)) if document.pair]

    held_out = pairs("validation")
    wanted = held_out[:: max(1, len(held_out) // recipe.report.pairs)][: recipe.report.pairs]  # over all of it
    if not wanted:
        return
    translator = ModelTranslator(
        backend,
        beams=recipe.report.beams,
        max_tokens=recipe.model.context_length,
        progress=lambda done, total: progress("writing held-out pairs", done, total),
    )
    table = evaluate_translation(translator, wanted, training_pairs=pairs("train"))
    rows = [
        (score.name, f"{score.bleu:.1f} ± {score.bleu_interval:.1f}", f"{score.chrf:.1f} ± {score.chrf_interval:.1f}")
        for score in table.scores
    ]
    note = (
        f"{table.num_pairs} held-out pairs 留出的句对; BLEU {table.bleu_signature}; chrF {table.chrf_signature}; the "
        f"source of {table.num_known} stands in the training data as well 其中源句亦见于训练集"
    )
    results.tables.append(Table("Held-out pairs 留出句对", ("", "BLEU", "chrF"), rows, note))
    results.figures["translation"] = {score.name: {"bleu": score.bleu, "chrf": score.chrf} for score in table.scores}


def _add_ngrams(results: Results, recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> None:
    from bimo.evaluation.ngram import NgramModel
    from bimo.training.validation import bytes_of_tokens

    train, validation = (_files(folder, split) for split in ("train", "validation"))
    order, sizes = recipe.report.ngram, bytes_of_tokens(tokenizer)
    model = NgramModel.train(list(train.values()), vocab_size=tokenizer.vocab_size, order=order)
    window = {"length": recipe.model.context_length, "max_tokens": recipe.training.eval_tokens}
    scores = {name: model.score(file, sizes, **window) for name, file in validation.items()}
    figures = {name: score.bits_per_byte for name, score in scores.items() if score.num_tokens}
    rows = [(name, f"{value:.3f}") for name, value in figures.items()]
    note = "Kneser-Ney, counted on the training text 由训练语料统计"
    results.tables.append(Table(f"{order}-gram model {order} 元模型", ("", "bits per byte 每字节比特"), rows, note))
    results.figures["ngram_bits_per_byte"] = figures


# --- what reads -------------------------------------------------------------------------------------------------------


def _fill_masks(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> list[Sample]:
    import torch

    from bimo.formats.huggingface import load_model

    model: Any = load_model(folder / "model")
    mask_id = tokenizer.backend.token_to_id("[MASK]")
    samples = []
    for prompt in recipe.report.prompts:
        ids = torch.tensor([tokenizer.encode(prompt)[: recipe.model.context_length]])
        with torch.inference_mode():
            hidden = model(ids)[ids == mask_id]
            probabilities, words = model.masked_logits(hidden).float().softmax(-1).topk(FILLINGS)
        fillings = (
            "  ".join(
                f"{tokenizer.token_spelling(word)} {share:.2f}"
                for word, share in zip(row.tolist(), shares.tolist(), strict=True)
            )
            for row, shares in zip(words, probabilities, strict=True)
        )
        samples.append(Sample("mask", prompt, "\n".join(fillings) or "(no [MASK] in it)"))
    return samples


def _add_unigrams(results: Results, recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> None:
    from bimo.evaluation.masked import Unigrams
    from bimo.objectives.kinds import make_objective

    _, make_loader = make_objective(recipe, tokenizer)
    train, validation = (_files(folder, split) for split in ("train", "validation"))
    unigrams = Unigrams.count(train.values(), vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids)
    figures = {}
    for name, file in validation.items():
        if len(file.tokens) < recipe.model.context_length:
            continue
        loader = make_loader([file], length=recipe.model.context_length, shuffle=False)
        rows = min(loader.num_rows[0], max(1, recipe.training.eval_tokens // loader.row_tokens))
        figures[name] = unigrams.score(loader.next_batch(rows).targets).figures["masked_accuracy"]
    table = [(name, f"{value:.3f}") for name, value in figures.items()]
    note = "always the most frequent word 总猜最常见的词"
    results.tables.append(Table("Without reading 不读上下文", ("", "masked accuracy 掩码准确率"), table, note))
    results.figures["unigram_accuracy"] = figures
