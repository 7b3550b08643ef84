"""Where a run's numbers go beside its own metrics.jsonl: TensorBoard, or a service by name.

A run that goes on after an end goes on there too: the service's name for it is kept in the run's folder.

    tracker = TRACKERS["tensorboard"](folder, "quickstart", settings, start_step=0)
    tracker.log(100, {"loss": 3.2, "validation/zh/bits_per_byte": 1.9}); tracker.close()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bimo.errors import MissingDependencyError, UsageError

__all__ = ["TRACKERS", "Tracker"]

Settings = Mapping[str, Any]
PROJECT = "bimo"


class Tracker(Protocol):
    """Takes numbers by step; a run that was resumed logs its steps from `start_step` on again."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Files under folder/tensorboard: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError("tensorboard", 'trackers = ["tensorboard"]') from None
        # steps after the checkpoint will come again: what an earlier process wrote of them is hidden
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Weights & Biases; `wandb login`, or WANDB_MODE=offline. Steps that come again are its first ones."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", 'trackers = ["wandb"]') from None
        known = _known_run(folder, "wandb", start_step)
        with _starting("wandb", "run `wandb login`, or set WANDB_MODE=offline"):
            self.run = wandb.init(
                project=PROJECT, name=name, dir=str(folder), config=dict(settings), id=known, resume="allow"
            )
        _know_run(folder, "wandb", self.run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """MLflow; MLFLOW_TRACKING_URI says where, else folder/mlflow.db: `mlflow ui --backend-store-uri sqlite:///...`."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            import mlflow
        except ImportError:
            raise MissingDependencyError("mlflow", 'trackers = ["mlflow"]') from None
        self.mlflow = mlflow
        known = _known_run(folder, "mlflow", start_step)
        with _starting("mlflow", "look at MLFLOW_TRACKING_URI"):
            self.has_own_database = not mlflow.is_tracking_uri_set()
            if self.has_own_database:
                mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
            mlflow.set_experiment(PROJECT)
            run = mlflow.start_run(run_id=known, run_name=name)
            mlflow.log_params(dict(settings))
        _know_run(folder, "mlflow", run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # in a thread of its own: a database or a network is not what a step waits for, or ends by
        self.mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def close(self) -> None:
        self.mlflow.flush_async_logging()
        self.mlflow.end_run()
        if self.has_own_database:
            self.mlflow.set_tracking_uri(None)  # of the whole process: the next run has another


class _SwanLab:
    """SwanLab; `swanlab login`, or SWANLAB_MODE=offline."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            import swanlab
        except ImportError:
            raise MissingDependencyError("swanlab", 'trackers = ["swanlab"]') from None
        known = _known_run(folder, "swanlab", start_step)
        with _starting("swanlab", "run `swanlab login`, or set SWANLAB_MODE=offline"):
            self.run = swanlab.init(
                project=PROJECT, name=name, log_dir=str(folder / "swanlab"), config=dict(settings), id=known,
                resume="allow",
            )  # fmt: skip
        _know_run(folder, "swanlab", self.run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


@contextmanager
def _starting(name: str, mend: str) -> Iterator[None]:
    """A service says in many ways that it cannot be reached or does not know who asks."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f'trackers = ["{name}"] could not start ({reason}): {mend}, or leave it out', "training.trackers"
        ) from error


def _known_run(folder: Path, service: str, start_step: int) -> str | None:
    """The service's name for this run, where it goes on with one."""
    file = folder / f".{service}-run"
    return file.read_text(encoding="utf-8") if start_step and file.is_file() else None


def _know_run(folder: Path, service: str, run: str) -> None:
    (folder / f".{service}-run").write_text(run, encoding="utf-8")


TRACKERS: dict[str, Callable[[Path, str, Settings, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "swanlab": _SwanLab,
}
