"""Training on several processes, started by torchrun: each reads its rows, gradients are averaged over all.

    with process_group(ranks):
        objective = parallelize(model.to(training_device(ranks)), causal_loss, "fsdp", ranks)

ddp    every process holds the whole model and optimiser; gradients are averaged once a step
fsdp   every process holds 1/n of each weight, its gradient and its optimiser state (FSDP2, arXiv:2304.11277); a block's
       weights come together while it computes. Less memory, more traffic.

An objective reads weights beside the model's own forward (the head, for the loss without logits), so what is wrapped is
the whole of it: `parallelize` returns an objective that is called like the one it was given. Model, loop and optimisers
know nothing of it, but that a weight may be a DTensor: `whole` and `shard_like` are the ways out and in. (DTensors are
known by what they have: importing them takes half a second, which a training in one process need not wait for.)

Measured with gloo on CPUs of one machine; nccl and several machines are torch's promise so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bimo.errors import BimoError, TrainingError
from bimo.models.block import Block
from bimo.objectives.causal import Loss
from bimo.runtime import Ranks

__all__ = [
    "accumulate",
    "anywhere",
    "from_every",
    "from_main",
    "parallelize",
    "process_group",
    "reshard",
    "shard_like",
    "summed",
    "training_device",
    "whole",
]

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # the others wait while the first prepares data


def training_device(ranks: Ranks) -> torch.device:
    """Where this process computes: on a GPU of its own, or the CPU."""
    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def process_group(ranks: Ranks) -> Iterator[None]:
    """Several processes find each other, and are together until the block ends."""
    device = training_device(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # small numbers and checkpoints live on the CPU, also where the model does not
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world_size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"process {ranks.rank} of {ranks.world_size} does not find the others ({error}): start it with torchrun"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if "closed by peer" in str(error):  # gloo's words
            raise TrainingError(
                f"process {ranks.rank} lost another one: the first error of them all says why"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
        # gloo's threads still drop their last tensors, for which they need the interpreter: a process that ended at
        # once aborted in one run of three ("terminate called without an active exception")
        time.sleep(0.2)


class _Whole(nn.Module):
    """Model and objective as one module, so that hooks run around both."""

    def __init__(self, model: nn.Module, objective: Callable[..., Loss]) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any, options: dict[str, Any]) -> tuple[Tensor, int, Mapping[str, tuple[float, int]]]:
        loss = self.objective(self.model, batch, **options)
        return loss.total, loss.num_targets, loss.means


class _Parallel:
    """An objective of the one model it was made for."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, model: nn.Module, batch: Any, **options: Any) -> Loss:
        # a process without rows takes one that asks for nothing: the others wait for its forward and backward
        return Loss(*self.root(batch if len(batch) else batch.idle(), options))


def parallelize(
    model: nn.Module, objective: Callable[..., Loss], kind: Literal["auto", "ddp", "fsdp"], ranks: Ranks
) -> Callable[..., Loss]:
    """`objective` for all processes; in one it is returned as it is. Before optimisers are made of the weights.

    All processes must hold the same weights, and call the result equally often: an empty batch is a batch.
    """
    if ranks.world_size == 1:
        return objective
    root = _Whole(model, objective)
    if kind != "fsdp":
        return _Parallel(DistributedDataParallel(root))
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    mesh = dist.init_device_mesh(device, (ranks.world_size,))
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)
    return _Parallel(root)


def accumulate(objective: Callable[..., Loss]) -> AbstractContextManager[Any]:
    """Around all but the last part of a step: gradients stay here, and travel once.

    Not for fsdp: a gradient that waits would have to be whole, and memory is why one takes it.
    """
    if isinstance(objective, _Parallel) and isinstance(objective.root, DistributedDataParallel):
        return objective.root.no_sync()
    return nullcontext()


def reshard(objective: Callable[..., Loss]) -> None:
    """After a forward without a backward: fsdp keeps the outermost weights together until then."""
    if isinstance(objective, _Parallel) and hasattr(objective.root, "reshard"):
        objective.root.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a part; then all must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process has, on `like`'s device and divided as `like` is. No traffic."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def summed(ranks: Ranks, *numbers: float) -> tuple[float, ...]:
    """Each summed over all processes, in double precision; the same in all."""
    if ranks.world_size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tuple(tensor.tolist())


def anywhere(ranks: Ranks, flag: bool) -> bool:
    """Whether it is true in any process: clocks and signals differ, what is done about them must not."""
    return bool(summed(ranks, float(flag))[0])


def from_every(ranks: Ranks, thing: T) -> list[T]:
    """Of each process, by rank."""
    if ranks.world_size == 1:
        return [thing]
    things: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(things, thing)
    return things


def from_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` returns in the main process, in all of them; the others wait. Its error ends all."""
    if ranks.world_size == 1:
        return work()
    message: list[Any] = [None, None]
    if ranks.is_main:
        try:
            message[0] = work()
        except BaseException as error:
            dist.broadcast_object_list([None, str(error) or type(error).__name__], src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise BimoError(f"process {ranks.rank} stops, because the first one did: {message[1]}")
    result: T = message[0]
    return result
