"""A model without weights, on the meta device: what names and shapes it has, and a frame to load weights into.

    decoder = empty_decoder(config)
    decoder.load_state_dict(weights, assign=True)
    decoder.reset_rope()

Rotary tables are not weights: `reset_rope` makes them once the parameters are on a real device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bimo.models.config import DecoderConfig, EncoderConfig
from bimo.models.decoder import Decoder
from bimo.models.encoder import Encoder
from bimo.models.recurrent import LSTMConfig, LSTMLanguageModel
from bimo.models.seq2seq import EncoderDecoder, Seq2SeqConfig

__all__ = ["empty_decoder", "empty_encoder", "empty_lstm", "empty_model", "empty_seq2seq"]


class _SkipInit(TorchFunctionMode):
    """Initialisers do nothing: there is nothing to fill, and `normal_` on the meta device would import torch._dynamo
    (1-2 s and 100 MB of memory before the first token)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def empty_decoder(config: DecoderConfig) -> Decoder:
    """The decoder with all parameters on the meta device (no memory, milliseconds)."""
    with torch.device("meta"), _SkipInit():
        return Decoder(config)


def empty_encoder(config: EncoderConfig) -> Encoder:
    """The encoder with all parameters on the meta device; it has no tables to make afterwards."""
    with torch.device("meta"), _SkipInit():
        return Encoder(config)


def empty_seq2seq(config: Seq2SeqConfig) -> EncoderDecoder:
    """The encoder-decoder with all parameters on the meta device; it has no tables to make afterwards."""
    with torch.device("meta"), _SkipInit():
        return EncoderDecoder(config)


def empty_lstm(config: LSTMConfig) -> LSTMLanguageModel:
    """The LSTM with all parameters on the meta device."""
    with torch.device("meta"), _SkipInit():
        return LSTMLanguageModel(config)


def empty_model(
    config: DecoderConfig | EncoderConfig | Seq2SeqConfig | LSTMConfig,
) -> Decoder | Encoder | EncoderDecoder | LSTMLanguageModel:
    """The model of any configuration, with all parameters on the meta device."""
    if isinstance(config, LSTMConfig):
        return empty_lstm(config)
    if isinstance(config, Seq2SeqConfig):
        return empty_seq2seq(config)
    return empty_encoder(config) if isinstance(config, EncoderConfig) else empty_decoder(config)
