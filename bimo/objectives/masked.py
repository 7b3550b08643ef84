"""Masked language modelling and next sentence prediction, the two objectives of BERT (arXiv:1810.04805).

    masked, labels = mask_tokens(ids, special_ids=[0, 101, 102], mask_id=103, vocab_size=21128, generator=generator)
    hidden = encoder(masked, attention_mask, segments)
    chosen = labels != IGNORED
    loss = masked_loss(encoder.masked_logits(hidden[chosen]), labels[chosen])
    loss = loss + next_sentence_loss(encoder.next_sentence_logits(hidden), labels_of_the_pairs)

    L_MLM = -Σ log p(x_t | x with masks), over the chosen t;   L_NSP = -log p(is the next, or is not)

Whole words (`word_numbers`, for `word_ids`): all pieces of a word are hidden together, else the rest of 自然语言 gives
the hidden character away (arXiv:1906.08101).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bimo.data.loader import IGNORED
from bimo.errors import MissingDependencyError, UsageError

__all__ = ["HAN_TEXT", "IGNORED", "mask_tokens", "masked_loss", "next_sentence_loss", "word_numbers"]

MASKED, RANDOM = 0.8, 0.1  # of the chosen: hidden, replaced; the rest is kept, so that words seen are modelled too

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HAN_TEXT = re.compile(f"[{HAN}]+")
WORDS = re.compile(rf"[{HAN}]+|[^\W{HAN}]+|[^\w\s]")


def mask_tokens(
    input_ids: Tensor,
    *,
    special_ids: Collection[int],
    mask_id: int,
    vocab_size: int,
    share: float = 0.15,
    word_ids: Tensor | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict: (B, T) ids -> (ids with most of them hidden, labels; IGNORED where nothing is asked).

    Of a row's tokens that are not special, `share` are chosen, to the nearest whole number and at least one. Of these
    80 % become [MASK], 10 % a random token that is not special, 10 % stay as they are; each draws for itself, also
    within a word. The same generator state gives the same result.

    Args:
        special_ids: never chosen and never drawn: [CLS], [SEP], [PAD], [MASK], ...
        word_ids: (B, T) word of each token, negative for a token of its own; tokens of one row that share a number are
            chosen together. None: each token is a word.
        generator: on the CPU; the draws are made there, so that every device sees the same ones.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share must be above 0 and at most 1, not {share}", "share")
    if word_ids is not None and word_ids.shape != input_ids.shape:
        raise UsageError(f"word_ids has the shape {tuple(word_ids.shape)}, input_ids {tuple(input_ids.shape)}")
    special = torch.tensor(sorted({*special_ids, mask_id}), dtype=torch.long)
    ordinary = torch.ones(vocab_size, dtype=torch.bool)
    if special[0] < 0 or special[-1] >= vocab_size:
        raise UsageError(f"mask_id and special_ids must be from 0 to {vocab_size - 1}, not {special.tolist()}")
    ordinary[special] = False
    replacements = ordinary.nonzero().squeeze(1)
    if not len(replacements):
        raise UsageError(f"all {vocab_size} tokens are special: there is nothing to draw a random one from")

    ids = input_ids.cpu()
    usable = ~torch.isin(ids, special)
    chosen = torch.stack([
        _choose(places, None if word_ids is None else word_ids[row].cpu(), share, generator)
        for row, places in enumerate(usable)
    ])  # fmt: skip
    draws = torch.rand(ids.shape, generator=generator)
    drawn = replacements[torch.randint(len(replacements), ids.shape, generator=generator)].to(ids.dtype)
    masked = torch.where(chosen & (draws < MASKED), mask_id, ids)
    masked = torch.where(chosen & (draws >= MASKED) & (draws < MASKED + RANDOM), drawn, masked)
    labels = torch.where(chosen, ids, IGNORED)
    return masked.to(input_ids.device), labels.to(input_ids.device)


def _choose(usable: Tensor, word_ids: Tensor | None, share: float, generator: torch.Generator) -> Tensor:
    """Which tokens of one row, (T,): words in random order, while the middle of the next one lies within the share."""
    places = usable.nonzero().squeeze(1)
    words = torch.full_like(places, -1) if word_ids is None else word_ids[places].long()
    alone = words < 0
    words = torch.where(alone, words.clamp(min=-1).max() + 1 + places, words) if len(words) else words
    _, word_of, lengths = words.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(lengths), generator=generator)
    middles = lengths[order].cumsum(0) - lengths[order] / 2
    num_chosen = max(1, int((middles <= share * len(places)).sum()))
    chosen = torch.zeros_like(usable)
    chosen[places] = torch.isin(word_of, order[:num_chosen])
    return chosen


def masked_loss(
    logits: Tensor, labels: Tensor, *, reduction: Literal["mean", "sum"] = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """-log p of the hidden words, in nats: logits (..., V), labels (...) with IGNORED where nothing is asked.

    Two words predicted with 0.1 and 0.2 cost -(ln 0.1 + ln 0.2) = 3.912 as a sum, half of it as the mean. Nothing asked
    costs 0, and has a gradient of 0.
    """
    total = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (labels != IGNORED).sum().clamp(min=1) if reduction == "mean" else total


def next_sentence_loss(logits: Tensor, labels: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """-log p of the relation: logits (B, 2), labels (B,), 0 where the second follows the first, else 1 (or IGNORED).

    It judges the pair; it does not predict the next sentence's words.
    """
    return F.cross_entropy(logits.float(), labels, reduction=reduction, ignore_index=IGNORED)


def word_numbers(
    text: str, offsets: Sequence[tuple[int, int]], segment: Callable[[str], Iterable[str]] | None = None
) -> list[int]:
    """The word of each token, by the characters (start, end) it covers in `text`; -1 for a token of no characters.

    Any tokenizer's offsets will do: WordPiece's "play" and "##ing", a character of Chinese, single bytes of one. Words
    are runs of letters and digits, each sign by itself, and what `segment` cuts a run of Chinese into (None: jieba).
    A token that reaches over several words joins them.
    """
    word_at = [-1] * len(text)
    number = 0
    for run in WORDS.finditer(text):
        place = run.start()
        for word in _cut(run.group(), segment):
            word_at[place : place + len(word)] = [number] * len(word)
            place, number = place + len(word), number + 1

    numbers: list[int] = []
    current, reaches = -1, -1
    for start, end in offsets:
        covered = [word for word in word_at[start:end] if word >= 0]
        if covered and covered[0] > reaches:
            current += 1
        numbers.append(current if covered else -1)
        reaches = max(reaches, *covered, -1)
    return numbers


def _cut(run: str, segment: Callable[[str], Iterable[str]] | None) -> Iterable[str]:
    if len(run) == 1 or not HAN_TEXT.match(run):
        return [run]
    if segment is None:
        try:
            import jieba  # type: ignore[import-untyped]
        except ImportError:
            raise MissingDependencyError("jieba", "hiding whole Chinese words") from None
        jieba.setLogLevel("WARNING")
        segment = jieba.cut
    return segment(run)
