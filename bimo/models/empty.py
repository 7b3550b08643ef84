"""A model without weights, on the meta device: what names and shapes it has, and a frame to load weights into.

    model = empty_model(config)                     # MODELS[type(config)] is its class
    model.load_state_dict(weights, assign=True)
    model.reset_rope()                              # of a decoder

Rotary tables are not weights: `reset_rope` makes them once the parameters are on a real device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bimo.models.config import DecoderConfig, EncoderConfig, LSTMConfig, ModelConfig, Seq2SeqConfig
from bimo.models.decoder import Decoder
from bimo.models.encoder import Encoder
from bimo.models.recurrent import LSTMLanguageModel
from bimo.models.seq2seq import EncoderDecoder

__all__ = ["MODELS", "empty_model"]

MODELS: dict[type, type[nn.Module]] = {
    DecoderConfig: Decoder,
    EncoderConfig: Encoder,
    Seq2SeqConfig: EncoderDecoder,
    LSTMConfig: LSTMLanguageModel,
}


class _SkipInit(TorchFunctionMode):
    """Initialisers do nothing: there is nothing to fill, and `normal_` on the meta device would import torch._dynamo
    (1-2 s and 100 MB of memory before the first token)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def empty_model(config: ModelConfig) -> Any:
    """The model of a configuration with all parameters on the meta device (no memory, milliseconds)."""
    with torch.device("meta"), _SkipInit():
        return MODELS[type(config)](config)
