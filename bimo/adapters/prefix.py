"""Prefix-tuning (Li and Liang, arXiv:2101.00190): every text is read as if something stood before it.

    attention(q, [P_k; k], [P_v; v])          P_k, P_v: learned, (P, K, E) in each layer

All tokens of all texts see the prefix, also where several are packed into a row, and in layers with a window. It takes
the first P positions, a text begins behind it, as in PEFT and transformers. First values are keys and values that the
base itself computes of random words: the paper's section 7.4 has words far before random numbers, and a model that
sees them is still one that works. Its reparameterisation by an MLP is left out: with such values it is not needed to
begin.

Where keys and values live is the business of an `Attend` (models.attention). Those of whole sequences are known here;
one with a cache has a method `behind` (engine.paged).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.adapters.base import Adapter
from bimo.errors import UsageError
from bimo.models.attention import Attend, Attention, Bidirectional, FullSequence, causal_mask
from bimo.models.encoder import Encoder
from bimo.models.packed import PackedRows
from bimo.models.seq2seq import EncoderDecoder

__all__ = ["Prefix"]


class Prefix(Adapter):
    """Keys and values of `recipe.tokens` places in every layer. `targets` have no effect on it."""

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self.attentions = {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
        self.seen: tuple[Attend, dict[tuple[int, int | None], Tensor]] | None = None
        starts = self._of_random_words()
        for attention, values in zip(self.attentions.values(), starts, strict=True):
            for kind, tensor in zip(("keys", "values"), values, strict=True):
                attention.register_parameter(f"prefix_{kind}", nn.Parameter(tensor.float().clone()))
            attention.register_forward_pre_hook(self._before_attention)
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)

    def check(self) -> None:
        if isinstance(self.model, EncoderDecoder):
            raise UsageError(
                "a prefix is for decoders and encoders, this model is both: use lora or bottleneck", "adapter.kind"
            )
        if self.recipe.tokens >= self.model.config.max_positions:
            raise UsageError(
                f"a prefix of {self.recipe.tokens} tokens leaves no room, the model reads "
                f"{self.model.config.max_positions}: lower adapter.tokens",
                "adapter.tokens",
            )

    @torch.no_grad()
    def _of_random_words(self) -> list[tuple[Tensor, Tensor]]:
        model = self.model
        device = model.embed_tokens.weight.device
        found: list[tuple[Tensor, Tensor]] = []

        def record(attention: Attention, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*inputs[:2], _Recorder(inputs[2], found), *inputs[3:])

        words = torch.randint(model.config.vocab_size, (1, self.recipe.tokens), generator=self.generator)
        handles = [part.register_forward_pre_hook(record) for part in self.attentions.values()]
        was_training = model.training
        try:
            model.eval()(words.to(device))
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()
        return found

    def _before_model(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A text's positions begin behind the prefix."""
        if isinstance(model, Encoder):
            return arguments, {**named, "first_position": self.recipe.tokens}
        input_ids, positions, attend = (*arguments, None, None, None)[:3]
        input_ids, attend = named.get("input_ids", input_ids), named.get("attend", attend)
        positions = named.get("positions", positions)
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        positions = positions + self.recipe.tokens
        if model.config.position == "learned" and int(positions.max()) >= model.config.max_positions:
            raise UsageError(
                f"a text of {int(positions.max()) + 1 - self.recipe.tokens} tokens behind a prefix of "
                f"{self.recipe.tokens} is longer than this model reads ({model.config.max_positions}): shorten one"
            )
        return (input_ids, positions, attend), {}

    def _before_attention(self, attention: Attention, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        keys, values = attention.get_parameter("prefix_keys"), attention.get_parameter("prefix_values")
        return (*inputs[:2], _Prefixed(self, inputs[2], keys, values), *inputs[3:])

    def mask(self, attend: Attend, num_tokens: int, window: int | None, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T or 1, P + T), True or 0 = visible; made once for all layers of a pass."""
        if self.seen is None or self.seen[0] is not attend:
            self.seen = (attend, {})
        masks = self.seen[1]
        if (num_tokens, window) not in masks:
            mask = _visible(attend, num_tokens, window, device)
            if mask is None:
                return None
            masks[num_tokens, window] = F.pad(mask, (self.recipe.tokens, 0), value=float(mask.dtype == torch.bool))
        return masks[num_tokens, window]


class _Recorder:
    """An Attend that writes down the keys and values of one text."""

    def __init__(self, attend: Attend, found: list[tuple[Tensor, Tensor]]) -> None:
        self.attend, self.found = attend, found

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        self.found.append((k[0], v[0]))
        return self.attend(layer, q, k, v, scale=scale, window=window)


class _Prefixed:
    """An Attend with a prefix before the keys and values of another one."""

    def __init__(self, prefix: Prefix, attend: Attend, keys: Tensor, values: Tensor) -> None:
        self.prefix, self.attend, self.keys, self.values = prefix, attend, keys, values

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        if (behind := getattr(self.attend, "behind", None)) is not None:  # the engine's, which knows its sequences
            attended: Tensor = behind(self.keys, self.values, layer, q, k, v, scale=scale)
            return attended
        mask = self.prefix.mask(self.attend, q.shape[1], window, q.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        dropout: float = getattr(self.attend, "dropout", 0.0)
        k, v = (
            torch.cat((before.to(x.dtype).expand(len(x), -1, -1, -1), x), dim=1).transpose(1, 2)
            for before, x in ((self.keys, k), (self.values, v))
        )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=k.shape[1] != q.shape[2]
        )
        return out.transpose(1, 2)


def _visible(attend: Attend, num_tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Who sees whom without a prefix, (B or 1, 1, T or 1, T); None: all see all."""
    if isinstance(attend, Bidirectional):
        return attend.mask
    if isinstance(attend, PackedRows):
        same = attend.segments[:, :, None] == attend.segments[:, None, :]
        return (causal_mask(num_tokens, num_tokens, window, device) & same)[:, None]
    if isinstance(attend, FullSequence) and attend.mask is None:
        return causal_mask(num_tokens, num_tokens, window, device)[None, None]
    raise UsageError(f"a prefix stands before whole texts, {type(attend).__name__} has no place for it", "adapter")
