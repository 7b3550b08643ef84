"""Which objective a recipe means: its loss, and the loader of its batches.

loss, make_loader = make_objective(recipe, tokenizer)
loader = make_loader([TokenFile.open(folder)], length=128, seed=0)
loss(model, loader.next_batch(8)).total.backward()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bimo.data.loader import PackedLoader, RowLoader
from bimo.data.pairs import PairLoader
from bimo.errors import UsageError
from bimo.objectives.causal import Loss, causal_loss
from bimo.objectives.denoising import DenoisingLoader
from bimo.objectives.masked_rows import MaskedLoader, MaskTokens, bert_loss
from bimo.objectives.r_drop import with_r_drop
from bimo.objectives.seq2seq import seq2seq_loss
from bimo.recipe import ObjectiveRecipe, Recipe
from bimo.tokenizer.load import Tokenizer
from bimo.tokenizer.train import MASK, PAD, SENTINELS

__all__ = ["KINDS", "Objective", "make_objective"]

Objective = tuple[Callable[..., Loss], Callable[..., RowLoader]]


def make_objective(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    """Raises UsageError for a tokenizer that lacks what the objective needs."""
    loss, make_loader = KINDS[recipe.objective_kind](recipe, tokenizer)
    return with_r_drop(loss, recipe.objective.r_drop), make_loader


def _causal(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    if tokenizer.backend.token_to_id("[CLS]") is not None:
        raise UsageError(
            'a wordpiece tokenizer is for encoders, this model generates text: set tokenizer.kind to "bpe"', "tokenizer"
        )
    return causal_loss, PackedLoader


def _masked(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    wish = recipe.objective
    settings: dict[str, Any] = {"whole_words": wish.whole_words, "next_sentence": wish.next_sentence}
    return bert_loss, partial(MaskedLoader, tokens=MaskTokens.of(tokenizer), share=wish.share, **settings)


def _seq2seq(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    return seq2seq_loss, partial(PairLoader, start_id=_token(tokenizer, PAD))


def _denoise(recipe: Recipe, tokenizer: Tokenizer) -> Objective:
    wish: ObjectiveRecipe = recipe.objective
    spans = recipe.model.family == "t5"
    return seq2seq_loss, partial(
        DenoisingLoader,
        share=wish.share,
        mean_span=wish.mean_span,
        sentinels=[_token(tokenizer, name) for name in SENTINELS] if spans else (),
        mask_id=_token(tokenizer, MASK),
        end_id=tokenizer.eos_token_ids[0],
        start_id=_token(tokenizer, PAD),
    )


def _token(tokenizer: Tokenizer, name: str) -> int:
    if (token := tokenizer.backend.token_to_id(name)) is None:
        raise UsageError(
            f"{tokenizer.directory} has no {name} token, which an encoder-decoder needs: learn a bpe or unigram "
            f"tokenizer with this recipe",
            "tokenizer",
        )
    return int(token)


KINDS: dict[str, Callable[[Recipe, Tokenizer], Objective]] = {
    "causal": _causal,
    "masked": _masked,
    "seq2seq": _seq2seq,
    "denoise": _denoise,
}
