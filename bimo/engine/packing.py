"""Linear layers whose weights are laid out for the CPU's matrix instructions once, instead of at every call.

oneDNN wants a weight in blocks (pairs of bf16 side by side for `vdpbf16ps`); given a plain matrix it re-arranges it on
each call. Measured on smollm2's layers: 1.3-2x faster for 1-16 rows, nothing lost for 512. Price: the packed weight
replaces the plain one, so it can no longer be trained or saved; tied embeddings are held twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimo.models.decoder import Decoder

__all__ = ["PackedLinear", "can_pack", "pack_linear_layers"]


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch and this processor have packed products for `dtype`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W (out, in) in oneDNN's own layout; inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linear_layers(model: Decoder) -> None:
    """Replace every nn.Linear of the model, and give tied embeddings a packed head, in place."""
    weight = model.embed_tokens.weight
    if not can_pack(weight.dtype, weight.device):
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    if model.config.tied_embeddings:
        model.lm_head = PackedLinear(weight, None)
