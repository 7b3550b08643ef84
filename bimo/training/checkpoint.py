"""Checkpoints: everything a training needs to go on as if nothing had happened.

    checkpoints/step-00000500/   a model directory like any other (`bimo generate` reads it), and beside the weights
        optimizer/*.safetensors  optimisers' tensors, averaged weights, each process's state of the random numbers
        training.json            step, the loader's place, what the run knows of itself

Of a model with an adapter both are the adapter's directory: what is frozen is in the base, and neither written nor read
again.

A checkpoint appears by one rename, with a record of its files' hashes: a process killed at any moment leaves whole ones
only, and one that was torn by the disk is noticed and the one before it is used.

No process ever holds all of it. Weights come together one after the other, and the first process writes them; of what
is in optimizer/ each process writes its own part (torch.distributed.checkpoint, whose safetensors storage needs neither
a pickle nor a list of parts beside the files). It is read the same way, by any number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimo.adapters.base import Adapter
from bimo.adapters.kinds import adapter_of
from bimo.errors import BimoError, CorruptModelError, DataError
from bimo.formats.huggingface import load_weights, read_json, read_model_config, save_directory
from bimo.formats.integrity import check_record, write_record
from bimo.formats.peft import is_adapter, read_adapter, write_adapter
from bimo.training.distributed import from_main, shard_like, whole
from bimo.training.loop import TrainingState

__all__ = ["checkpoints", "latest_checkpoint", "load_checkpoint", "remove_old", "save_checkpoint", "save_model"]

NAME = re.compile(r"step-(\d{8,})")
FILE_BYTES = 512 * 1024**2  # of one file in optimizer/, over all processes: the library copies a part before it writes


def save_model(state: TrainingState, folder: Path, *, source: Path, lineage: dict[str, Any]) -> None:
    """Write the model as it stands (its averaged weights, where there are any) as a model directory, or its adapter as
    an adapter's.

    source: directory with the tokenizer. All processes call it, the first one writes.
    """
    _write_model(state, folder, state.ema, source, lineage, final=True)


def save_checkpoint(state: TrainingState, folder: Path, *, source: Path, about: dict[str, Any]) -> Path:
    """Write checkpoints/step-N below `folder`, which all processes see. about: JSON-ready, handed back by
    `load_checkpoint`.

    All processes call it. Raises DataError in all of them when it cannot be written; those that exist are untouched.
    """
    final = folder / f"step-{state.step:08}"
    partial = folder / f".{final.name}.partial"

    def finish() -> None:
        training = {
            "step": state.step,
            "tokens": state.tokens,
            "average_loss": state.average_loss,
            "loader": {"length": state.loader.length, **state.loader.state()},
            "optimizers": _kinds(state),
            "adapter": _adapter_recipe(state),
            "about": about,
        }
        (partial / "training.json").write_text(json.dumps(training, indent=1), encoding="utf-8")
        write_record(partial, {"step": state.step})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)

    try:
        from_main(state.ranks, lambda: shutil.rmtree(partial, ignore_errors=True))
        _write_model(state, partial, {}, source, {"step": state.step}, final=False)
        _write_tensors(state, partial / "optimizer")
        from_main(state.ranks, finish)
    except (OSError, BimoError) as error:
        raise DataError(
            f"checkpoint {final} could not be written ({_reason(error)}): the one before it stays"
        ) from error
    finally:
        if state.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """All finished ones, the oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what killed processes left."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(".*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written; `warn` is told of others."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            mend = "training begins anew" if path == found[0] else "the one before it is used"
            check_record(path, mend, full=True)
            return path
        except CorruptModelError as error:
            warn(f"checkpoint {path.name} is damaged: {error}")
    return None


def load_checkpoint(path: Path, state: TrainingState) -> dict[str, Any]:
    """Bring `state` to where it was when `path` was written; what the caller had kept there as `about`.

    All processes call it, as many as there are now. A loader of another length (the curriculum's next stage) starts
    afresh. Raises DataError when it is of another model or of other optimisers.
    """
    training = read_json(path / "training.json")
    if not _is_of(path, training, state):
        raise DataError(
            f"checkpoint {path} is of another model than the recipe describes: go back to that recipe, or give the run "
            f"another name"
        )
    if training.get("optimizers") != (mine := _kinds(state)):
        raise DataError(
            f"checkpoint {path} is of another optimizer than the recipe's ({training.get('optimizers')}, not {mine}): "
            f"go back to it, or give the run another name"
        )
    with torch.no_grad():
        for name, tensor in _read_weights(path, state.model):
            weight = state.model.get_parameter(name)
            weight.copy_(shard_like(tensor, weight))
    _read_tensors(state, path / "optimizer")
    state.step, state.tokens, state.average_loss = training["step"], training["tokens"], training["average_loss"]
    if training["loader"]["length"] == state.loader.length:
        state.loader.restore(training["loader"])
    return dict(training["about"])


def _kinds(state: TrainingState) -> list[str]:
    return [type(optimizer).__name__ for optimizer in state.optimizers]


def _adapter_recipe(state: TrainingState) -> dict[str, Any] | None:
    adapter = adapter_of(state.model)
    return None if adapter is None else adapter.recipe.model_dump(mode="json")


