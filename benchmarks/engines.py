"""Who takes part: every engine with its weights, its environment, its worker, its HTTP server and its workloads.

bimo's entries run in bimo's own environment, and so does transformers; the others have theirs (see peers.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import python_of
from bimo.runtime import cpu_threads

__all__ = ["ENGINES", "Engine"]

SINGLE_ROWS = ("single", "batch16", "prefill1000")
ALL_ROWS = (*SINGLE_ROWS, "prefill4000", "history", "memory", "cold", "http64")
LLAMA_CONTEXT = 64 * 1024  # tokens for 64 requests at once


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One entry of the tables."""

    worker: str  # module of benchmarks.workers
    weights: str  # int8, 4-bit, bf16, f32, or "default": what bimo chooses
    workloads: tuple[str, ...]
    model: str = "directory"  # the form of the model, see peers.model_file; "name": as the user named it
    peer: str = ""  # its environment; "": bimo's own
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    server: tuple[str, ...] = ()  # command; {bin}, {python}, {model}, {port}, {threads}, {worker} are filled in
    end_token: str = "ignore_eos"  # how its server is told to go on after the end token, or "logit_bias"

    @property
    def is_own(self) -> bool:
        """Whether this is bimo."""
        return self.worker == "own"

    @property
    def python(self) -> Path:
        return python_of(self.peer) if self.peer else Path(sys.executable)

    def worker_command(self, model: str) -> list[str]:
        settings = {"model": model, "threads": cpu_threads(), **self.settings}
        return [str(self.python), "-m", f"benchmarks.workers.{self.worker}", json.dumps(settings)]

    def server_command(self, model: str, port: int) -> list[str]:
        threads = cpu_threads()
        worker = json.dumps({"model": model, "threads": threads, "port": port, **self.settings})
        names = {"bin": self.python.parent, "python": self.python, "model": model, "port": port, "threads": threads}
        return [part.format(**names, worker=worker) for part in self.server]

    def variables(self) -> dict[str, str]:
        """The environment its processes get: as many threads as cores, and nothing fetched."""
        common = {"OMP_NUM_THREADS": str(cpu_threads()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **common, **self.environment}


BIMO_SERVER = ("{python}", "-m", "bimo.cli.main", "serve", "{model}", "--port", "{port}", "--model-name", "bench")


def _bimo(*workloads: str, quant: str | None = None, weights: str | None = None, **environment: str) -> Engine:
    settings, flags = ({"quant": quant}, ("--quant", quant)) if quant else ({}, ())
    return Engine(
        worker="own",
        weights=weights or quant or "default",
        workloads=workloads,
        model="name",
        settings=settings,
        environment=environment,
        server=(*BIMO_SERVER, *flags),
    )


ENGINES = {
    "bimo": _bimo(*ALL_ROWS, "repeat"),
    "bimo-int8": _bimo(*SINGLE_ROWS, "prefill4000", "memory", quant="int8"),
    "bimo-file": _bimo("single-file", "repeat", quant="file", weights="4-bit"),
    "bimo-none": _bimo(*SINGLE_ROWS, quant="none", weights="bf16"),
    "bimo-torch": _bimo(*SINGLE_ROWS, BIMO_KERNELS="0"),
    "llama-cpp-file": Engine(
        worker="llama_cpp",
        weights="4-bit",
        workloads=(*SINGLE_ROWS, "single-file", "repeat", "cold"),
        model="gguf-file",
        peer="llama-cpp",
    ),
    "llama-cpp-lookup": Engine(
        worker="llama_cpp",
        weights="4-bit",
        workloads=("repeat",),
        model="gguf-file",
        peer="llama-cpp",
        settings={"lookup": 10},
    ),
    "llama-cpp-int8": Engine(
        worker="llama_cpp",
        weights="int8",
        workloads=ALL_ROWS,
        model="gguf-q8",
        peer="llama-cpp",
        server=(
            *("{bin}/llama-server", "--model", "{model}", "--port", "{port}", "--threads", "{threads}"),
            *("--threads-batch", "{threads}", "--parallel", "64", "--ctx-size", str(LLAMA_CONTEXT), "--log-disable"),
        ),
    ),
    "llama-cpp-python": Engine(
        worker="llama_cpp",
        weights="int8",
        workloads=("http64",),
        model="gguf-q8",
        peer="llama-cpp",
        server=(
            *("{python}", "-m", "llama_cpp.server", "--model", "{model}", "--port", "{port}", "--n_ctx", "2048"),
            *("--n_threads", "{threads}", "--n_threads_batch", "{threads}", "--interrupt_requests", "false"),
            *("--logits_all", "false"),
        ),
        end_token="logit_bias",
    ),
    "openvino-int8": Engine(
        worker="openvino",
        weights="int8",
        workloads=ALL_ROWS,
        model="openvino-int8",
        peer="openvino",
        server=("{python}", "-m", "benchmarks.workers.openvino_server", "{worker}"),
    ),
    "openvino-file": Engine(
        worker="openvino", weights="4-bit", workloads=("single-file",), model="gguf-file", peer="openvino"
    ),
    "openvino-lookup": Engine(
        worker="openvino",
        weights="int8",
        workloads=("repeat",),
        model="openvino-int8",
        peer="openvino",
        settings={"lookup": 5},
    ),
    "vllm-bf16": Engine(
        worker="vllm",
        weights="bf16",
        workloads=(*SINGLE_ROWS, "prefill4000", "history", "cold", "http64"),
        peer="vllm",
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
        server=(
            *("{python}", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--port", "{port}"),
            *("--host", "127.0.0.1", "--served-model-name", "bench", "--dtype", "bfloat16", "--enforce-eager"),
            *("--max-model-len", "8192", "--max-num-seqs", "64"),
        ),
    ),
    "transformers-bf16": Engine(
        worker="transformers",
        weights="bf16",
        workloads=(*SINGLE_ROWS, "prefill4000", "cold"),
        settings={"dtype": "bfloat16"},
    ),
    "transformers-f32": Engine(
        worker="transformers", weights="f32", workloads=SINGLE_ROWS, settings={"dtype": "float32"}
    ),
}
