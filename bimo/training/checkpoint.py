"""Checkpoints: everything a training needs to go on as if nothing had happened.

    checkpoints/step-00000500/   a model directory like any other (`bimo generate` reads it), and beside the weights
        optimizer.safetensors    the optimisers' tensors, the averaged weights, the state of the random numbers
        training.json            step, the loader's place, what the run knows of itself

A checkpoint appears by one rename, with a record of its files' hashes: a process killed at any moment leaves whole ones
only, and one that was torn by the disk is noticed and the one before it is used.

It is the same directory whatever the number of processes, so a training goes on with more or fewer of them. The price:
the first one gathers all of it, so its memory must hold model and optimiser once more, and it alone writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bimo.errors import BimoError, CorruptModelError, DataError
from bimo.formats.huggingface import load_weights, read_config, read_json, save_directory
from bimo.formats.integrity import check_record, write_record
from bimo.training.distributed import from_every, shard_like, whole
from bimo.training.loop import TrainingState

__all__ = ["checkpoints", "latest_checkpoint", "load_checkpoint", "remove_old", "save_checkpoint", "save_model"]

NAME = re.compile(r"step-(\d{8,})")
RANDOM = "random"


def save_model(state: TrainingState, folder: Path, *, source: Path, lineage: dict[str, Any]) -> None:
    """Write the model as it stands (its averaged weights, where there are any) as a model directory.

    source: directory with the tokenizer. All processes call it, the first one writes.
    """
    weights = _gather(state, {**dict(state.model.named_parameters()), **state.ema})
    if state.ranks.is_main:
        save_directory(folder, state.model.config, weights.items(), source=source, lineage=lineage)


def save_checkpoint(state: TrainingState, folder: Path, *, source: Path, about: dict[str, Any]) -> Path:
    """Write checkpoints/step-N below `folder`. about: JSON-ready, handed back by `load_checkpoint`.

    All processes call it, the first one writes. Raises DataError when it cannot be written; those that exist are
    untouched.
    """
    final = folder / f"step-{state.step:08}"
    weights, tensors = _gather(state, dict(state.model.named_parameters())), _tensors(state)
    if not state.ranks.is_main:
        return final
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_directory(partial, state.model.config, weights.items(), source=source, lineage={"step": state.step})
        _write_tensors(partial / "optimizer.safetensors", tensors)
        training = {
            "step": state.step,
            "tokens": state.tokens,
            "average_loss": state.average_loss,
            "loader": {"length": state.loader.length, **state.loader.state()},
            "about": about,
        }
        (partial / "training.json").write_text(json.dumps(training, indent=1), encoding="utf-8")
        write_record(partial, {"step": state.step})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, BimoError) as error:
        raise DataError(
            f"checkpoint {final} could not be written ({_reason(error)}): the one before it stays"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """All finished ones, the oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what killed processes left."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(".step-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written; `warn` is told of others."""
    for path in reversed(checkpoints(folder)):
        try:
            check_record(path, "the one before it is used", full=True)
            return path
        except CorruptModelError as error:
            warn(f"checkpoint {path.name} is damaged: {error}")
    return None


def load_checkpoint(path: Path, state: TrainingState) -> dict[str, Any]:
    """Bring `state` to where it was when `path` was written; what the caller had kept there as `about`.

    A loader of another length (the curriculum's next stage) starts afresh.
    Raises DataError when it is of another model or of other optimisers.
    """
    config = read_config(path)
    if config != state.model.config:
        raise DataError(
            f"checkpoint {path} is of another model than the recipe describes: go back to that recipe, or give the run "
            f"another name"
        )
    with torch.no_grad():
        for name, tensor in load_weights(path, config):
            weight = state.model.get_parameter(name)
            weight.copy_(shard_like(tensor, weight))
    _read_tensors(path / "optimizer.safetensors", state)
    training = read_json(path / "training.json")
    state.step, state.tokens, state.average_loss = training["step"], training["tokens"], training["average_loss"]
    if training["loader"]["length"] == state.loader.length:
        state.loader.restore(training["loader"])
    return dict(training["about"])


def _gather(state: TrainingState, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of them whole and on the CPU, in the first process; elsewhere nothing is kept."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if state.ranks.is_main:
            gathered[name] = full.detach().cpu()
    return gathered


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    """`{optimiser}.{parameter}.{name}`, `ema.{parameter}`, `random`, `random.{rank}` of the other processes."""
    tensors = {}
    for number, optimizer in enumerate(state.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    tensors[f"{number}.{index}.{name}"] = torch.as_tensor(value)
    tensors |= {f"ema.{name}": value for name, value in state.ema.items()}
    for rank, random in enumerate(from_every(state.ranks, torch.get_rng_state())):
        tensors[_random(rank)] = random
    return _gather(state, tensors)


def _random(rank: int) -> str:
    return f"{RANDOM}.{rank}" if rank else RANDOM


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:  # the library's word for an OSError
        raise OSError(str(error)) from error


def _read_tensors(file: Path, state: TrainingState) -> None:
    from safetensors.torch import load_file

    tensors = load_file(file)
    if (random := tensors.get(_random(state.ranks.rank))) is not None:  # else a process that was not there
        torch.set_rng_state(random)
    by_parameter: dict[int, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        if number == "ema":
            state.ema[rest] = shard_like(tensor, state.model.get_parameter(rest))
        elif number.isdecimal():
            index, _, key = rest.partition(".")
            by_parameter.setdefault(int(number), {}).setdefault(int(index), {})[key] = tensor
    if by_parameter and set(by_parameter) != set(range(len(state.optimizers))):
        raise DataError(
            f"{file} is of another optimizer than the recipe's: go back to it, or give the run another name"
        )
    for place, optimizer in enumerate(state.optimizers):
        kept = optimizer.state_dict()
        kept["state"] = _sharded(by_parameter.get(place, {}), optimizer)
        optimizer.load_state_dict(kept)


def _sharded(states: dict[int, dict[str, Tensor]], optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """What is shaped like its weight is divided like it; the rest are counts."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        index: {
            name: shard_like(value, weights[index]) if value.shape == weights[index].shape else value
            for name, value in values.items()
        }
        for index, values in states.items()
    }


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
