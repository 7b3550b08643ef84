"""Unlikelihood (arXiv:1908.04319): words that should not come next are made less likely.

    loss = with_penalty(answer_loss, PenaltyRecipe(repetition=0.5, listed=1.0, words=("words.txt",)), tokenizer)

    L = -log p(y_t) - Σ_c w_c log(1 - p(c))        at each learned token y_t, over its candidates c, none of them y_t

    repetition   every word of the answer so far, y_1 ... y_(t-1), once; control tokens are none
    listed       of every listed phrase its first token, anywhere, and its next one where the text so far ends in the
                 tokens before that: after "how to make a", also " bomb" of "make a bomb"

A phrase is spelled as it stands in the list and with a capital, each with and without a space before it; a text that a
tokenizer cuts in another way is not seen (吸毒品 as 吸毒 + 品 is no 毒品). First tokens are often ordinary words or
characters. They are safe at a weight of about 1: for a token whose share of the right answers is q, the loss is least
where p = q / (q + w (1 - q)), which is q for w = 1; what never is right goes to 0 faster. Larger weights push ordinary
words down as well. What the examples themselves say is still learned: clean them (clean.toxic_words) where they must
not say it.

Cross-entropy keeps no scores, so the head is computed again for the answers' tokens, a slice at a time as there: it
takes as long as the cross-entropy does, which is about a fifth of a small model's step where every token is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bimo.data.example_loader import ExampleBatch
from bimo.data.loader import IGNORED, Batch
from bimo.errors import UsageError
from bimo.models.decoder import Decoder
from bimo.models.recurrent import LSTMLanguageModel
from bimo.objectives.causal import Loss
from bimo.objectives.cross_entropy import LOGITS_AT_ONCE, SLOPES_AT_ONCE
from bimo.objectives.rows import chosen_rows
from bimo.recipe import PenaltyRecipe
from bimo.tokenizer.load import Tokenizer

__all__ = ["Candidates", "ListedPhrases", "linear_unlikelihood", "read_phrases", "with_penalty"]

FLOOR = 1e-5  # of 1 - p, as in the authors' code: beyond it the cross-entropy of the right word has the say


def with_penalty(loss: Callable[..., Loss], penalty: PenaltyRecipe, tokenizer: Tokenizer) -> Callable[..., Loss]:
    """`loss` of a decoder's batches with the penalty added while the model is in training; as it is for weights of 0.

    With R-Drop: with_penalty(with_r_drop(loss, ...), ...), each of both passes counts half. Raises UsageError for lists
    that cannot be read, and when called with a model that does not write word by word.
    """
    if not penalty.repetition and not penalty.listed:
        return loss
    listed = ListedPhrases(read_phrases(penalty.words), tokenizer) if penalty.listed else None

    def penalised(model: Any, batch: Any, *, label_smoothing: float = 0.0) -> Loss:
        if not model.training:
            return loss(model, batch, label_smoothing=label_smoothing)
        if not isinstance(model, Decoder | LSTMLanguageModel):
            raise UsageError(
                f"a penalty is for models that write an answer word by word, and this is an {type(model).__name__}: "
                f"leave [stage.penalty] out",
                "penalty",
            )
        with _outputs(model) as outputs:
            found = loss(model, batch, label_smoothing=label_smoothing)
        candidates = Candidates(batch, penalty.repetition, penalty.listed, listed, tokenizer.special_ids)
        total = found.total
        for hidden in outputs:
            total = total + _penalty(model, hidden, batch, candidates) / len(outputs)
        return replace(found, total=total)

    return penalised


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that the model gives within it: a second forward would cost as much as the first."""
    outputs: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, hidden: outputs.append(hidden))
    try:
        yield outputs
    finally:
        handle.remove()


def _penalty(model: Any, hidden: Tensor, batch: Batch, candidates: Candidates) -> Tensor:
    weight = model.embed_tokens.weight
    head = weight if model.lm_head is None else model.lm_head.get_parameter("weight")
    mixed = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if mixed else weight.dtype
    rows, _ = chosen_rows(hidden.to(dtype), torch.from_numpy(batch.targets).to(hidden.device))
    return linear_unlikelihood(rows, head, candidates)


# --- which words ----------------------------------------------------------------------------------------------------


