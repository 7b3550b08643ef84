"""The decoder-only Transformer: embeddings, N pre-norm blocks, a final norm, a head. One class for every family.

    config = DecoderConfig(...)
    model = Decoder(config)
    logits = model.logits(model(input_ids))          # training, scoring: (B, T) -> (B, T, V)
    hidden = model(input_ids, positions, attend)     # generation: `attend` owns the KV cache

Architecture only: weights, number types, adapters, quantisation and sharding come from outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.models.attention import Attend, FullSequence
from bimo.models.block import Block
from bimo.models.config import DecoderConfig
from bimo.models.layers import make_norm, rope_angles, rope_frequencies

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """Token ids to hidden states to logits."""

    rope: Tensor  # (head_dim / 2,) float32 angular frequencies; empty with learned positions

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)
        self.lm_head: nn.Module | None = None  # None: tied, the embedding is the head
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope", torch.empty(0), persistent=False)
        self.rope_factor = 1.0
        self.reset_rope()

    def reset_rope(self) -> None:
        """(Re)compute the rotary frequencies; they are not weights, and stay float32 whatever the weights are."""
        if self.config.position == "rotary" and self.embed_tokens.weight.device.type != "meta":
            frequencies, self.rope_factor = rope_frequencies(
                self.config.head_dim, self.config.rope, self.config.max_positions
            )
            self.rope = frequencies.to(self.embed_tokens.weight.device)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        Args:
            input_ids: (B, T) token ids.
            positions: (B, T) absolute positions; None means 0..T-1 in each row.
            attend: owner of the keys and values; None means each row is a whole sequence, without a cache.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        attend = attend or FullSequence()
        x = self.embed_tokens(input_ids)
        rope = None
        if self.config.position == "learned":
            x = x + self.embed_positions(positions)
        else:
            cos, sin = rope_angles(positions, self.rope, self.rope_factor)
            rope = (cos.to(x.dtype), sin.to(x.dtype))
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (..., V), in the model's number type."""
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)
