"""What all adapters have in common: the base's matrices stay, a few new weights beside them learn.

    adapter = attach(model, recipe, seed=0)        # adapters.kinds
    adapter.num_trained                            # a share of a percent
    tensors = adapter.to_file(dict(model.named_parameters()))

`model(...)` then computes base and change. The base's weights keep their names (`layers.0.attention.qkv_proj.weight`),
and new ones stand beside them; training, checkpoints and files need to know no more than `requires_grad`.

A file names the parts of bimo's stacked matrices one by one (models.parts), as other tools do; `to_file` and
`from_file` are between the two, with plain tensors, so that whoever has the weights in pieces can put them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bimo.adapters.frozen import FrozenLinear
from bimo.errors import CorruptModelError, UsageError
from bimo.models.config import LSTMConfig
from bimo.models.encoder import Encoder
from bimo.models.parts import Part, parts_of
from bimo.recipe import AdapterRecipe

__all__ = ["Adapter"]


class Adapter:
    """Freezes `model`, whose matrices become FrozenLinear, and adds what is to be learned.

    base: what the model is called; a file says so. dtype: of the frozen matrices; embeddings, norms and biases stay as
    they are. saved: tensors of a file whose shapes are to be had (see `from_file`, which has their values); without it
    the change is nothing at first. seed: of what is random.
    Raises UsageError for a recipe that does not suit the model.
    """

    def __init__(
        self,
        model: Any,
        recipe: AdapterRecipe,
        seed: int,
        *,
        base: str = "",
        dtype: torch.dtype = torch.float32,
        saved: Mapping[str, Tensor] | None = None,
    ) -> None:
        if isinstance(model.config, LSTMConfig):
            raise UsageError("adapters are for Transformers, this model is an LSTM: leave adapter out", "adapter")
        self.model, self.recipe, self.base = model, recipe, base
        self.generator = torch.Generator().manual_seed(seed)
        self.layers: dict[str, FrozenLinear] = {}
        self.check()
        model.requires_grad_(False)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, linear in linears.items():
            if not (parts := parts_of(model.config, name)):
                continue
            layer = self.layer(name, linear, parts, saved, dtype=dtype, quant=recipe.quant)
            self.layers[name] = layer.train(linear.training)
            _put(model, name, layer)
        if isinstance(model, Encoder) and model.classifier is not None:  # new for these classes: it has to be learned
            for name in ("pooler", "classifier"):
                head: nn.Module | None = getattr(model, name)
                if head is not None and (saved is None or f"{name}.weight" in saved):
                    head.requires_grad_(True)

    def check(self) -> None:
        """Raise UsageError where the recipe does not suit the model, before anything is changed."""

    def layer(
        self,
        name: str,
        linear: nn.Linear,
        parts: tuple[Part, ...],
        saved: Mapping[str, Tensor] | None,
        **frozen: Any,
    ) -> FrozenLinear:
        """What takes the place of a matrix. frozen: for FrozenLinear."""
        return FrozenLinear(linear, name=name, **frozen)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that learn, by their names in the model."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    @property
    def num_trained(self) -> int:
        return sum(weight.numel() for weight in self.trained.values())

    # --- in training (training.loop.Regulariser) ---------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        """What is added to a step's loss; None: nothing."""
        return None

    def after_backward(self, step: int, total_steps: int) -> None:
        """Gradients are whole, weights are still those they were computed with. step: 1 is the first."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep beside the weights."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave, of a model that has got its weights back."""

    # --- in files ----------------------------------------------------------------------------------------------------

    def to_file(self, weights: Mapping[str, Tensor], *, final: bool = True) -> dict[str, Tensor]:
        """What a file keeps of `weights`, the trained ones by their names in the model (others are left out), on the
        CPU. final: without what only a training that goes on needs."""
        return {name: weights[name].detach().cpu().contiguous() for name in self.trained}

    def from_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other way. Raises CorruptModelError where names or shapes are others than this model's."""
        trained = self.trained
        if unknown := sorted(set(tensors) ^ set(trained)):
            raise CorruptModelError(
                f"an adapter of {self.base or 'this model'} has {len(trained)} tensors and the file {len(tensors)}; "
                f"{unknown[0]} is in one of them only: it belongs to another base or recipe"
            )
        for name, weight in trained.items():
            if tensors[name].shape != weight.shape:
                raise CorruptModelError(
                    f"{name} has the shape {tuple(tensors[name].shape)}, that of {self.base or 'this model'} "
                    f"{tuple(weight.shape)}: the adapter belongs to another base or recipe"
                )
        return dict(tensors)

    def merge(self) -> None:
        """Work the change into the base's weights, in float32; the model is a plain one again, with the same logits.
        Raises UsageError where the change is none of a matrix."""
        raise UsageError(
            f"a {self.recipe.kind} adapter cannot be merged, what it adds is no change of a matrix: use it beside its "
            f"base",
            "adapter",
        )

    def _release(self, plain: Mapping[str, nn.Linear]) -> None:
        """Put plain layers back, and leave the model."""
        for name, linear in plain.items():
            _put(self.model, name, linear)
        self.layers = {}
        del self.model.adapter


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
