"""Adapters where models are loaded: an adapter's folder given as the model, and several beside one model.

    found = find_model("runs/helper/chat/model")    # an adapter's folder: its base's directory, and the adapter
    changes = read_changes({"support": "runs/helper/chat/model"}, config, "smollm2")    # for requests to choose from

An adapter's folder has PEFT's layout (adapter_config.json, adapter_model.safetensors). Alone it is merged into its base
and costs nothing; one that cannot be merged (a bottleneck) is computed by plain torch.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.errors import ModelNotFoundError, UsageError
from bimo.formats.hub import Progress, resolve
from bimo.models.config import DecoderConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bimo.engine.low_rank import Change

__all__ = [
    "FoundModel",
    "adapted_weights",
    "attach_adapter",
    "find_model",
    "is_mergeable",
    "places_taken",
    "read_changes",
    "unmerged",
    "warn_of_bases",
    "warn_of_templates",
    "write_model",
]

_CONFIG = "adapter_config.json"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # a base as PEFT names it, from the Hugging Face hub
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundModel:
    """A model's directory, and the folder of the adapter that is to change it, if one was named."""

    directory: Path
    adapter: Path | None = None

    @property
    def mark(self) -> str:
        """Changes with the weights that are computed with."""
        from bimo.formats.integrity import weights_mark

        return weights_mark(self.directory) + (weights_mark(self.adapter) if self.adapter else "")

    @property
    def tokenizer(self) -> Path:
        """Where its tokenizer is: an adapter that was saved with one was trained on its chat template."""
        own = self.adapter is not None and (self.adapter / "tokenizer.json").is_file()
        return self.adapter if own and self.adapter else self.directory


def find_model(reference: str | os.PathLike[str], *, progress: Progress | None = None) -> FoundModel:
    """`formats.hub.resolve`, which an adapter's folder may be given to as well. Raises what that raises, and
    ModelNotFoundError for an adapter whose base is not there."""
    folder = Path(os.fspath(reference)).expanduser()
    if not _is_adapter(folder) or (folder / "config.json").is_file():
        return FoundModel(resolve(reference, progress=progress))
    from bimo.formats.peft import read_adapter

    base = read_adapter(folder).base
    if _REPOSITORY.fullmatch(base) and not (folder / "bimo.json").is_file() and not Path(base).exists():
        base = f"hf:{base}"  # as PEFT means it
    try:
        found = FoundModel(resolve(base, progress=progress), folder)
    except ModelNotFoundError as error:
        detail = f"{folder} is an adapter, and the base it names is not here: correct base_model_name_or_path in its "
        raise ModelNotFoundError(base, error.near, f"{detail}{_CONFIG}, or put the base there") from None
    warn_of_bases([folder], found.directory)
    return found


def read_changes(adapters: Mapping[str, str | os.PathLike[str]], config: Any, base: str) -> dict[str, Change]:
    """What each adapter adds to the matrices of `base`, by the name requests choose it with.

    Raises UsageError for a name that cannot be one, an adapter for another base, one that cannot be computed beside
    others; ModelNotFoundError for a folder that is none.
    """
    if not isinstance(config, DecoderConfig):
        raise UsageError(
            f"adapters can be computed beside each other on a decoder, {base} is none ({config.family}): give the "
            "adapter's folder as the model",
            "adapters",
        )
    from bimo.engine.low_rank import check_change
    from bimo.formats.merging import lora_matrices

    changes: dict[str, Change] = {}
    for name, folder in adapters.items():
        if not name or name != name.strip() or not name.isprintable():
            raise UsageError(
                f"an adapter needs a name of visible characters, not {name!r}: write NAME=DIRECTORY", "adapters"
            )
        if name == base:
            raise UsageError(f"the adapter {name!r} has the name of its base: give it another", "adapters")
        path = Path(os.fspath(folder)).expanduser()
        if not _is_adapter(path):
            raise ModelNotFoundError(str(path), [], f"the adapter {name!r} should be a folder with {_CONFIG}")
        changes[name] = {matrix: pieces for matrix, pieces in lora_matrices(path, config).items() if pieces}
        check_change(name, changes[name], config)
    return changes


