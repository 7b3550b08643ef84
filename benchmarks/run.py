"""`make bench`: bimo and its peers on this machine, interleaved in one run; medians with their spread, goals, verdicts.

    python -m benchmarks.run                                           everything: installs the peers on first use
    python -m benchmarks.run --quick --engines bimo llama-cpp-file     a glance, with what is installed
    python -m benchmarks.run --workloads single batch16 --rounds 9

Each engine lives in processes of its own; a round measures every engine once on a workload before the next round
begins, so that what else the machine does falls on all alike. The round before the first is a warm-up and not counted.
An engine that cannot be set up, or fails, is named with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.engines import ENGINES
from benchmarks.http_load import chat_body, free_port, is_ready, run_load
from benchmarks.limits import Limits, gemv_rate, measure_limits
from benchmarks.peers import SetupError, model_file, set_up
from benchmarks.processes import EngineFailed, Server, Worker
from benchmarks.prompts import QUESTIONS, Prompts
from benchmarks.report import goal_table, workload_table
from benchmarks.workloads import FRESH, LIVE, NEW_TOKENS, SERVED, WORKLOADS, Numbers, served_numbers
from bimo.formats.hub import resolve
from bimo.formats.huggingface import read_config
from bimo.models.config import DecoderConfig
from bimo.runtime import cpu_info, cpu_threads
from bimo.tokenizer.load import Tokenizer

__all__ = ["Run", "main"]

RESULTS = Path(__file__).parent / "results"
BUSY = 0.1  # share of the cores that others may use before a run is said to be noisy
QUICK = ("single", "single-file", "batch16", "prefill1000", "history")
Measure = Callable[[int], Numbers]  # salt -> numbers


@dataclass
class Run:
    """One run: what is measured on whom, and what came out."""

    model: str
    engines: Sequence[str]
    rounds: int
    say: Callable[[str], None]
    results: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    loaded: dict[str, float] = field(default_factory=dict)
    gemv: list[float] = field(default_factory=list)  # bytes/s, beside each round of one request

    def __post_init__(self) -> None:
        self.directory = resolve(self.model)
        self.config: DecoderConfig = read_config(self.directory)
        self.tokenizer = Tokenizer.from_directory(self.directory)
        self.prompts = Prompts(self.tokenizer)
        self.files: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}

    def prepare(self, *, install: bool, pip_args: Sequence[str]) -> None:
        """Set up the peers and their model files; engines that lack one are left out."""
        peers = list(dict.fromkeys(ENGINES[name].peer for name in self.engines if ENGINES[name].peer))
        missing = set_up(peers, say=self.say, install=install, pip_args=pip_args)
        made: dict[str, str] = {}
        for name in self.engines:
            engine = ENGINES[name]
            try:
                if engine.peer in missing:
                    raise SetupError(f"{engine.peer} is not installed: {missing[engine.peer]}")
                if engine.model == "name":
                    self.files[name] = self.model
                    continue
                if engine.model not in made:
                    made[engine.model] = str(model_file(engine.model, self.model, self.directory, self.say))
                self.files[name] = made[engine.model]
            except (SetupError, OSError) as error:
                self.fail(name, "set-up", error)

    def measure(self, workloads: Sequence[str]) -> None:
        """All workloads in the order of WORKLOADS: first those with loaded engines, then new processes and servers."""
        try:
            for workload in workloads:
                takers = [name for name in self.files if workload in ENGINES[name].workloads]
                if not takers:
                    continue
                self.say(f"{workload}: {WORKLOADS[workload].about}")
                if workload not in LIVE:
                    self.close()  # what is measured now has the machine's memory for itself
                if workload in SERVED:
                    self._serve(workload, takers)
                elif workload in FRESH:
                    self._interleave(workload, {name: self._fresh(workload, name) for name in takers})
                else:
                    live = {name: self._live(workload, name) for name in takers if self._worker(workload, name)}
                    self._interleave(workload, live)
        finally:
            self.close()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def fail(self, engine: str, workload: str, error: Exception) -> None:
        reason = " ".join(str(error).split())
        self.failures.append({"engine": engine, "workload": workload, "reason": reason})
        self.say(f"  {engine} is left out of {workload}: {reason}")

    def _interleave(self, workload: str, measures: dict[str, Measure]) -> None:
        """Round after round, each engine once; round 0 warms up."""
        number = list(WORKLOADS).index(workload) * 1000  # no workload's prompts are another's
        for round_number in range(self.rounds + 1):
            if workload.startswith("single") and (rate := gemv_rate(self.config.num_parameters)):
                self.gemv.append(rate)
            for engine, measure in list(measures.items()):
                start = time.monotonic()
                try:
                    numbers = measure(number + round_number)
                except EngineFailed as error:
                    self.fail(engine, workload, error)
                    del measures[engine]
                    self.results.get(workload, {}).pop(engine, None)
                    continue
                took = time.monotonic() - start
                if round_number:
                    into = self.results.setdefault(workload, {}).setdefault(engine, {})
                    for name, value in numbers.items():
                        into.setdefault(name, []).append(value)
                shown = ", ".join(f"{value:.4g} {name}" for name, value in numbers.items())
                label = f"round {round_number} of {self.rounds}" if round_number else "warm-up"
                self.say(f"  {label}: {engine} {shown} ({took:.1f} s)")

    def _worker(self, workload: str, name: str) -> Worker | None:
        """The engine's worker, started on first need, and again if it died. None when it cannot start."""
        worker = self.workers.get(name)
        if worker is None or not worker.is_alive:
            if any(failure["engine"] == name and failure["workload"] == "loading" for failure in self.failures):
                return None
            try:
                worker = self.workers[name] = Worker(name, ENGINES[name], self.files[name])
            except EngineFailed as error:
                self.fail(name, "loading", error)
                return None
            self.loaded.setdefault(name, worker.loaded)
        return worker

    def _live(self, workload: str, name: str) -> Measure:
        return lambda salt: LIVE[workload](self.workers[name], self.prompts, salt)

    def _fresh(self, workload: str, name: str) -> Measure:
        start = lambda: Worker(name, ENGINES[name], self.files[name])  # noqa: E731
        return lambda salt: FRESH[workload](start, self.prompts, salt)

    def _serve(self, workload: str, takers: Sequence[str]) -> None:
        """All servers up, then round after round the same load on each."""
        servers: dict[str, Server] = {}
        end_ids = sorted(self.tokenizer.eos_token_ids)
        try:
            for name in takers:
                probe = chat_body("Hello", 1, ENGINES[name].end_token, end_ids)
                try:
                    port = free_port()
                    ready = lambda port, probe=probe: is_ready(port, probe)  # noqa: E731
                    servers[name] = Server(name, ENGINES[name], self.files[name], port, ready)
                except EngineFailed as error:
                    self.fail(name, workload, error)

            def load(name: str) -> Measure:
                def measure(salt: int) -> Numbers:
                    bodies = [
                        chat_body(f"{salt}.{n} {QUESTIONS[n % len(QUESTIONS)]}", NEW_TOKENS, how, end_ids)
                        for n in range(SERVED[workload])
                    ]
                    return served_numbers(run_load(servers[name].port, bodies))

                how = ENGINES[name].end_token
                return measure

            self._interleave(workload, {name: load(name) for name in servers})
        finally:
            for server in servers.values():
                server.close()

    def shares(self, limits: Limits) -> dict[tuple[str, str], float]:
        """How much of the measured limit each engine reached, where a limit is known."""
        found = {}
        try:
            file_bytes = model_file("gguf-file", self.model, self.directory, self.say).stat().st_size
        except SetupError:
            file_bytes = None
        for workload, by_engine in self.results.items():
            for engine, numbers in by_engine.items():
                weights = ENGINES[engine].weights
                limit = None
                if weights == "default":
                    continue
                if workload in ("single", "single-file"):
                    limit = limits.decode(self.config, weights, file_bytes)
                elif workload.startswith("prefill"):
                    limit = limits.prefill(self.config, weights, int(workload.removeprefix("prefill")))
                if limit:
                    found[workload, engine] = statistics.median(numbers["tokens/s"]) / limit
        return found


