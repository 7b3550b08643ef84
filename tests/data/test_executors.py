"""Tasks on processes and on Ray: all results, the function's own errors, and one sentence for a killed process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bimo.data.executors import EXECUTORS
from bimo.data.pipeline import prepare
from bimo.errors import DataError, MissingDependencyError, UsageError
from bimo.recipe import DataRecipe

RECIPE = {"clean": {"near_duplicates": 0.8}, "validation": 0.2, "passage_chars": 100}


def test_all_results_come_with_their_numbers() -> None:
    tasks = [(number, (number, 2)) for number in range(20)]
    for workers in (1, 2, None):
        assert dict(EXECUTORS["local"](pow, tasks, workers)) == {number: number**2 for number in range(20)}
    assert list(EXECUTORS["local"](pow, [], 2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_functions_errors_arrive(workers: int, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        list(EXECUTORS["local"](os.stat, [(0, (tmp_path / "gone",)), (1, (tmp_path,))], workers))
    with pytest.raises(UsageError, match="word"):
        list(EXECUTORS["local"](_wrong, [(0, ("word",)), (1, ("word",))], workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_package_is_named(workers: int) -> None:
    with pytest.raises((MissingDependencyError, DataError), match="pip install nonsense"):
        list(EXECUTORS["local"](_lacking, [(0, ()), (1, ())], workers))


def test_a_killed_process_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"was killed .*run the same command again") as caught:
        list(EXECUTORS["local"](os._exit, [(0, (9,)), (1, (9,))], 2))
    assert "\n" not in str(caught.value)


def _wrong(text: str) -> None:
    raise UsageError(text, "param")


def _lacking() -> None:
    raise MissingDependencyError("nonsense", "this")


@pytest.fixture
def recipe(tmp_path: Path) -> DataRecipe:
    sources = []
    for number in range(3):
        rows = [
            {"text": f"No {number} {place}: " + "春夏秋冬"[place % 4] * 3 + f"的是 the and {place * 7919}"}
            for place in range(50)
        ]
        rows += [{"text": "一样的文字，the same text again. " + "，".join(str(place) for place in range(30))}]
        file = tmp_path / f"s{number}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        sources.append({"name": file.stem, "path": str(file)})
    return DataRecipe.model_validate({"sources": sources, **RECIPE})


def contents(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("documents/*"), folder / "manifest.json", folder / "manifest.html"]
    return {file.name: file.read_bytes() for file in files}


def test_ray_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="pip install ray"):
        list(EXECUTORS["ray"](pow, [(0, (1, 2))], 1))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    ray = pytest.importorskip("ray", reason="the ray executor needs ray: pip install ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    root = str(Path(__file__).parents[2])  # what a cluster has installed
    monkeypatch.setenv("PYTHONPATH", root)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def test_ray_does_what_local_does(
    cluster: Any, recipe: DataRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative folder is one on the driver's machine
    said: list[tuple[str, int, int]] = []
    prepare(recipe, Path("ray"), executor="ray", progress=lambda *step: said.append(step))
    prepare(recipe, Path("local"), executor="local", workers=1)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert [done for label, done, total in said if label == "cleaning"][-1] == said[0][2]
    assert cluster.is_initialized()  # what others started stays

    assert dict(EXECUTORS["ray"](pow, [(n, (n, 2)) for n in range(7)], 2)) == {n: n**2 for n in range(7)}
    with pytest.raises(FileNotFoundError):
        list(EXECUTORS["ray"](os.stat, [(0, (tmp_path / "gone",))], None))
    with pytest.raises(MissingDependencyError, match="pip install nonsense"):
        list(EXECUTORS["ray"](_lacking, [(0, ())], None))
