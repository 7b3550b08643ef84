"""First values of a model's weights.

Matrices are normal with 0.02 (GPT-2, BERT); norms are 1, biases 0. In a decoder those that write into the residual
stream are divided by √(2 layers), so that its variance does not grow with depth; an encoder's norms see to that. An
LSTM is as torch has it, uniform within 1/√hidden_size, with words normal with 1: no norm would make smaller ones heard
(with 0.1 it took ten times as many steps to remember a word).
"""

from __future__ import annotations

import torch
from torch import nn

from bimo.models.decoder import Decoder
from bimo.models.encoder import Encoder
from bimo.models.recurrent import LSTMLanguageModel

__all__ = ["init_weights"]

SPREAD = 0.02
INTO_RESIDUAL = ("attention.out_proj", "mlp.down_proj")


@torch.no_grad()
def init_weights(model: Decoder | Encoder | LSTMLanguageModel, seed: int) -> None:
    """Fill all weights in place; the same seed gives the same values on every machine."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, LSTMLanguageModel):
        for name, parameter in model.named_parameters():
            width, values = model.config.hidden_size**-0.5, torch.empty(parameter.shape)
            is_word = name == "embed_tokens.weight"
            parameter.copy_(
                values.normal_(generator=generator) if is_word else values.uniform_(-width, width, generator=generator)
            )
        return
    residual = (2 * model.config.num_layers) ** -0.5 if isinstance(model, Decoder) else 1.0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            shrink = residual if name.endswith(INTO_RESIDUAL) else 1.0
            values = torch.empty(module.weight.shape).normal_(0, SPREAD * shrink, generator=generator)
            module.weight.copy_(values)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
