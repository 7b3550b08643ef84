"""An encoder-decoder behind `ModelRunner`: the source is read once a request, its answers come as a decoder's do.

The decoder looks at the source by keys and values that stay the same for a whole answer, and have the shape of those
of its own tokens. So they lie in the same paged cache, a place a source token, and all beams and samples of a request
share them:

    source.blocks      [ s0 s1 s2 ... ]          written when the request is admitted, read by all that answer it
    sequence.blocks    [ start t1 t2 ... ]       as in a decoder

The scheduler counts both, so many long sources cannot take more memory than there is (see Sequence's `Source`).
Shapes as in models.attention; S = source tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimo.engine.eager import EagerDecoder, padded_rows
from bimo.engine.paged import BlockAttention, PagedCache, StepAttention, attend_chunk, slots_of
from bimo.engine.scheduler import Scheduled
from bimo.engine.sequence import Sequence, Source
from bimo.models.config import Seq2SeqConfig
from bimo.models.seq2seq import EncoderDecoder

__all__ = ["EagerEncoderDecoder", "SourceAttention"]

_ENCODED_AT_ONCE = 2048  # tokens, padding counted in


class SourceAttention:
    """Cross-attention for one step's plan: each row looks at its own request's source. Built once a step."""

    def __init__(self, cache: PagedCache, plan: list[Scheduled]) -> None:
        self.cache = cache
        single = [source_of(work.sequence) for work in plan if work.count == 1]
        self.num_single = len(single)  # they come first (see StepAttention)
        if single:
            self.look = BlockAttention(cache, [s.blocks for s in single], [len(s.token_ids) for s in single])
        self.chunks: list[tuple[int, Tensor]] = []  # rows, and where their source lies
        for work in plan[self.num_single :]:
            source = source_of(work.sequence)
            slots = slots_of(source.blocks, len(source.token_ids), cache.block_size)
            self.chunks.append((work.count, slots.to(cache.keys.device)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """q (1, T, H, E) -> (1, T, H, E); k and v are empty, the cache has them."""
        keys, values = self.cache.layers[layer]
        q, row = q[0], self.num_single
        if row == len(q):
            return self.look(q, keys, values, scale, window)[None]
        parts = [self.look(q[:row], keys, values, scale, window)] if row else []
        for count, slots in self.chunks:
            context = keys.index_select(1, slots), values.index_select(1, slots)
            parts.append(attend_chunk(q[row : row + count], *context, scale, None, is_causal=False))
            row += count
        parts.append(q.new_zeros((len(q) - row, *q.shape[1:])))  # padding
        return torch.cat(parts)[None]


class EagerEncoderDecoder(EagerDecoder):
    """Encodes the sources that are new, then computes a step's row of tokens as its base does."""

    model: EncoderDecoder
    config: Seq2SeqConfig

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__(model)
        self.start_token_id = model.config.decoder_start_token_id

    def _compute(self, input_ids: Tensor, positions: Tensor, plan: list[Scheduled]) -> Tensor:
        self._encode([source_of(work.sequence) for work in plan])
        attend = StepAttention(self.cache, plan, self.model.decoder_bias)
        return self.model.decode(input_ids, None, None, positions, attend, SourceAttention(self.cache, plan))

    def _encode(self, sources: list[Source]) -> None:
        """Put the keys and values of those that are not there yet into the cache; sources of like length together."""
        waiting = sorted({s for s in sources if not s.encoded}, key=lambda source: len(source.token_ids))
        while waiting:
            width, count = 0, 0
            for source in waiting:
                wider = min(padded_rows(len(source.token_ids)), self.config.max_positions)
                if count and (count + 1) * wider > _ENCODED_AT_ONCE:
                    break
                width, count = wider, count + 1
            self._encode_together(waiting[:count], width)
            del waiting[:count]

    def _encode_together(self, sources: list[Source], width: int) -> None:
        device, size, pad = self.weight.device, self.cache.block_size, self.config.pad_token_id
        lengths = torch.tensor([len(source.token_ids) for source in sources])
        rows = [source.token_ids + [pad] * (width - len(source.token_ids)) for source in sources]
        mask = (torch.arange(width) < lengths[:, None]).to(device)
        slots = torch.cat([slots_of(source.blocks, len(source.token_ids), size) for source in sources]).to(device)
        memory = self.model.encode(torch.tensor(rows, device=device), None if bool(mask.all()) else mask)
        for (keys, values), (k, v) in zip(self.cache.layers, self.model.cross_keys_values(memory), strict=True):
            keys.index_copy_(1, slots, k[mask].transpose(0, 1))  # (tokens, H, E) without the padding
            values.index_copy_(1, slots, v[mask].transpose(0, 1))
        for source in sources:
            source.encoded = True

    def _score(self, hidden: Tensor, words: Tensor) -> Tensor:
        if self.config.scale_logits:
            hidden = hidden * self.config.hidden_size**-0.5
        scores = super()._score(hidden, words)
        bias = self.model.logits_bias
        return scores if bias is None else scores + bias[words].float()


def source_of(sequence: Sequence) -> Source:
    """What a sequence answers; an encoder-decoder's engine gives every sequence one."""
    assert sequence.source is not None
    return sequence.source
