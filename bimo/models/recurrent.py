"""The recurrent language model (LSTM): the baseline that shows what attention gains.

    model = LSTMLanguageModel(LSTMConfig(vocab_size=16384, hidden_size=512, num_layers=2))
    logits = model.logits(model(input_ids))                  # (B, T) -> (B, T, V), the call shape of `Decoder`
    hidden, state = model.advance(next_ids, state)           # generation, or texts in pieces

Its shape is the one language models had before the Transformer (arXiv:1409.2329, with the tied head of
arXiv:1608.05859). A token takes time and memory that do not grow with the text; but tokens of a text are computed one
after the other, in training too, and all that is remembered has to fit into the state.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bimo.models.config import LSTMConfig

__all__ = ["LSTMConfig", "LSTMLanguageModel"]

State = tuple[Tensor, Tensor]  # hidden and cell, (num_layers, B, D) each


class LSTMLanguageModel(nn.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        between = config.dropout if config.num_layers > 1 else 0.0  # torch warns of dropout between one layer
        self.lstm = nn.LSTM(hidden, hidden, config.num_layers, batch_first=True, dropout=between)
        self.lm_head: nn.Module | None = None  # None: tied, the embedding is the head
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids, each row one text from its start -> hidden states (B, T, D)."""
        return self.advance(input_ids)[0]

    def advance(self, input_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read on: (B, T) ids after those that led to `state` (None: the start) -> hidden (B, T, D), the new state."""
        dropout = self.config.dropout
        x = F.dropout(self.embed_tokens(input_ids), dropout, self.training)
        x, state = self.lstm(x, state)
        return F.dropout(x, dropout, self.training), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (..., V)."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)
