"""Where a run's numbers go beside its own metrics.jsonl: TensorBoard, or a service by name.

tracker = TRACKERS["tensorboard"](folder, "quickstart", settings, start_step=0)
tracker.log(100, {"loss": 3.2, "validation/zh/bits_per_byte": 1.9}); tracker.close()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from bimo.errors import MissingDependencyError

__all__ = ["TRACKERS", "Tracker"]

Settings = Mapping[str, Any]


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
    """Weights & Biases; `wandb login`, or WANDB_MODE=offline."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", 'trackers = ["wandb"]') from None
        self.run = wandb.init(project="bimo", name=name, dir=str(folder), config=dict(settings), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """MLflow; MLFLOW_TRACKING_URI says where, else folder/mlruns."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            import mlflow
        except ImportError:
            raise MissingDependencyError("mlflow", 'trackers = ["mlflow"]') from None
        self.mlflow = mlflow
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri((folder / "mlruns").absolute().as_uri())
        mlflow.set_experiment("bimo")
        mlflow.start_run(run_name=name)
        mlflow.log_params(dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({key.replace(":", "_"): value for key, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class _SwanLab:
    """SwanLab; `swanlab login`, or mode="local"."""

    def __init__(self, folder: Path, name: str, settings: Settings, start_step: int) -> None:
        try:
            import swanlab
        except ImportError:
            raise MissingDependencyError("swanlab", 'trackers = ["swanlab"]') from None
        self.run = swanlab.init(project="bimo", experiment_name=name, logdir=str(folder), config=dict(settings))
        self.swanlab = swanlab

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.swanlab.log(dict(values), step=step)

    def close(self) -> None:
        self.swanlab.finish()


TRACKERS: dict[str, Callable[[Path, str, Settings, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "swanlab": _SwanLab,
}