class Candidates:
    """What is penalised at each of a batch's learned tokens, in the order of objectives.rows.chosen_rows."""

    def __init__(
        self,
        batch: Batch,
        repetition: float,
        listed: float,
        phrases: ListedPhrases | None,
        special_ids: Iterable[int] = (),
    ) -> None:
        self.repetition, self.listed = repetition, listed
        learned = batch.targets != IGNORED
        goes_on = np.zeros_like(learned)  # an answer: learned tokens one after the other, of one document
        goes_on[:, 1:] = learned[:, :-1] & (batch.segments[:, 1:] == batch.segments[:, :-1])
        answers = np.cumsum(learned & ~goes_on)[learned.ravel()]
        self.words = torch.from_numpy(batch.targets[learned])  # (N,)
        self.answers = torch.from_numpy(answers)  # (N,) ascending
        self.starts = np.searchsorted(answers, answers)  # where each one's answer begins
        factors = batch.weights[learned] if isinstance(batch, ExampleBatch) else np.ones(len(answers), np.float32)
        self.factors = torch.from_numpy(factors)
        pairs = np.stack((answers, batch.targets[learned]))
        is_first = np.zeros(len(answers), bool)
        is_first[np.unique(pairs, axis=1, return_index=True)[1]] = True
        self.is_new = torch.from_numpy(is_first & ~np.isin(pairs[1], list(special_ids)))  # repeats nothing itself
        self.firsts = torch.tensor(phrases.firsts if phrases else [], dtype=torch.long)
        rows, tokens = phrases.continuations(batch, learned) if phrases else ([], [])
        self.rows, self.tokens = np.array(rows, np.int64), torch.tensor(tokens, dtype=torch.long)

    def of(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the learned tokens from `start` to `end`: rows (M,) counted from `start`, tokens (M,), and weights
        (M,) float32. One that is repeated and listed is there twice."""
        end = min(end, len(self.words))
        if start >= end:
            nothing = torch.empty(0, dtype=torch.long)
            return nothing, nothing, torch.empty(0)
        found = []
        if self.repetition:
            first = int(self.starts[start])
            before = torch.arange(first, end) < torch.arange(start, end)[:, None]
            before &= (self.answers[first:end] == self.answers[start:end, None]) & self.is_new[first:end]
            rows, places = before.nonzero(as_tuple=True)
            found.append((rows, self.words[first + places], self.repetition))
        if self.listed:
            rows = torch.arange(end - start).repeat_interleave(len(self.firsts))
            found.append((rows, self.firsts.repeat(end - start), self.listed))
            low, high = np.searchsorted(self.rows, [start, end])
            found.append((torch.from_numpy(self.rows[low:high]) - start, self.tokens[low:high], self.listed))
        rows, tokens = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
        weights = torch.cat([torch.full((len(rows),), weight) for rows, _, weight in found])
        kept = tokens != self.words[start + rows]
        rows, tokens, weights = rows[kept], tokens[kept], weights[kept]
        return rows, tokens, weights * self.factors[start + rows]


class ListedPhrases:
    """How listed phrases begin and go on in a tokenizer's tokens.

    firsts: what any of them begins with, ascending. nexts: from tokens that one begins with to those that may follow.
    """

    def __init__(self, phrases: Iterable[str], tokenizer: Tokenizer) -> None:
        spellings = {spelling for phrase in phrases for spelling in _spellings(phrase, tokenizer)}
        self.firsts = sorted({spelling[0] for spelling in spellings})
        self.nexts: dict[tuple[int, ...], set[int]] = {}
        for spelling in spellings:
            for place in range(1, len(spelling)):
                self.nexts.setdefault(spelling[:place], set()).add(spelling[place])
        self.by_last: dict[int, list[tuple[int, ...]]] = {}
        for prefix in self.nexts:
            self.by_last.setdefault(prefix[-1], []).append(prefix)

    def continuations(self, batch: Batch, learned: Any) -> tuple[list[int], list[int]]:
        """(rows, tokens) of phrases that the text so far begins, rows numbered among the learned and ascending; those
        that begin a phrase anyway are left out."""
        numbers = np.cumsum(learned.ravel()).reshape(learned.shape) - 1
        rows, tokens = [], []
        for row, place in np.argwhere(learned & np.isin(batch.input_ids, list(self.by_last))).tolist():
            ids, segment = batch.input_ids[row], batch.segments[row, place]
            follow: set[int] = set()
            for prefix in self.by_last[int(ids[place])]:
                start = place + 1 - len(prefix)
                if start >= 0 and batch.segments[row, start] == segment and tuple(ids[start : place + 1]) == prefix:
                    follow |= self.nexts[prefix]
            follow.difference_update(self.firsts)
            rows += [int(numbers[row, place])] * len(follow)
            tokens += sorted(follow)
        return rows, tokens


def _spellings(phrase: str, tokenizer: Tokenizer) -> set[tuple[int, ...]]:
    """Behind a line's end, since SentencePiece puts a space of its own before a text."""
    before = tokenizer.encode("\n", add_special_tokens=False)
    found = set()
    for text in (phrase, phrase[:1].upper() + phrase[1:]):
        for spelled in (text, f" {text}"):
            ids = tokenizer.encode(f"\n{spelled}", add_special_tokens=False)
            if ids[: len(before)] == before:
                ids = ids[len(before) :]
            else:  # a tokenizer that joins both
                ids = tokenizer.encode(spelled, add_special_tokens=False)
            if ids and not tokenizer.special_ids.intersection(ids):
                found.add(tuple(ids))
    if not found:
        raise UsageError(
            f"the listed phrase {phrase!r:.60} has no spelling in words of {tokenizer.directory}, or is a control "
            f"token: leave it out",
            "penalty.words",
        )
    return found


def read_phrases(files: Iterable[str]) -> list[str]:
    """The lines of files, each phrase once, white space as single spaces. Raises UsageError, naming the file."""
    phrases: dict[str, None] = {}
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the list {file} is not UTF-8 (byte {error.start}): convert it first, e.g. with iconv -t utf-8",
                "penalty.words",
            ) from None
        except OSError as error:
            raise UsageError(
                f"the list {file} cannot be read ({error.strerror}): name a file with a word or phrase a line",
                "penalty.words",
            ) from None
        found = [phrase for line in lines if (phrase := " ".join(line.split()))]
        if not found:
            raise UsageError(f"the list {file} is empty: a word or phrase a line is expected", "penalty.words")
        phrases |= dict.fromkeys(found)
    return list(phrases)