def warn_of_templates(adapters: Mapping[str, str | os.PathLike[str]], directory: Path) -> None:
    """Say in the log which adapters were saved with another chat template than the base's, which serves all."""
    own = _template(directory)
    for name, folder in adapters.items():
        if (found := _template(Path(os.fspath(folder)).expanduser())) is not None and found != own:
            log.warning(
                "the adapter %s was saved with another chat template than the base's, which is the one used: serve "
                "its folder alone to use its own",
                name,
            )


def warn_of_bases(adapters: Iterable[str | os.PathLike[str]], directory: Path) -> None:
    """Say in the log which adapters were trained beside other weights than those in `directory`. It is no error: the
    same base may have been written again in another number type."""
    from bimo.formats.integrity import weights_mark
    from bimo.formats.peft import read_adapter

    own = weights_mark(directory)
    for folder in adapters:
        file = read_adapter(Path(os.fspath(folder)).expanduser())
        if own and file.base_mark and file.base_mark != own:
            log.warning(
                "the adapter %s was trained on %s, whose weights were others than those now in %s: unless it is the "
                "same model written anew, train the adapter again, or give it the base it was trained with",
                folder,
                file.base,
                directory,
            )


def adapted_weights(weights: Iterator[Any], config: Any, folder: Path) -> Iterator[Any]:
    """A base's weights as they stream by, with the adapter merged into them."""
    from bimo.formats.merging import merged_weights

    return merged_weights(weights, config, folder)


def write_model(found: FoundModel, target: Path, reference: str) -> None:
    """A model directory of what was found; an adapter's change is worked into its base. reference: its name.

    Raises UsageError for an adapter that is no change of matrices, or has a head of its own.
    """
    from bimo.formats.huggingface import load_weights, read_model_config, save_directory

    config = read_model_config(found.directory)
    weights = load_weights(found.directory, config)
    if found.adapter is not None:
        from bimo.formats.peft import read_adapter

        if read_adapter(found.adapter).labels:
            raise UsageError(
                f"{reference} is an adapter of a classifier, whose head its base does not have: use the adapter's "
                "folder itself",
                "model",
            )
        weights = adapted_weights(weights, config, found.adapter)
    save_directory(target, config, weights, source=found.tokenizer, lineage={"parent": reference})


def attach_adapter(model: nn.Module, folder: Path, dtype: torch.dtype, *, merge: bool) -> None:
    """Put an adapter on a model of torch, or into its weights; all in `dtype`."""
    from bimo.adapters.kinds import load_adapter
    from bimo.formats.peft import read_adapter

    adapter = load_adapter(model, read_adapter(folder), dtype)
    if merge:
        adapter.merge()
    model.to(dtype).requires_grad_(False)


def is_mergeable(folder: Path) -> bool:
    """Whether an adapter is a change of its base's matrices."""
    from bimo.formats.merging import MERGEABLE
    from bimo.formats.peft import read_adapter

    return read_adapter(folder).kind in MERGEABLE


def unmerged(folder: Path | None) -> str | None:
    """Why an adapter cannot be merged into its base's weights, or None when it can, or there is none."""
    if folder is None or is_mergeable(folder):
        return None
    from bimo.formats.peft import read_adapter

    return f"a {read_adapter(folder).kind} adapter cannot be merged into the weights"


def places_taken(folder: Path | None) -> int:
    """Of the positions that a base can read, those that its adapter takes: a prefix stands before every text."""
    if folder is None:
        return 0
    from bimo.formats.peft import read_adapter

    return read_adapter(folder).num_places


def _is_adapter(folder: Path) -> bool:
    try:
        return (folder / _CONFIG).is_file()
    except (OSError, ValueError):  # a name longer than the system allows
        return False


def _template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None
