"""AdaLoRA (arXiv:2303.10512): ranks are shared out while it trains, more to matrices whose change matters more.

    y = x Wᵀ + s ((x Aᵀ) · e) Bᵀ        P Λ Q of a singular value decomposition: B (O, R), e (R,), A (R, D)

All matrices begin with more ranks than are to stay. A rank's importance is that of its singular value and, on average,
of its two vectors' numbers: sensitivity |w ∂L/∂w| times its own uncertainty, both smoothed over steps. The least
important ones are pruned: e = 0 until the next sharing out, so that one may come back. Their number follows

    budget    ───╮                  initial ranks for the first WARMUP of the steps,
                  ╲                 then a cubic way down,
                    `-.______       and what is decided FINAL of the steps before the end stays

A penalty keeps vectors orthogonal, without which values would not tell what matters: weight · average ‖P Pᵀ - I‖.
Formulas, constants and the way files are scaled are PEFT's, with which a test compares every sharing out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.adapters.frozen import FrozenLinear
from bimo.adapters.lora import LoRA, LoRALinear
from bimo.errors import UsageError
from bimo.models.parts import Part

__all__ = ["AdaLoRA", "AdaLoRALinear", "budget_at", "schedule"]

WARMUP, FINAL = 0.1, 0.3  # shares of the steps
TIMES = 100  # ranks are shared out about so often
SMOOTHING = 0.85  # of sensitivity and uncertainty
ORTHOGONALITY = 0.5  # weight of the penalty
SPREAD = 0.02  # of the vectors' first values
TINY = 1e-5  # PEFT adds it to the rank that alpha is divided by


class AdaLoRALinear(LoRALinear):
    """A matrix, and its change as values between vectors. kept (len(parts) R,): False for what is pruned."""

    lora_e: nn.Parameter
    kept: Tensor

    def start(self, generator: torch.Generator) -> None:
        device, count = self.lora_a.device, len(self.lora_a)
        self.lora_e = nn.Parameter(torch.zeros(count, 1, device=device))
        self.register_buffer("kept", torch.ones(count, dtype=torch.bool, device=device), persistent=False)
        self.unsettled = False
        with torch.no_grad():
            for weight in (self.lora_a, self.lora_b):
                weight.copy_(torch.empty(weight.shape).normal_(0, SPREAD, generator=generator))

    def settle(self) -> None:
        """Prune what the last sharing out left over. It is decided before the optimiser's step, and done behind it,
        before anything reads the values."""
        if self.unsettled:
            self.lora_e.data.masked_fill_(~self.kept[:, None], 0)
            self.unsettled = False

    def right(self) -> Tensor:
        return self.lora_a * self.lora_e

    def forward(self, x: Tensor) -> Tensor:
        self.settle()
        return super().forward(x)

    def split(self, weights: Mapping[str, Tensor], *, final: bool) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().split(weights, final=final):
            named, _, leaf = name.rpartition(".")
            number = [part.name for part in self.named_parts].index(named)
            rows = slice(number * self.rank, number * self.rank + self.ranks[number])
            kept = self.kept[rows].to(tensor.device) if final else torch.ones(self.ranks[number], dtype=torch.bool)
            if leaf == "lora_A":
                yield name, tensor[kept]
                yield f"{named}.lora_E", (weights["lora_e"] * self.kept[:, None])[rows][kept]
                yield f"{named}.kept", kept
            else:
                yield name, tensor[:, kept] if leaf == "lora_B" else tensor

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ranks that the file left out are 0, at their places."""
        whole, values = dict(tensors), torch.zeros(self.lora_e.shape)
        for number, (part, rank) in enumerate(zip(self.named_parts, self.ranks, strict=True)):
            kept = tensors[f"{part.name}.kept"].bool()
            a, b = (tensors[f"{part.name}.lora_{letter}"] for letter in "AB")
            whole[f"{part.name}.lora_A"] = a.new_zeros(rank, a.shape[1]).index_put((kept,), a)
            whole[f"{part.name}.lora_B"] = b.new_zeros(len(b), rank).t().index_put((kept,), b.t()).t()
            values[number * self.rank :][:rank][kept] = tensors[f"{part.name}.lora_E"].to(values.dtype)
        return {**super().join(whole), "lora_e": values}