# --- what it costs --------------------------------------------------------------------------------------------------


def linear_unlikelihood(hidden: Tensor, weight: Tensor, candidates: Candidates) -> Tensor:
    """-Σ w log(1 - p(c)), p = softmax(hidden weightᵀ): hidden (N, D), weight (V, D) -> a float32 scalar.

    Rows behind the candidates' last cost nothing. Number types as in `linear_cross_entropy`.
    """
    return _LinearUnlikelihood.apply(hidden, weight, candidates)


class _LinearUnlikelihood(torch.autograd.Function):
    """d(-log(1 - p_c)) / d z_j = a (1[j = c] - p_j), a = p_c / (1 - p_c)"""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, candidates: Candidates) -> Tensor:
        needed = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if needed else None
        d_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        stored, weight = weight.dtype, weight.to(hidden.dtype)
        for start in range(0, len(hidden), rows := max(16, SLOPES_AT_ONCE // len(weight))):
            part = hidden[start : start + rows]
            slopes = torch.empty((len(part), len(weight)), dtype=hidden.dtype, device=hidden.device)
            step = max(16, LOGITS_AT_ONCE // len(weight))
            for at in range(0, len(part), step):
                p = torch.softmax(part[at : at + step] @ weight.t(), 1, dtype=torch.float32)  # (n, V)
                found = candidates.of(start + at, start + at + len(p))
                places, tokens, weights = (tensor.to(hidden.device) for tensor in found)
                likely = p[places, tokens]
                left = (1 - likely).clamp(min=FLOOR)
                total -= weights @ left.log()
                odds = weights * likely / left
                p *= -torch.zeros(len(p), device=p.device).index_add_(0, places, odds)[:, None]
                slopes[at : at + step] = p.index_put_((places, tokens), odds, accumulate=True)
            if d_hidden is not None:
                torch.mm(slopes, weight, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight += slopes.t() @ part
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = stored
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0], None if d_weight is None else d_weight.mul_(grads[0]).to(ctx.dtype), None
