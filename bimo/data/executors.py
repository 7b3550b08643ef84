"""Who does a pipeline's units: this machine's processes, or a Ray cluster.

    for number, result in EXECUTORS["local"](function, [(0, arguments), (1, arguments)], workers): ...

Results come as they are ready. The function and its arguments must be picklable, and on a cluster the files they name
must be on storage that all machines share.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bimo.errors import DataError, MissingDependencyError
from bimo.runtime import cpu_threads

__all__ = ["EXECUTORS", "Executor", "Results", "Task"]

Task = tuple[int, tuple[Any, ...]]
Results = Iterator[tuple[int, Any]]
Executor = Callable[[Callable[..., Any], Sequence[Task], int | None], Results]
KILLED = (
    "a process that was preparing documents was killed (out of memory?): run the same command again, it goes on where "
    "it stopped; fewer --workers need less memory"
)


def run_local(function: Callable[..., Any], tasks: Sequence[Task], workers: int | None) -> Results:
    """In as many processes as there are cores; in this one when there is but one task or one worker.

    Processes are started afresh and not forked: torch's and pyarrow's threads do not survive a fork.
    """
    workers = min(workers or cpu_threads(), len(tasks))
    if workers <= 1:
        for number, arguments in tasks:
            yield number, function(*arguments)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        futures = {pool.submit(function, *arguments): number for number, arguments in tasks}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except (BrokenProcessPool, MemoryError):
            raise DataError(KILLED) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """A process ends with the one that started it, also when that was killed; and at Ctrl-C without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        signal.raise_signal(signal.SIGTERM)


def run_ray(function: Callable[..., Any], tasks: Sequence[Task], workers: int | None) -> Results:
    """On a Ray cluster: the one that RAY_ADDRESS or a running `ray start` names, else a local one.

    workers: how many tasks the cluster is given at a time; else all.
    """
    try:
        import ray
    except ImportError:
        raise MissingDependencyError("ray", 'executor = "ray"') from None

    started = not ray.is_initialized()
    try:
        if started:  # without num_cpus, which a cluster that runs already refuses
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        remote: Any = ray.remote(lambda arguments: function(*arguments))
        waiting = list(reversed(tasks))
        pending: dict[Any, int] = {}
        while waiting or pending:
            while waiting and len(pending) < (workers or len(tasks)):
                number, arguments = waiting.pop()
                pending[remote.remote(arguments)] = number
            ready, _ = ray.wait(list(pending))
            for reference in ready:
                yield pending.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise DataError(KILLED) from None
    except ConnectionError as error:
        raise DataError(f"no Ray cluster could be reached ({error}): check RAY_ADDRESS, or unset it") from None
    finally:
        if started:
            ray.shutdown()


EXECUTORS: dict[str, Executor] = {"local": run_local, "ray": run_ray}
