"""What a training that was left and resumed leaves with each tracker, read back. The services run without a network."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bimo.errors import MissingDependencyError, UsageError
from bimo.objectives.causal import causal_loss
from bimo.training.loop import StepInfo
from bimo.training.session import Job, Texts, train_run
from bimo.training.trackers import TRACKERS
from tests.training.tiny import build, make_recipe

STEPS, LEFT = 6, 4
SERVICES = ("wandb", "mlflow", "swanlab")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def needs(package: str) -> Any:
    return pytest.mark.skipif(not has(package), reason=f"{package} is not installed: pip install {package}")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield


def run(folder: Path, texts: Texts, tracker: str) -> dict[int, float]:
    """Train, leave, go on; the losses by step."""
    recipe = make_recipe(steps=STEPS, eval_every=3, checkpoint_minutes=60, trackers=[tracker])
    losses = {}
    for last in (LEFT, STEPS):
        events = train_run(Job.of(recipe), folder, build(recipe, texts), causal_loss, texts, print)
        for event in events:
            if isinstance(event, StepInfo):
                losses[event.step] = event.loss
            if event.step == last < STEPS:
                break
        events.close()
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_tensorboard(texts: Texts, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = run(tmp_path, texts, "tensorboard")
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert {event.step: event.value for event in read.Scalars("loss")} == pytest.approx(losses)
    assert [event.step for event in read.Scalars("validation/zh/bits_per_byte")] == [3, 6]


@needs("mlflow")
def test_mlflow(texts: Texts, tmp_path: Path) -> None:
    import mlflow

    losses = run(tmp_path, texts, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("bimo").experiment_id])  # one, though it was left
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(losses)
    bits = client.get_metric_history(found.info.run_id, "validation/zh/bits_per_byte")
    assert sorted(metric.step for metric in bits) == [3, 6]
    assert found.info.status == "FINISHED" and found.info.run_name == "t"
    assert found.data.params["steps"] == str(STEPS) and "parameters" in found.data.params


@needs("wandb")
def test_wandb(texts: Texts, tmp_path: Path) -> None:
    losses = run(tmp_path, texts, "wandb")
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two parts of one run
    content = b"".join(file.read_bytes() for file in files)
    assert b"validation/zh/bits_per_byte" in content
    assert all(json.dumps(loss).encode() in content for loss in losses.values())


@needs("swanlab")
def test_swanlab(texts: Texts, tmp_path: Path) -> None:
    losses = run(tmp_path, texts, "swanlab")
    files = sorted(tmp_path.glob("swanlab/run-*/run-*.swanlab"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two parts of one run
    content = b"".join(file.read_bytes() for file in files)
    assert b"validation/zh/bits_per_byte" in content
    assert all(struct.pack("<d", loss) in content for loss in losses.values())


@needs("mlflow")
def test_a_service_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(UsageError, match=r"mlflow.*could not start.*MLFLOW_TRACKING_URI"):
        TRACKERS["mlflow"](tmp_path, "t", {}, 0)


@pytest.mark.parametrize("service", SERVICES)
def test_a_missing_package_is_named(service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, service, None)  # as Python remembers what it does not find
    with pytest.raises(MissingDependencyError, match=f"pip install {service}"):
        TRACKERS[service](tmp_path, "t", {}, 0)
