"""From token files to batches of BERT's two objectives, and their joint loss.

    loader = MaskedLoader(files, length=128, tokens=MaskTokens.of(tokenizer), next_sentence=True, whole_words=True)
    loss = bert_loss(encoder, loader.next_batch(32))

    with next_sentence      [CLS] A A A [SEP] B B B [SEP]     B follows A in its document, or (half of the time) is
                                                              of another one
    without                 [CLS] text text text [SEP]

A and B are stretches of text, not single sentences, as in arXiv:1810.04805 (A.2). A row is cut from one document, the
longest stretch of one within `length` consecutive tokens. What is hidden is drawn anew in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bimo.data.loader import IGNORED, Origin, RowLoader
from bimo.data.pairs import pad_rows, width_of
from bimo.data.shards import TokenFile
from bimo.errors import UsageError
from bimo.models.encoder import Encoder
from bimo.objectives.causal import Loss
from bimo.objectives.masked import HAN_TEXT, mask_tokens, masked_loss, next_sentence_loss, word_numbers
from bimo.objectives.rows import chosen_rows
from bimo.tokenizer.load import Tokenizer

__all__ = ["MaskTokens", "MaskedBatch", "MaskedLoader", "bert_loss", "masked_word_logits"]

TRIES = 8  # to find a stretch of another document


@dataclass(frozen=True)
class MaskTokens:
    """What masking has to know of a WordPiece tokenizer. pieces: the text of each token, "##" where it goes on."""

    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    special_ids: tuple[int, ...]
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> MaskTokens:
        """Raises UsageError for a tokenizer without [CLS], [SEP], [MASK] and [PAD]."""
        found = (tokenizer.backend.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
        ids = [token for token in found if token is not None]
        if len(ids) < 4:
            raise UsageError(
                'masking needs a tokenizer with [CLS], [SEP], [MASK] and [PAD]: set tokenizer.kind to "wordpiece"',
                "tokenizer",
            )
        pieces = tuple(tokenizer.token_spelling(token) for token in range(tokenizer.vocab_size))
        cls_id, sep_id, mask_id, pad_id = ids
        return cls(cls_id, sep_id, mask_id, pad_id, tuple(tokenizer.special_ids), pieces)

    def words(self, token_ids: Sequence[int]) -> list[int]:
        """The word of each token, (T,): pieces with their beginning, Chinese characters as they are cut into words."""
        text, offsets, after_han = "", [], False
        for token in token_ids:
            piece = self.pieces[token]
            is_han = bool(HAN_TEXT.fullmatch(piece))
            if piece.startswith("##"):
                piece = piece[2:]
            elif not (is_han and after_han):
                text += " "
            offsets.append((len(text), len(text) + len(piece)))
            text, after_han = text + piece, is_han
        return word_numbers(text, offsets)


@dataclass(frozen=True)
class MaskedBatch:
    """B rows of T tokens. int64 but for the mask.

    input_ids (B, T) with [MASK]; mask (B, T) bool, False = padding; segments (B, T) 0 for A, 1 for B; targets (B, T)
    the hidden word, else IGNORED; relations (B,) 0: B follows A, 1: it does not; None where that is not asked.
    pair_weight: how many hidden words one relation weighs in the loss: as many as a row has, so that both means count
    alike.
    """

    input_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    segments: NDArray[np.int64]
    targets: NDArray[np.int64]
    relations: NDArray[np.int64] | None
    pair_weight: float
    origins: tuple[Origin, ...] = ()

    is_text: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, part: slice) -> MaskedBatch:
        """Some of its rows, without most of the columns that are padding in all of them."""
        mask = self.mask[part]
        width = width_of(mask)
        input_ids, segments, targets = (array[part, :width] for array in (self.input_ids, self.segments, self.targets))
        relations = None if self.relations is None else self.relations[part]
        return MaskedBatch(
            input_ids, mask[:, :width], segments, targets, relations, self.pair_weight, self.origins[part]
        )

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORED).sum())

    def idle(self) -> MaskedBatch:
        """One row that asks for nothing."""
        one = np.zeros((1, 1), np.int64)
        relations = None if self.relations is None else one[0] + IGNORED
        return MaskedBatch(one, one == 0, one, one + IGNORED, relations, self.pair_weight)


class MaskedLoader(RowLoader):
    """Rows for masked words, and pairs for next sentence prediction."""

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        length: int,
        tokens: MaskTokens,
        share: float = 0.15,
        whole_words: bool = True,
        next_sentence: bool = True,
        **order: Any,
    ) -> None:
        self.tokens, self.share, self.whole_words, self.next_sentence = tokens, share, whole_words, next_sentence
        self.room = length - (3 if next_sentence else 2)
        super().__init__(files, length=length, **order)

    def rows_in(self, file: TokenFile) -> int:
        return len(file.tokens) // self.room

    def span(self, file: TokenFile, row: int) -> tuple[int, int]:
        return row * self.room, (row + 1) * self.room

    def batch(self, origins: Sequence[Origin]) -> MaskedBatch:
        rows, segments, targets, relations = [], [], [], []
        for origin in origins:
            draws = self.draws(origin)
            ids, segment, relation = self._pair(origin, draws) if self.next_sentence else self._single(origin)
            masked, labels = self._hide(ids, draws)
            rows.append(masked)
            targets.append(labels)
            segments.append(segment)
            relations.append(relation)
        input_ids = pad_rows(rows, self.tokens.pad_id)
        mask = np.arange(input_ids.shape[1]) < np.array([len(row) for row in rows])[:, None]
        return MaskedBatch(
            input_ids,
            mask,
            pad_rows(segments, 0),
            pad_rows(targets, IGNORED),
            np.array(relations, np.int64) if self.next_sentence else None,
            self.share * self.length,
            tuple(origins),
        )

    def _single(self, origin: Origin) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        file = self.files[origin.file]
        start, end = self.span(file, origin.row)
        ids = np.concatenate(([self.tokens.cls_id], file.tokens[start:end], [self.tokens.sep_id])).astype(np.int64)
        return ids, np.zeros_like(ids), 0

    def _pair(self, origin: Origin, draws: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        file, number = self.files[origin.file], origin.file
        start, end, document = self._stretch(file, origin.row)
        relation = int(draws.integers(2))
        cut = int(draws.integers(start + 1, end)) if end - start > 1 else end
        first, second = file.tokens[start:cut], file.tokens[cut:end]
        if relation or not len(second):
            for _ in range(TRIES):
                other, row = number, int(draws.integers(self.num_rows[number]))
                start, stop, elsewhere = self._stretch(self.files[other], row)
                if elsewhere != document:
                    begin = int(draws.integers(start, stop))
                    second, relation = file.tokens[begin : min(stop, begin + self.room - len(first))], 1
                    break
            else:  # one document, as far as we saw: nothing else to show
                relation = 0
        cls, sep = [self.tokens.cls_id], [self.tokens.sep_id]
        ids = np.concatenate((cls, first, sep, second, sep)).astype(np.int64)
        return ids, (np.arange(len(ids)) >= len(first) + 2).astype(np.int64), relation

    def _stretch(self, file: TokenFile, row: int) -> tuple[int, int, int]:
        """The longest run of tokens of one document within a row: start, end, the document."""
        start, end = self.span(file, row)
        first, last = np.searchsorted(file.ends, [start, end - 1], side="right")
        borders = np.concatenate(([start], file.ends[first:last], [end])).astype(np.int64)
        longest = int(np.diff(borders).argmax())
        return int(borders[longest]), int(borders[longest + 1]), int(first) + longest

    def _hide(self, ids: NDArray[np.int64], draws: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        tokens = self.tokens
        words = torch.tensor([tokens.words(ids.tolist())]) if self.whole_words else None
        masked, labels = mask_tokens(
            torch.from_numpy(ids)[None],
            special_ids=tokens.special_ids,
            mask_id=tokens.mask_id,
            vocab_size=len(tokens.pieces),
            share=self.share,
            word_ids=words,
            generator=torch.Generator().manual_seed(int(draws.integers(2**63))),
        )
        return masked[0].numpy(), labels[0].numpy()


def bert_loss(model: Encoder, batch: MaskedBatch, *, label_smoothing: float = 0.0) -> Loss:
    """Masked words, and relations where the batch has them: L = L_MLM + L_NSP, each a mean, times the hidden words.

    While the model is not in training also how often both were right, and the nats of a hidden word alone.
    """
    hidden, asked, words = _read(model, batch)
    logits, count = model.masked_logits(asked).float(), batch.num_targets
    total = masked_loss(logits, words, reduction="sum", label_smoothing=label_smoothing)
    means = {}
    if not model.training:
        means["masked_nats"] = (float(total.detach()), count)
        means["masked_accuracy"] = (float((logits.argmax(-1) == words).sum()), count)
    if batch.relations is not None:
        relations = torch.from_numpy(batch.relations).to(hidden.device)
        scores = model.next_sentence_logits(hidden).float()
        total = total + next_sentence_loss(scores, relations, reduction="sum") * batch.pair_weight
        if not model.training:
            num_right = float((scores.argmax(-1) == relations).sum())
            means["next_sentence_accuracy"] = (num_right, int((relations != IGNORED).sum()))
    return Loss(total, count, means)


def masked_word_logits(model: Encoder, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
    """(N, V) scores and (N,) words of the hidden words, and some that are IGNORED."""
    _, asked, words = _read(model, batch)
    return model.masked_logits(asked), words


def _read(model: Encoder, batch: MaskedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, T, D), those that are asked for (N, D), and their words (N,)."""
    device = next(model.parameters()).device
    input_ids, mask, segments, targets = (
        torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.mask, batch.segments, batch.targets)
    )
    hidden = model(input_ids, mask, segments)
    return hidden, *chosen_rows(hidden, targets)