class AdaLoRA(LoRA):
    """The layers, their importance so far, and who keeps which ranks."""

    layer_kind = AdaLoRALinear

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    @property
    def ranked(self) -> dict[str, AdaLoRALinear]:
        return cast(dict[str, AdaLoRALinear], self.changing)

    def first_rank_and_scale(self) -> tuple[int, float]:
        rank = initial_rank(self.recipe.rank, self.recipe.initial_rank)
        return rank, self.recipe.alpha / (rank + TINY)

    def layer(
        self, name: str, linear: nn.Linear, parts: tuple[Part, ...], saved: Mapping[str, Tensor] | None, **frozen: Any
    ) -> FrozenLinear:
        layer = super().layer(name, linear, parts, saved, **frozen)
        if saved is not None and isinstance(layer, AdaLoRALinear):
            masks = [saved[f"{name}.{part.name}.kept"].bool() for part in layer.named_parts]
            layer.kept.copy_(torch.cat([F.pad(mask, (0, layer.rank - len(mask))) for mask in masks]))
        return layer

    def _ranks_and_scales(self, keys: list[str], saved: Mapping[str, Tensor] | None) -> tuple[list[int], list[float]]:
        ranks, scales = super()._ranks_and_scales(keys, saved)
        return ranks if saved is None else [len(saved[f"{key}.kept"]) for key in keys], scales

    def penalty(self) -> Tensor:
        """Raises UsageError where weights are divided among processes: importance is of whole ones."""
        total, count = torch.zeros(()), 0
        for layer in self.ranked.values():
            if hasattr(layer.lora_a, "device_mesh"):
                raise UsageError(
                    "adalora needs whole weights to share out their ranks, with fsdp each process has a part: train "
                    'with parallel = "ddp", or another kind of adapter',
                    "adapter.kind",
                )
            a = layer.lora_a.unflatten(0, (len(layer.parts), layer.rank))
            b = torch.stack([(part := layer.lora_b[each.rows]).t() @ part for each in layer.parts])
            for products in (a @ a.transpose(1, 2), b):
                apart = products - torch.eye(layer.rank, device=products.device)
                total = total.to(apart.device) + torch.linalg.vector_norm(apart, dim=(1, 2)).sum()
                count += len(products)
        return total * (ORTHOGONALITY / count)

    @torch.no_grad()
    def after_backward(self, step: int, total_steps: int) -> None:
        """Learn from the step's gradients what matters, and decide which ranks stay, from the next step on."""
        warmup, final, every = schedule(total_steps)
        end = total_steps - final
        if step < end:
            self._observe()
        if not self.sensitivity and step <= end:  # so few steps that nothing was learned of any rank
            return
        if step == end or (warmup < step < end and step % every == 0):
            layers = self.ranked.values()
            initial = sum(sum(layer.ranks) for layer in layers)
            target = self.recipe.rank * sum(len(layer.parts) for layer in layers)
            self._share_out(initial - budget_at(step, total_steps, initial, target))
        if step == end:
            self.sensitivity, self.uncertainty = {}, {}
        for layer in self.ranked.values():
            layer.unsettled = True

    def _observe(self) -> None:
        for name, layer in self.ranked.items():
            for leaf in ("lora_a", "lora_b", "lora_e"):
                weight, key = layer.get_parameter(leaf), f"{name}.{leaf}"
                assert weight.grad is not None, "after_backward comes after a backward"
                now = (weight * weight.grad).abs()
                if key not in self.sensitivity:
                    self.sensitivity[key], self.uncertainty[key] = torch.zeros_like(now), torch.zeros_like(now)
                average = self.sensitivity[key].mul_(SMOOTHING).add_(now, alpha=1 - SMOOTHING)
                self.uncertainty[key].mul_(SMOOTHING).add_((now - average).abs(), alpha=1 - SMOOTHING)

    def _share_out(self, num_pruned: int) -> None:
        scores = {name: self._importance(name, layer) for name, layer in self.ranked.items()}
        if num_pruned <= 0:
            return
        least = torch.kthvalue(torch.cat([score.flatten() for score in scores.values()]), num_pruned).values
        for name, layer in self.ranked.items():
            layer.kept.copy_(scores[name] > least)

    def _importance(self, name: str, layer: AdaLoRALinear) -> Tensor:
        """Of each rank of a layer, (len(parts) R,)."""
        a, b, e = (
            self.sensitivity[f"{name}.{leaf}"] * self.uncertainty[f"{name}.{leaf}"]
            for leaf in ("lora_a", "lora_b", "lora_e")
        )
        columns = torch.cat([b[part.rows].mean(0) for part in layer.parts])
        return e[:, 0] + (a.mean(1) + columns)

    # --- in files ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        self._settle()
        kept = {f"kept.{name}": layer.kept.float() for name, layer in self.ranked.items()}
        sensitivity = {f"sensitivity.{name}": values for name, values in self.sensitivity.items()}
        return {**kept, **sensitivity, **{f"uncertainty.{name}": values for name, values in self.uncertainty.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sensitivity, self.uncertainty = {}, {}
        for key, values in state.items():
            kind, _, name = key.partition(".")
            if kind == "kept":
                self.ranked[name].kept.copy_(values.bool())
            else:
                of_kind = self.sensitivity if kind == "sensitivity" else self.uncertainty
                of_kind[name] = values.to(self.model.get_parameter(name).device)

    def to_file(self, weights: Mapping[str, Tensor], *, final: bool = True) -> dict[str, Tensor]:
        self._settle()
        return super().to_file(weights, final=final)

    @torch.no_grad()
    def merge(self) -> None:
        self._settle()
        super().merge()

    def _settle(self) -> None:
        for layer in self.ranked.values():
            layer.settle()


def initial_rank(rank: int, wish: int) -> int:
    """Half more than is to stay, if there is no wish."""
    return wish or -(-rank * 3 // 2)


def schedule(total_steps: int) -> tuple[int, int, int]:
    """Steps before the first sharing out, those after the last, and from one to the next."""
    return round(WARMUP * total_steps), round(FINAL * total_steps), max(1, total_steps // TIMES)


def budget_at(step: int, total_steps: int, initial: int, target: int) -> int:
    """How many ranks all matrices have together."""
    warmup, final, _ = schedule(total_steps)
    if step <= warmup:
        return initial
    left = max(0.0, 1 - (step - warmup) / max(1, total_steps - final - warmup))
    return int((initial - target) * left**3 + target)
