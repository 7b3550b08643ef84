"""`make bench`: bimo and its peers on this machine, interleaved in one run, medians with their spread, and ratios.

    python -m benchmarks.run --rounds 5 --engines bimo transformers-bf16 --workloads single batch16 prefill1000

Each engine lives in a process of its own; a round measures every engine once on a workload before the next round
begins, so that what else the machine does falls on all alike. The first measurement of each is a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.worker import ENGINES, WORKLOADS
from bimo.runtime import cpu_info, cpu_threads

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
GOALS = {("single", "transformers-bf16"): 1.5, ("batch16", "transformers-bf16"): 2.0}
GOALS[("prefill1000", "transformers-bf16")] = 1.0


class Worker:
    """An engine's process."""

    def __init__(self, engine: str, model: str) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", engine, model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._read()["loaded"]

    def measure(self, workload: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"workload": workload}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def rate(workload: str, result: dict[str, Any]) -> float:
    """Tokens a second: of the prompt where the workload is a prefill, else of the answers."""
    count, length, _ = WORKLOADS[workload]
    tokens = count * length if workload.startswith("prefill") else result["tokens"]
    return tokens / result["seconds"]


def measure_all(model: str, engines: list[str], workloads: list[str], rounds: int) -> dict[str, Any]:
    """{workload: {engine: [rates]}}, and each engine's load time and peak memory."""
    workers = {engine: Worker(engine, model) for engine in engines}
    rates: dict[str, dict[str, list[float]]] = {w: {e: [] for e in engines} for w in workloads}
    peaks = dict.fromkeys(engines, 0)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(workloads) * (rounds + 1) * len(engines))
        for workload in workloads:
            for number in range(rounds + 1):
                for engine, worker in workers.items():
                    result = worker.measure(workload)
                    peaks[engine] = max(peaks[engine], result["peak_bytes"])
                    if number:
                        rates[workload][engine].append(rate(workload, result))
                    progress.advance(task)
    loaded = {engine: worker.loaded for engine, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {"rates": rates, "loaded_seconds": loaded, "peak_bytes": peaks}


def show(found: dict[str, Any], engines: list[str]) -> Table:
    """The table people read: median (lowest-highest) and bimo's ratio to each peer, with the goal where one is set."""
    table = Table("workload", *(f"{engine} tokens/s" for engine in engines), "bimo / peer (goal)")
    for workload, by_engine in found["rates"].items():
        medians = {engine: statistics.median(values) for engine, values in by_engine.items()}
        cells = [f"{medians[e]:,.0f} ({min(by_engine[e]):,.0f}-{max(by_engine[e]):,.0f})" for e in engines]
        ratios = []
        for peer in engines:
            if "bimo" in medians and peer != "bimo":
                goal = GOALS.get((workload, peer))
                ratios.append(f"{medians['bimo'] / medians[peer]:.2f}x {peer}" + (f" (>= {goal}x)" if goal else ""))
        table.add_row(workload, *cells, "\n".join(ratios))
    return table


def commit() -> str:
    """The commit measured, with + when files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Measure, print, and write benchmarks/results/<time>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["bimo", "transformers-bf16"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["single", "batch16", "prefill1000"])
    arguments = parser.parse_args()
    found = measure_all(arguments.model, arguments.engines, arguments.workloads, arguments.rounds)
    found |= {
        "model": arguments.model,
        "commit": commit(),
        "cpu": cpu_info().name,
        "threads": cpu_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    console = Console()
    console.print(show(found, arguments.engines))
    console.print(f"{found['cpu']}, {found['threads']} threads, commit {found['commit']}")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{found['time'].replace(':', '')}-{arguments.model}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {file.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
