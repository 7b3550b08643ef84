"""First values of a model's weights.

Matrices are normal with 0.02 (GPT-2, BERT, BART); norms are 1, biases 0. In a decoder those that write into the
residual stream are divided by √(2 layers), so that its variance does not grow with depth; an encoder's norms see to
that. An LSTM is as torch has it, uniform within 1/√hidden_size, with words normal with 1: no norm would make smaller
ones heard (with 0.1 it took ten times as many steps to remember a word).

Encoder-decoders follow their papers' code. The original Transformer: matrices with Xavier's √(2 / (in + out)), words
with 1/√hidden_size, which the factor √hidden_size on embeddings brings back to 1. T5, whose scores are not scaled:
1/√in for each matrix, q smaller by √head_dim, words with 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimo.models.decoder import Decoder
from bimo.models.encoder import Encoder
from bimo.models.recurrent import LSTMLanguageModel
from bimo.models.seq2seq import EncoderDecoder

__all__ = ["init_weights"]

SPREAD = 0.02
INTO_RESIDUAL = ("attention.out_proj", "mlp.down_proj")


@torch.no_grad()
def init_weights(model: Decoder | Encoder | EncoderDecoder | LSTMLanguageModel, seed: int) -> None:
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
            if isinstance(model, EncoderDecoder):
                spread: float | Tensor = _seq2seq_spread(model, name, module)
            else:
                spread = SPREAD * (residual if name.endswith(INTO_RESIDUAL) else 1.0)
            values = torch.empty(module.weight.shape).normal_(0, 1, generator=generator)
            module.weight.copy_(values * spread)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


def _seq2seq_spread(model: EncoderDecoder, name: str, module: nn.Linear | nn.Embedding) -> float | Tensor:
    """Standard deviation of a matrix's values, or of each of its rows where several matrices share one."""
    config = model.config
    is_t5 = config.attention_scale == 1.0  # what q and k are not scaled by has to be in their weights
    if isinstance(module, nn.Embedding):
        if module is model.embed_tokens and is_t5:
            return 1.0
        own = is_t5 or (module is model.embed_tokens and config.scale_embedding)
        return config.hidden_size**-0.5 if own else SPREAD
    num_rows, num_columns = module.weight.shape
    if is_t5:
        spread = torch.full((num_rows, 1), num_columns**-0.5)
        if name.endswith(("qkv_proj", "q_proj")):
            spread[: config.num_heads * config.head_dim] *= config.head_dim**-0.5
        return spread
    if not config.scale_embedding:
        return SPREAD
    stacked = {"qkv_proj": 3, "kv_proj": 2, "gate_up_proj": 2}.get(name.rpartition(".")[2], 1)
    return (2 / (num_columns + num_rows / stacked)) ** 0.5
