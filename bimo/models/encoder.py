"""The bidirectional encoder (BERT): embeddings, N post-norm blocks, and the heads its config asks for.

    model = Encoder(EncoderConfig(vocab_size=21128, hidden_size=768, ..., masked_head=True))
    hidden = model(input_ids, attention_mask, token_type_ids)    # (B, T, D), computed once for all heads
    model.masked_logits(hidden[labels != -100])                  # words; 15 % of the rows cost 15 % of the product
    model.next_sentence_logits(hidden), model.class_logits(hidden), model.embedding(hidden, attention_mask)

Architecture only: weights come from `formats.huggingface.load_encoder` or `models.initial`.
Shapes: B batch, T tokens, D hidden_size, V vocab_size, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.errors import UsageError
from bimo.models.attention import Bidirectional
from bimo.models.block import Block
from bimo.models.config import EncoderConfig
from bimo.models.layers import ACTIVATIONS, make_norm

__all__ = ["Encoder", "EncoderConfig"]


class MaskedHead(nn.Module):
    """norm(activation(dense(x))), then scores against the embedding, which is the head's matrix, plus a bias."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(self.norm(self.activation(self.dense(hidden))), embedding, self.bias)


class Encoder(nn.Module):
    """Token ids to hidden states; heads to logits."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.embed_positions = nn.Embedding(config.max_positions, hidden)
        self.embed_segments = nn.Embedding(config.type_vocab_size, hidden)
        self.embed_norm = make_norm(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.pooler = nn.Linear(hidden, hidden) if config.pooler else None
        self.masked_head = MaskedHead(config) if config.masked_head else None
        self.next_sentence_head = nn.Linear(hidden, 2) if config.next_sentence_head else None
        self.classifier = nn.Linear(hidden, len(config.labels)) if config.labels else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        first_position: int = 0,
    ) -> Tensor:
        """Hidden states, (B, T, D); those of padding are finite and mean nothing.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 0 or False where there is padding; None means there is none.
            token_type_ids: (B, T) segments, 0 for the first text and 1 for the second; None means all 0.
            first_position: where each text begins, behind what an adapter puts before it.
        """
        config = self.config
        num_tokens = input_ids.shape[1]
        last = first_position + num_tokens
        if last > config.max_positions:
            most = config.max_positions - first_position
            raise UsageError(f"the text has {num_tokens} tokens, this encoder reads at most {most}: cut it first")
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise UsageError(
                    f"{name} has the shape {tuple(given.shape)}, it must be that of input_ids, {tuple(input_ids.shape)}"
                )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.embed_tokens(input_ids) + self.embed_segments(token_type_ids)
        x = x + self.embed_positions.weight[first_position:last]
        x = F.dropout(self.embed_norm(x), config.dropout, self.training)
        mask = None if attention_mask is None else attention_mask.bool()
        attend = Bidirectional(mask, config.attention_dropout if self.training else 0.0)
        for layer in self.layers:
            x = layer(x, None, attend)
        return x

    def pooled(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> tanh(pooler(first token)), (B, D)."""
        return torch.tanh(self._need(self.pooler, "pooler=True")(hidden[:, 0]))

    def masked_logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: hidden (..., D) of any choice of positions -> (..., V)."""
        return self._need(self.masked_head, "masked_head=True")(hidden, self.embed_tokens.weight)

    def next_sentence_logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, 2): class 0, the second segment follows the first; class 1, it does not."""
        return self._need(self.next_sentence_head, "next_sentence_head=True")(self.pooled(hidden))

    def class_logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> (B, C), in the order of `config.labels`."""
        config, head = self.config, self._need(self.classifier, 'labels=("yes", "no")')
        dropout = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        return head(F.dropout(self.pooled(hidden), dropout, self.training))

    def embedding(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """One vector a text: the mean of its tokens, length 1 (Sentence-BERT, arXiv:1908.10084).

        hidden (B, T, D) -> (B, D) float32; the scalar product of two is their cosine. Nothing but padding is the zero
        vector.
        """
        hidden = hidden.float()  # a sum of hundreds of bf16 numbers would lose the small ones
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return F.normalize(hidden.sum(1), dim=-1)  # a mean has the same direction

    @staticmethod
    def _need(head: nn.Module | None, setting: str) -> nn.Module:
        if head is None:
            raise UsageError(f"this encoder has no such head: build it with EncoderConfig({setting}, ...)")
        return head
