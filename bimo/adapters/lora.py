"""LoRA (arXiv:2106.09685): a matrix changes by the product of two thin ones.

    y = x Wᵀ + s (x Aᵀ) Bᵀ          A (R, D), B (O, R), s = alpha / R; B is 0 at first

rsLoRA   s = alpha / √R, so that large ranks learn as fast as small ones (arXiv:2312.03732)
DoRA     W' = m (W + s B A) / ‖W + s B A‖, by rows: their direction and size m are learned apart (arXiv:2402.09353);
         the norm counts as a constant on the way back, as in its section 4.3
QLoRA    W in 8 or 4 bits (arXiv:2305.14314): adapters.frozen

bimo's matrices stack several of other tools' (q, k and v; gate and up), each of which has its own A and B. The A's are
one product, as all read the same x; dropout, too, is drawn once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimo.adapters.base import Adapter
from bimo.adapters.frozen import FrozenLinear, LowRankPart, product
from bimo.errors import CorruptModelError, UsageError
from bimo.models.parts import Part, parts_of
from bimo.recipe import AdapterRecipe

__all__ = ["LoRA", "LoRALinear"]


class LoRALinear(FrozenLinear):
    """A matrix and its change.

    parts: the rows that change. ranks, scales: of each; what is trained has the largest rank R, columns of B and rows
    of A beyond a part's own are 0 and stay so, as the gradient of each is a product with the other.
    """

    def __init__(
        self,
        linear: nn.Linear,
        parts: tuple[Part, ...],
        *,
        ranks: list[int],
        scales: list[float],
        generator: torch.Generator,
        dropout: float = 0.0,
        dora: bool = False,
        **frozen: Any,
    ) -> None:
        super().__init__(linear, **frozen)
        self.named_parts, self.ranks, self.dropout = parts, ranks, dropout
        self.rank = max(1, *ranks)
        firsts = [0]
        for part in parts:
            firsts.append(firsts[-1] + part.num_rows)
        self.parts = tuple(
            LowRankPart(part.start, part.end, first, scale)
            for part, first, scale in zip(parts, firsts, scales, strict=False)
        )
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(len(parts) * self.rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(firsts[-1], self.rank, device=device))
        self.start(generator)
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(self._norms())

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """First values: uniform like those of a plain layer (as PEFT has it), and 0."""
        width = self.in_features**-0.5
        self.lora_a.copy_(torch.empty(self.lora_a.shape).uniform_(-width, width, generator=generator))
        self.lora_b.zero_()

    def right(self) -> Tensor:
        """A, (len(parts) R, D)."""
        return self.lora_a

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout) if self.training and self.dropout else None
        if self.magnitude is None:
            return product(self, x, low, self.right(), self.lora_b, self.parts)
        y = product(self, x, low, self.right(), self.lora_b, self.parts, bias=False)
        # y + y (g - 1), for g is near 1, where bfloat16 has steps of 1 / 256
        y = torch.addcmul(y, y, (self._factors() - 1).to(y.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def changed(self) -> Tensor:
        """W + s B A in float32, (O, D)."""
        weight = self.matrix(torch.float32).clone()
        for part, a in zip(self.parts, self.right().float().split(self.rank), strict=True):
            weight[part.start : part.end].addmm_(self.lora_b[part.rows].float(), a, alpha=part.scale)
        return weight

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one matrix that computes the same, (O, D) float32."""
        weight = self.changed()
        return weight if self.magnitude is None else weight * self._factors()[:, None]

    def _norms(self) -> Tensor:
        """Of the changed rows, (rows of all parts,)."""
        norms = torch.linalg.vector_norm(self.changed(), dim=1)
        return torch.cat([norms[part.start : part.end] for part in self.parts])

    def _factors(self) -> Tensor:
        """DoRA's m / norm of every row, 1 of those that do not change, (O,)."""
        assert self.magnitude is not None
        ratio = self.magnitude / self._norms()
        pieces, done = [], 0
        for part in self.parts:
            pieces += [ratio.new_ones(part.start - done), ratio[part.rows]]
            done = part.end
        return torch.cat([*pieces, ratio.new_ones(self.out_features - done)])

    def split(self, weights: Mapping[str, Tensor], *, final: bool) -> Iterator[tuple[str, Tensor]]:
        """This layer's weights by their names in it -> (name in a file, tensor), part by part."""
        a_of_parts = weights["lora_a"].split(self.rank)
        for named, part, a, rank in zip(self.named_parts, self.parts, a_of_parts, self.ranks, strict=True):
            yield f"{named.name}.lora_A", a[:rank]
            yield f"{named.name}.lora_B", weights["lora_b"][part.rows, :rank]
            yield f"{named.name}.scale", torch.tensor(part.scale, dtype=torch.float64)
            if self.magnitude is not None:
                yield f"{named.name}.magnitude", weights["magnitude"][part.rows]

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `split` gave -> this layer's weights."""
        a, b = torch.zeros(self.lora_a.shape), torch.zeros(self.lora_b.shape)
        weights = {"lora_a": a, "lora_b": b}
        for number, (named, part, rank) in enumerate(zip(self.named_parts, self.parts, self.ranks, strict=True)):
            a[number * self.rank :][:rank] = tensors[f"{named.name}.lora_A"]
            b[part.rows, :rank] = tensors[f"{named.name}.lora_B"].to(b.dtype)
        if self.magnitude is not None:
            weights["magnitude"] = torch.cat([tensors[f"{named.name}.magnitude"] for named in self.named_parts])
        return weights


