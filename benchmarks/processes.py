"""An engine's processes: a worker that answers measurements, and a server that answers HTTP. Both close cleanly.

    with Worker(name, engine, model) as worker:
        seconds, answers = worker.ask([[1, 2, 3]], new_tokens=100)

What an engine prints is kept in benchmarks/.peers/logs/<name>.log; an engine that fails raises EngineFailed with its
own words.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engines import Engine
from benchmarks.peers import FOLDER

__all__ = ["EngineFailed", "Server", "Worker"]

ROOT = Path(__file__).parents[1]
LOAD_PATIENCE = 600.0  # seconds until a model is loaded
CALL_PATIENCE = 900.0  # seconds for one call
CLOSE_PATIENCE = 15.0


class EngineFailed(Exception):
    """What went wrong with one engine, in one line; the others go on."""


class _Process:
    """A process in a group of its own, so that what it started ends with it."""

    def __init__(self, name: str, command: list[str], engine: Engine, **pipes: Any) -> None:
        self.name = name
        self.log = FOLDER / "logs" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as errors:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": errors, **pipes}
            try:
                self.process = subprocess.Popen(
                    command, stderr=errors, cwd=ROOT, env=engine.variables(), start_new_session=True, text=True, **pipes
                )
            except OSError as error:
                raise EngineFailed(f"it cannot be started: {error}") from None

    def memory(self) -> dict[str, int]:
        """Bytes resident now and at the peak, summed over the process and those it started."""
        resident = peak = 0
        main = psutil.Process(self.process.pid)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                resident += process.memory_info().rss
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak += int(status.split("VmHWM:")[1].split()[0]) * 1024
        return {"resident": resident, "peak": peak}

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or ["it said nothing"])[-1][:300]

    def close(self) -> None:
        """End the process and its children: asked first, then told."""
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        else:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_PATIENCE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group: whatever is left of it
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.close()


class Worker(_Process):
    """An engine in its environment, loaded."""

    def __init__(self, name: str, engine: Engine, model: str) -> None:
        command = engine.worker_command(model)
        super().__init__(name, command, engine, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.loaded = self._reply(LOAD_PATIENCE)["loaded"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def ask(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds and answers. Raises EngineFailed, also when an answer has not exactly `new_tokens` tokens."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise EngineFailed(self._ended()) from None
        reply = self._reply(CALL_PATIENCE)
        lengths = [len(answer) for answer in reply["answers"]]
        if lengths != [new_tokens] * len(prompts):
            raise EngineFailed(f"it made {lengths} tokens, not {len(prompts)} times {new_tokens}")
        return reply["seconds"], reply["answers"]

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def _reply(self, patience: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=patience)
        except queue.Empty:
            self.close()  # its late answer must not be taken for the next call's
            raise EngineFailed(f"no answer in {patience:.0f} seconds") from None
        if not line:
            raise EngineFailed(self._ended())
        reply = json.loads(line)
        if "failed" in reply:
            raise EngineFailed(reply["failed"])
        return reply

    def _ended(self) -> str:
        return f"its process ended with code {self.process.wait()}: {self.last_words()}"

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class Server(_Process):
    """An engine's own HTTP server, ready when `probe(port)` is true."""

    def __init__(self, name: str, engine: Engine, model: str, port: int, probe: Any) -> None:
        super().__init__(f"{name}-server", engine.server_command(model, port), engine)
        self.port = port
        deadline = time.monotonic() + LOAD_PATIENCE
        try:
            while not probe(port):
                if self.process.poll() is not None:
                    raise EngineFailed(f"its server ended with code {self.process.wait()}: {self.last_words()}")
                if time.monotonic() > deadline:
                    raise EngineFailed(f"its server was not ready in {LOAD_PATIENCE:.0f} seconds")
                time.sleep(0.2)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Server:
        return self
