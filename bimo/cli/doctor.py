"""`bimo doctor`: what this machine has, what bimo will do with it, and what to mend."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from bimo import runtime
from bimo.cli.terminal import human_bytes, human_count

__all__ = ["Check", "doctor", "examine"]

INSTRUCTIONS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
OPTIONAL = {  # import name -> (package, what it is for)
    "bimo_kernels": ("bimo-kernels", "faster kernels"),
    "modelscope": ("modelscope", "modelscope: references"),
    "transformers": ("transformers", "parity tests and benchmarks"),
    "openai": ("openai", "the client used in tests"),
    "playwright": ("playwright", "tests of the page"),
}
NEED_DISK = 1_000_000_000  # the default model with what it is made from, and room to breathe
NEED_MEMORY = 1_000_000_000


@dataclass(frozen=True)
class Check:
    """One line of the report; `warning` says what is wrong and how to mend it, None when all is well."""

    name: str
    value: str
    warning: str | None = None


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Examine this machine and say what to mend."""
    checks = examine()
    warnings = [check for check in checks if check.warning]
    if as_json:
        report = {"ok": not warnings, "checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{check.name.ljust(width)}  {check.value}")
    for check in warnings:
        typer.echo(f"warning: {check.name}: {check.warning}")
    if not warnings:
        typer.echo("all is well")


def examine() -> list[Check]:
    """All checks, in the order of the report. None of them raises, fetches or changes anything."""
    return [
        *_software(),
        *_processor(),
        _memory(),
        *_cache(),
        _optional(),
        _chromium(),
    ]


def _software() -> list[Check]:
    from bimo import __version__

    checks = [Check("bimo", __version__), Check("python", f"{platform.python_version()} ({sys.executable})")]
    try:
        checks.append(Check("pip", version("pip")))
    except PackageNotFoundError:
        mend = f"packages that carry models cannot be fetched: run `{sys.executable} -m ensurepip --upgrade`"
        checks.append(Check("pip", "missing", mend))
    try:
        import torch
    except Exception as error:  # a broken shared library raises OSError, not ImportError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [
            *checks,
            Check("torch", "cannot be imported", f"{reason}: pip install torch"),
        ]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    checks.append(Check("torch", f"{torch.__version__} ({kind}), {torch.get_num_threads()} threads"))
    checks.append(Check("devices", ", ".join(["cpu", *devices])))
    return checks


def _processor() -> list[Check]:
    cpu = runtime.cpu_info()
    known = [flag for flag in INSTRUCTIONS if flag in cpu.flags]
    checks = [
        Check("processor", f"{cpu.name}, {runtime.cpu_threads()} cores for this process"),
        Check("instructions", " ".join(known) or "not told by this system"),
        _weights(),
    ]
    if cpu.fast_bfloat16:
        checks.append(Check("number type", "without --quant bfloat16: this processor multiplies it in hardware"))
    else:
        checks.append(Check("number type", "without --quant float32: this processor has no bfloat16 arithmetic"))
    return checks


def _weights() -> Check:
    """What weights are computed with unless --quant or --dtype says otherwise, and why."""
    try:
        import bimo_kernels
    except ImportError as error:
        mend = "run `make setup` with a C++ compiler (apt-get install g++)"
        if importlib.util.find_spec("bimo_kernels") is not None:
            mend = f"they do not load here ({error}): build them again with `make setup`"
        return Check("weights", "none quantised: the kernels that make int8 fast are not built", mend)
    if not runtime.kernels_wanted():
        return Check("weights", "none quantised: BIMO_KERNELS=0 switches the kernels off")
    best = bimo_kernels.instruction_sets()[0]
    return Check("weights", f"int8 by {best} kernels: the fastest within 1 % of float32's perplexity (--quant)")


def _memory() -> Check:
    from bimo.models.catalog import advise

    memory = runtime.available_memory()
    if memory is None:
        return Check("memory", "not told by this system")
    width = 2 if runtime.cpu_info().fast_bfloat16 else 4
    fits = advise(memory, bytes_per_weight=width)
    room = f", room for {fits[0].name} ({human_count(fits[0].num_parameters)}) or smaller" if fits else ""
    warning = None
    if memory < NEED_MEMORY:
        warning = f"{human_bytes(NEED_MEMORY)} should be free for the default model: end other programs"
    return Check("memory", f"{human_bytes(memory)} free{room}", warning)


def _cache() -> list[Check]:
    from bimo.formats.hub import list_models

    home = runtime.cache_home()
    existing = home
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    warning = None
    if not os.access(existing, os.W_OK):
        warning = f"{existing} cannot be written to: set BIMO_HOME to a folder that can"
    elif free < NEED_DISK:
        warning = f"{human_bytes(NEED_DISK)} should be free: free some, or set BIMO_HOME to a folder on a larger disk"
    try:
        cached = [f"{model.name} ({human_bytes(model.bytes)})" for model in list_models() if model.cached]
    except OSError as error:
        return [Check("cache", str(home), f"it cannot be read ({error}): set BIMO_HOME to a folder that can")]
    return [
        Check("cache", f"{home}, {human_bytes(free)} free on its disk", warning),
        Check("models", ", ".join(cached) or "none yet; `bimo chat` fetches the default one"),
    ]


def _optional() -> Check:
    found, missing = [], []
    for module, (package, purpose) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            missing.append(f"{package} ({purpose})")
            continue
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(package)
    return Check("optional", f"{', '.join(found) or 'none'}; not installed: {', '.join(missing) or 'none'}")


def _chromium() -> Check:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return Check("chromium", str(Path(path)))
    return Check("chromium", "none (only the tests of the page need it: apt-get install chromium)")