class LoRA(Adapter):
    """LoRA, rsLoRA or DoRA of the recipe's targets."""

    layer_kind: type[LoRALinear] = LoRALinear

    @property
    def changing(self) -> dict[str, LoRALinear]:
        """The layers that change."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, LoRALinear)}

    def layer(
        self, name: str, linear: nn.Linear, parts: tuple[Part, ...], saved: Mapping[str, Tensor] | None, **frozen: Any
    ) -> FrozenLinear:
        chosen = tuple(part for part in parts if set(part.targets) <= set(self.recipe.targets))
        if not chosen:
            return super().layer(name, linear, parts, saved, **frozen)
        keys = [f"{name}.{part.name}" for part in chosen]
        ranks, scales = self._ranks_and_scales(keys, saved)
        options: dict[str, Any] = {
            "dropout": self.recipe.dropout,
            "dora": self.recipe.dora,
            "generator": self.generator,
        }
        return self.layer_kind(linear, chosen, ranks=ranks, scales=scales, name=name, **options, **frozen)

    def check(self) -> None:
        targets, found = set(self.recipe.targets), set[str]()
        for name, module in self.model.named_modules():
            for part in parts_of(self.model.config, name) if isinstance(module, nn.Linear) else ():
                wanted = targets & set(part.targets)
                if wanted and wanted != set(part.targets):
                    raise UsageError(
                        f"{self.model.config.family} has {', '.join(part.targets)} in one matrix: name all of them in "
                        f"adapter.targets or none, not {', '.join(sorted(wanted))} alone",
                        "adapter.targets",
                    )
                found |= wanted
        if not found:
            raise UsageError(
                f"this model has none of the matrices {', '.join(self.recipe.targets)} (a plain MLP has up and down, "
                f"no gate): name others in adapter.targets",
                "adapter.targets",
            )

    def first_rank_and_scale(self) -> tuple[int, float]:
        return self.recipe.rank, scale_of(self.recipe)

    def _ranks_and_scales(self, keys: list[str], saved: Mapping[str, Tensor] | None) -> tuple[list[int], list[float]]:
        if saved is None:
            rank, scale = self.first_rank_and_scale()
            return [rank] * len(keys), [scale] * len(keys)
        for key in keys:
            if f"{key}.lora_A" not in saved:
                raise CorruptModelError(f"the adapter's file has nothing of {key}: it belongs to another base")
        return (
            [len(saved[f"{key}.lora_A"]) for key in keys],
            [float(saved[f"{key}.scale"]) for key in keys],
        )

    def to_file(self, weights: Mapping[str, Tensor], *, final: bool = True) -> dict[str, Tensor]:
        tensors, own = {}, set[str]()
        for name, layer in self.changing.items():
            inner = {
                leaf: weights[f"{name}.{leaf}"].detach()
                for leaf, weight in layer.named_parameters()
                if weight.requires_grad
            }
            own |= {f"{name}.{leaf}" for leaf in inner}
            for leaf, tensor in layer.split(inner, final=final):
                tensors[f"{name}.{leaf}"] = tensor.detach().cpu().contiguous()
        others = {name: weights[name].detach().cpu().contiguous() for name in self.trained if name not in own}
        return {**tensors, **others}

    def from_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        left = dict(tensors)
        weights: dict[str, Tensor] = {}
        try:
            for name, layer in self.changing.items():
                prefix = f"{name}."
                own = {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}
                weights |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.join(own).items()}
        except (KeyError, RuntimeError) as error:
            raise CorruptModelError(
                f"the adapter does not fit {self.base or 'this model'} ({name}: {error}): it belongs to another base"
            ) from None
        return super().from_file({**weights, **left})

    @torch.no_grad()
    def merge(self) -> None:
        plain = {}
        for name, layer in self.layers.items():
            weight = layer.merged() if isinstance(layer, LoRALinear) else layer.matrix(torch.float32)
            plain[name] = layer.linear(weight).train(layer.training)
        self._release(plain)


def scale_of(recipe: AdapterRecipe) -> float:
    """s of LoRA and rsLoRA."""
    return recipe.alpha / (math.sqrt(recipe.rank) if recipe.rslora else recipe.rank)
