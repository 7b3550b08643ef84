"""The encoder-decoder Transformer: one stack reads a source, the other writes a target. One class for every family.

    model = EncoderDecoder(Seq2SeqConfig.of_family("t5", vocab_size=32128, hidden_size=512, ...))
    hidden = model(source_ids, input_ids, source_mask)           # training: (B, S), (B, T) -> (B, T, D)
    logits = model.logits(hidden)                                # (B, T, V)

    memory = model.encode(source_ids, source_mask)               # generation: once a source, (B, S, D)
    hidden = model.decode(input_ids, memory, source_mask)        # or, with caches:
    model.cross_keys_values(memory)                              # [(k, v) of every layer], (B, S, H, E) each
    hidden = model.decode(input_ids, None, None, positions, attend, cross)

`input_ids` are the target moved right by one: `decoder_start_token_id`, then the target without its last token. Their
padding stands at the end and needs no mask: nothing before it sees it, and the loss leaves it out.

Architecture only: weights come from `formats.huggingface.load_model` or `models.initial`.
Shapes: B batch, S source tokens, T target tokens, D hidden_size, V vocab_size, H heads, E head_dim.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.errors import UsageError
from bimo.models.attention import Attend, Bidirectional, FullSequence
from bimo.models.block import Block
from bimo.models.config import Seq2SeqConfig
from bimo.models.layers import make_norm
from bimo.models.positions import RelativeBias, sinusoidal_positions

__all__ = ["EncoderDecoder", "Seq2SeqConfig", "Side"]


class Side(nn.Module):
    """What encoder and decoder both have: positions, layers, norms at the ends. They share the embedding."""

    def __init__(self, config: Seq2SeqConfig, num_layers: int, *, is_decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.embed_positions: nn.Embedding | None = None
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_positions + config.position_offset, config.hidden_size)
        self.relative_bias: RelativeBias | None = None
        if config.position == "relative":
            self.relative_bias = RelativeBias(
                config.relative_buckets, config.relative_max_distance, config.num_heads, bidirectional=not is_decoder
            )
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.layers = nn.ModuleList(Block(config, layer, cross=is_decoder) for layer in range(num_layers))
        self.final_norm = make_norm(config) if config.norm_first else None

    def start(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings x (B, T, D) at positions (T,) or (B, T) -> what the first layer reads."""
        config = self.config
        if config.scale_embedding:
            x = x * config.hidden_size**0.5
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + config.position_offset)
        elif config.position == "sinusoidal":
            x = x + sinusoidal_positions(positions, config.hidden_size).to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return F.dropout(x, config.dropout, self.training)

    def finish(self, x: Tensor) -> Tensor:
        """Pre-norm only: the norm after the last layer, and T5's dropout after it."""
        if self.final_norm is None:
            return x
        return F.dropout(self.final_norm(x), self.config.dropout, self.training)

    def bias(self, positions: Tensor) -> Tensor | None:
        """Of whole sequences at positions (T,): (H, T, T), or None without relative positions."""
        return None if self.relative_bias is None else self.relative_bias(positions, positions)


class EncoderDecoder(nn.Module):
    """Source ids to memory; memory and target ids to hidden states; hidden states to logits."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Side(config, config.num_encoder_layers, is_decoder=False)
        self.decoder = Side(config, config.num_decoder_layers, is_decoder=True)
        self.lm_head: nn.Module | None = None  # None: tied, the embedding is the head
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.logits_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.logits_bias else None

    @property
    def layers(self) -> list[nn.Module]:
        """All blocks, the encoder's first: what is sharded, checkpointed or frozen a block at a time."""
        return [*self.encoder.layers, *self.decoder.layers]

    @property
    def decoder_bias(self) -> RelativeBias | None:
        """T5's bias, for an `attend` that keeps keys: `decoder_bias(query_positions, key_positions)` (..., H, T, S) is
        added to the scores, the same in every layer; None in the other families."""
        return self.decoder.relative_bias

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """The memory, (B, S, D); what it says of padding is finite and means nothing.

        Args:
            source_ids: (B, S) token ids.
            source_mask: (B, S), 0 or False where there is padding, which stands at the end; None: there is none.
        """
        if source_mask is not None and source_mask.shape != source_ids.shape:
            raise UsageError(
                f"source_mask has the shape {tuple(source_mask.shape)}, it must be that of source_ids, "
                f"{tuple(source_ids.shape)}"
            )
        positions = self._positions(source_ids, "source")
        x = self.encoder.start(self.embed_tokens(source_ids), positions)
        mask = None if source_mask is None else source_mask.bool()
        attend = Bidirectional(mask, self._attention_dropout, self.encoder.bias(positions))
        for layer in self.encoder.layers:
            x = layer(x, None, attend)
        return self.encoder.finish(x)

    def decode(
        self,
        input_ids: Tensor,
        memory: Tensor | None,
        source_mask: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        cross: Attend | None = None,
    ) -> Tensor:
        """Hidden states of the target, (B, T, D).

        Args:
            input_ids: (B, T) token ids.
            memory: (B, S, D) from `encode`; None when `cross` has the keys and values made of it.
            source_mask: as in `encode`; read only without `cross`.
            positions: (B, T) absolute positions; None means 0..T-1 in each row.
            attend: owner of the keys and values of self-attention, which also adds `decoder_bias`; None means each row
                is a whole target from its start, without a cache.
            cross: owner of the attention to the source. It is called as `attend` is, with the source's k and v, which
                are empty when memory is None; None means row i looks at memory[i] as `source_mask` allows.
        """
        if cross is None:
            if memory is None:
                raise UsageError("decode needs `memory` from encode, or a `cross` that has its keys and values")
            cross = Bidirectional(None if source_mask is None else source_mask.bool(), self._attention_dropout)
        if positions is None:
            positions = self._positions(input_ids, "target")
        if attend is None:
            attend = FullSequence(self._row_bias(input_ids), self._attention_dropout)
        x = self.decoder.start(self.embed_tokens(input_ids), positions)
        for layer in self.decoder.layers:
            x = layer(x, None, attend, memory, cross)
        return self.decoder.finish(x)

    def forward(self, source_ids: Tensor, input_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """`encode`, then `decode`: (B, S) and (B, T) -> (B, T, D)."""
        return self.decode(input_ids, self.encode(source_ids, source_mask), source_mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (..., D) -> (..., V), in the model's number type."""
        if self.config.scale_logits:
            hidden = hidden * self.config.hidden_size**-0.5
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight, self.logits_bias)
        logits = self.lm_head(hidden)
        return logits if self.logits_bias is None else logits + self.logits_bias

    def cross_keys_values(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that each decoder layer's cross-attention reads: memory (B, S, D) -> (B, S, H, E) each."""
        attentions = (cast(Block, layer).cross_attention for layer in self.decoder.layers)
        return [attention.keys_values(memory) for attention in attentions]

    @property
    def _attention_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _positions(self, ids: Tensor, what: str) -> Tensor:
        num_tokens, config = ids.shape[1], self.config
        if config.position != "relative" and num_tokens > config.max_positions:
            raise UsageError(
                f"the {what} has {num_tokens} tokens, this model takes at most {config.max_positions}: cut it first"
            )
        return torch.arange(num_tokens, device=ids.device)

    def _row_bias(self, input_ids: Tensor) -> Tensor | None:
        return self.decoder.bias(torch.arange(input_ids.shape[1], device=input_ids.device))