def commit() -> str:
    """The commit measured, with + when files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write benchmarks/results/<time>-<commit>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, help="5 unless given")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--quick", action="store_true", help="one round of the short workloads, no peer is installed")
    parser.add_argument("--no-install", action="store_true", help="measure only the peers that are installed")
    parser.add_argument("--pip-args", default="", help="more options for pip when peers are installed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args(argv)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    chosen = arguments.workloads or (QUICK if arguments.quick else WORKLOADS)
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160, highlight=False)
    start = time.monotonic()
    run = Run(arguments.model, arguments.engines, rounds, lambda line: console.print(line, markup=False))
    install = not (arguments.quick or arguments.no_install)
    run.prepare(install=install, pip_args=arguments.pip_args.split())
    busy = psutil.cpu_percent(interval=2) / 100
    if busy > BUSY:
        console.print(
            f"warning: other programs use {busy:.0%} of the cores; some engines lose far more to that than others"
        )
    limits = measure_limits(run.config.num_parameters)
    run.measure([workload for workload in WORKLOADS if workload in chosen])
    if run.gemv:
        limits = replace(
            limits, gemv_bytes=statistics.median(run.gemv), gemv_best=max(limits.gemv_best or 0, *run.gemv)
        )
    shares = run.shares(limits)
    found: dict[str, Any] = {
        "model": arguments.model,
        "commit": commit(),
        "cpu": cpu_info().name,
        "threads": cpu_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rounds": rounds,
        "busy_before": busy,
        "limits": limits.to_dict(),
        "results": run.results,
        "shares": [{"workload": w, "engine": e, "share": share} for (w, e), share in shares.items()],
        "loaded_seconds": run.loaded,
        "failures": run.failures,
    }
    for workload in run.results:
        console.print(workload_table(workload, run.results, shares))
    console.print(goal_table(run.results, shares))
    for failure in run.failures:
        line = f"not measured: {failure['engine']} ({failure['workload']}): {failure['reason']}"
        console.print(line, markup=False)
    console.print(f"limits: {limits}", markup=False)
    took = (time.monotonic() - start) / 60
    console.print(
        f"{found['cpu']}, {found['threads']} threads, commit {found['commit']}, {took:.0f} minutes, "
        f"{busy:.0%} of the cores used by others at the start"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{found['time'].replace(':', '')}-{found['commit'].rstrip('+') or 'unknown'}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {file}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines' processes are ended too
    main()
