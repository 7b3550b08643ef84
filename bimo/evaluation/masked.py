"""What a masked word is guessed as without reading the sentence: the most frequent word, BERT's measure of zero.

unigrams = Unigrams.count(files, vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids)
unigrams.score(batch.targets).figures["masked_accuracy"]     # the targets that objectives.masked_rows.bert_loss has

guess: the token that the training text has most often (of several, the lowest id)
p(w) = (count(w) + 1) / (Σ_v count(v) + vocab_size)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bimo.data.loader import IGNORED
from bimo.data.shards import TokenFile
from bimo.errors import DataError, UsageError
from bimo.training.validation import Score

__all__ = ["Unigrams"]

CHUNK = 1 << 22  # tokens counted at once


@dataclass(frozen=True)
class Unigrams:
    """How often each token was seen, (vocab_size,)."""

    counts: NDArray[np.int64]

    @classmethod
    def count(cls, files: Iterable[TokenFile], *, vocab_size: int, special_ids: Iterable[int] = ()) -> Unigrams:
        """Count `files`; `special_ids` are never hidden, so they count as never seen. Flat in memory.

        Raises DataError for a token outside the vocabulary.
        """
        counts = np.zeros(vocab_size, np.int64)
        for file in files:
            for begin in range(0, len(file.tokens), CHUNK):
                found = np.bincount(file.tokens[begin : begin + CHUNK], minlength=vocab_size)
                if len(found) > vocab_size:
                    raise DataError(
                        f"{file.folder} holds the token {len(found) - 1}, the vocabulary has {vocab_size}: encode the "
                        "text with the tokenizer whose vocabulary this is"
                    )
                counts += found
        counts[list(special_ids)] = 0
        return cls(counts)

    def most_frequent(self, num_guesses: int = 1) -> NDArray[np.int64]:
        """Ids, the most frequent first."""
        return np.argsort(-self.counts, kind="stable")[:num_guesses]

    def score(self, targets: NDArray[Any] | Sequence[int], *, num_guesses: int = 1) -> Score:
        """Nats and `masked_accuracy` of `targets` of any shape, token ids, or IGNORED where nothing is asked; a tensor
        does as well.

        num_guesses: right is a word that is one of so many.
        """
        asked = np.asarray(targets)
        asked = asked[asked != IGNORED]
        if len(asked) and not 0 <= asked.min() <= asked.max() < len(self.counts):
            raise UsageError(f"targets must be ids from 0 to {len(self.counts) - 1}, or {IGNORED}", "targets")
        chances = (self.counts + 1) / (self.counts.sum() + len(self.counts))
        num_correct = int(np.isin(asked, self.most_frequent(num_guesses)).sum())
        nats = -float(np.log(chances[asked.astype(np.int64)]).sum())
        return Score(nats, len(asked), means={"masked_accuracy": (num_correct, len(asked))})
