"""Checkpoints: everything a training needs to go on as if nothing had happened.

    checkpoints/step-00000500/   a model directory like any other (`bimo generate` reads it), and beside the weights
        optimizer.safetensors    the optimisers' tensors, the averaged weights, the state of the random numbers
        training.json            step, the loader's place, what the run knows of itself

A checkpoint appears by one rename, with a record of its files' hashes: a process killed at any moment leaves whole ones
only, and one that was torn by the disk is noticed and the one before it is used.
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

from bimo.errors import BimoError, CorruptModelError, DataError
from bimo.formats.huggingface import load_weights, read_config, read_json, save_directory
from bimo.formats.integrity import check_record, write_record
from bimo.training.loop import TrainingState

__all__ = ["checkpoints", "latest_checkpoint", "load_checkpoint", "remove_old", "save_checkpoint", "save_model"]

NAME = re.compile(r"step-(\d{8,})")
RANDOM = "random"


def save_model(state: TrainingState, folder: Path, *, source: Path, lineage: dict[str, Any]) -> None:
    """Write the model as it stands (its averaged weights, where there are any) as a model directory.

    source: directory with the tokenizer.
    """
    weights = {**dict(state.model.named_parameters()), **state.ema}
    save_directory(folder, state.model.config, weights.items(), source=source, lineage=lineage)


def save_checkpoint(state: TrainingState, folder: Path, *, source: Path, about: dict[str, Any]) -> Path:
    """Write checkpoints/step-N below `folder`. about: JSON-ready, handed back by `load_checkpoint`.

    Raises DataError when it cannot be written; those that exist are untouched.
    """
    final = folder / f"step-{state.step:08}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        config, weights = state.model.config, state.model.named_parameters()
        save_directory(partial, config, weights, source=source, lineage={"step": state.step})
        _write_tensors(partial / "optimizer.safetensors", state)
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
            state.model.get_parameter(name).copy_(tensor)
    _read_tensors(path / "optimizer.safetensors", state)
    training = read_json(path / "training.json")
    state.step, state.tokens, state.average_loss = training["step"], training["tokens"], training["average_loss"]
    if training["loader"]["length"] == state.loader.length:
        state.loader.restore(training["loader"])
    return dict(training["about"])


def _write_tensors(file: Path, state: TrainingState) -> None:
    """`{optimiser}.{parameter}.{name}`, `ema.{parameter}`, `random`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {RANDOM: torch.get_rng_state()}
    for number, optimizer in enumerate(state.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    tensors[f"{number}.{index}.{name}"] = torch.as_tensor(value).cpu()
    tensors |= {f"ema.{name}": value.cpu() for name, value in state.ema.items()}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:  # the library's word for an OSError
        raise OSError(str(error)) from error


def _read_tensors(file: Path, state: TrainingState) -> None:
    from safetensors.torch import load_file

    tensors = load_file(file)
    torch.set_rng_state(tensors.pop(RANDOM))
    state.ema = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    by_parameter: dict[int, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        if number.isdecimal():
            index, _, key = rest.partition(".")
            by_parameter.setdefault(int(number), {}).setdefault(int(index), {})[key] = tensor
    if by_parameter and set(by_parameter) != set(range(len(state.optimizers))):
        raise DataError(
            f"{file} is of another optimizer than the recipe's: go back to it, or give the run another name"
        )
    for place, optimizer in enumerate(state.optimizers):
        kept = optimizer.state_dict()
        kept["state"] = by_parameter.get(place, {})
        optimizer.load_state_dict(kept)


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