def _is_of(path: Path, training: dict[str, Any], state: TrainingState) -> bool:
    """Whether the checkpoint is of this model: of its config, or of its adapter and base."""
    adapter = adapter_of(state.model)
    if adapter is None:
        return not is_adapter(path) and read_model_config(path) == state.model.config
    if not is_adapter(path) or training.get("adapter") != _adapter_recipe(state):
        return False
    file = read_adapter(path)
    return file.base == adapter.base and file.labels == getattr(state.model.config, "labels", ())


def _read_weights(path: Path, model: Any) -> Iterator[tuple[str, Tensor]]:
    adapter = adapter_of(model)
    if adapter is None:
        yield from load_weights(path, model.config)
    else:
        _, tensors = read_adapter(path).read(model.config)
        yield from adapter.from_file(tensors).items()


# --- weights: whole, one at a time --------------------------------------------------------------------------------


def _write_model(
    state: TrainingState,
    folder: Path,
    instead: dict[str, Tensor],
    source: Path,
    lineage: dict[str, Any],
    *,
    final: bool,
) -> None:
    """A directory of the weights, some of them replaced. An error of the first process is raised in all. final: of an
    adapter, without what only a training that goes on needs."""
    adapter = adapter_of(state.model)
    changing = dict(state.model.named_parameters()) if adapter is None else adapter.trained
    weights = _one_by_one({**changing, **instead})
    trouble: Exception | None = None
    try:
        if state.ranks.is_main and adapter is not None:
            _write_adapter(adapter, folder, dict(weights), source, lineage, final)
        elif state.ranks.is_main:
            save_directory(folder, state.model.config, weights, source=source, lineage=lineage)
    except (OSError, BimoError) as error:
        trouble = error
    for _ in weights:  # the others send their parts; so does the first where it could not write, or they would wait
        pass

    def outcome() -> None:
        if trouble:
            raise trouble

    from_main(state.ranks, outcome)


def _write_adapter(
    adapter: Adapter, folder: Path, weights: dict[str, Tensor], source: Path, lineage: dict[str, Any], final: bool
) -> None:
    tensors = adapter.to_file(weights, final=final)
    config = adapter.model.config
    write_adapter(folder, config, adapter.recipe, tensors, base=adapter.base, source=source, lineage=lineage)


def _one_by_one(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, whole(tensor).detach().cpu()


# --- everything else: in parts ------------------------------------------------------------------------------------


def _write_tensors(state: TrainingState, folder: Path) -> None:
    """`{parameter}.{name}` of the optimisers, `ema.{parameter}`, `adapter.{name}` of its state, `random.{rank}`."""
    import torch.distributed.checkpoint as dcp

    tensors = {f"ema.{name}": value for name, value in state.ema.items()}
    if (adapter := adapter_of(state.model)) is not None:
        tensors |= {f"adapter.{name}": value for name, value in adapter.state().items()}
    names = {weight: name for name, weight in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for weight, values in optimizer.state.items():
            for name, value in values.items():
                if value is not None:
                    tensors[f"{names[weight]}.{name}"] = torch.as_tensor(value)
    files, reached = {f"random.{rank}": 1 for rank in range(state.ranks.world_size)}, 0
    for name, tensor in tensors.items():
        files[name], reached = 1 + reached // FILE_BYTES, reached + tensor.nbytes
    tensors[f"random.{state.ranks.rank}"] = torch.get_rng_state()
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=state.ranks.world_size == 1)


def _read_tensors(state: TrainingState, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    kept = reader.read_metadata().state_dict_metadata
    mine = f"random.{state.ranks.rank}"
    tensors = {mine: torch.get_rng_state()} if mine in kept else {}  # else there was no such process
    weights = dict(state.model.named_parameters())
    average: dict[str, Tensor] = {}
    of_adapter: dict[str, Tensor] = {}
    of_weight: dict[Tensor, dict[str, Tensor]] = {}
    for name in kept:
        first, _, rest = name.partition(".")
        if first == "random":
            continue
        parameter, _, key = name.rpartition(".")
        if first == "ema":
            average[rest] = tensors[name] = _empty(kept[name], weights[rest])
        elif first == "adapter":
            of_adapter[rest] = tensors[name] = _empty(kept[name], None)
        else:
            tensors[name] = _empty(kept[name], weights[parameter])
            of_weight.setdefault(weights[parameter], {})[key] = tensors[name]
    with _plain_errors():
        dcp.load(tensors, storage_reader=reader, no_dist=state.ranks.world_size == 1)
    if mine in tensors:
        torch.set_rng_state(tensors[mine])
    state.ema = average
    if (adapter := adapter_of(state.model)) is not None:
        adapter.restore(of_adapter)
    for optimizer in state.optimizers:
        numbered = enumerate(weight for group in optimizer.param_groups for weight in group["params"])
        states = {number: of_weight[weight] for number, weight in numbered if weight in of_weight}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _empty(kept: Any, weight: Tensor | None) -> Tensor:
    """To read into: what is shaped like its weight is divided like it, the rest are counts."""
    dtype = kept.properties.dtype
    if weight is not None and kept.size == weight.shape:
        return torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return torch.empty(kept.size, dtype=dtype)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The library gathers the errors of all processes in one that is no Exception; the first of them as a DataError."""
    from torch.distributed.checkpoint import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is meant
        try:
            yield
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if not isinstance(first, Exception):
                raise first from None
            raise DataError(_reason(first)) from error


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
