"""`make bench` end to end on a tiny model with bimo alone, and its tables on numbers made up. No time is asserted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("psutil", reason="benchmarks need psutil: pip install psutil")

from benchmarks.engines import ENGINES
from benchmarks.http_load import Outcome, chat_body
from benchmarks.peers import PEERS
from benchmarks.prompts import REPEATS, Prompts
from benchmarks.report import GOALS, goal_table, times_better, workload_table
from benchmarks.run import main
from benchmarks.workloads import FRESH, LIVE, NEW_TOKENS, SERVED, WORKLOADS
from bimo.tokenizer.load import Tokenizer


@pytest.fixture(scope="module")
def long_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for the workloads' prompts."""
    directory = tmp_path_factory.mktemp("bench") / "tiny-long"
    shutil.copytree(tiny_model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return directory


def text_of(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_driver_measures_bimo_and_names_who_is_missing(
    long_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ["bimo", "bimo-torch", "llama-cpp-file"]
    workloads = ["single", "repeat", "batch16", "history", "cold", "memory", "http64"]
    main(
        [
            *("--model", str(long_model), "--rounds", "1", "--no-install", "--output", str(tmp_path)),
            *("--engines", *engines, "--workloads", *workloads),
        ]
    )
    said = capsys.readouterr().out
    [file] = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert set(found["results"]) == set(workloads), said
    for workload in workloads:
        numbers = found["results"][workload]["bimo"]
        assert WORKLOADS[workload].unit in numbers
        assert all(len(values) == 1 and values[0] > 0 for values in numbers.values())
    assert set(found["results"]["single"]) == {"bimo", "bimo-torch"}
    [failure] = found["failures"]  # not installed, or without a file of this model: named, and nothing else suffers
    assert failure["engine"] == "llama-cpp-file" and failure["reason"]
    assert "not measured: llama-cpp-file" in said
    assert found["limits"]["read_bytes"] > 0


def test_an_engine_that_fails_is_named_and_the_others_go_on(
    long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ENGINES["bimo-int8"].__class__(
        worker="own", weights="int8", workloads=("single",), model="name", settings={"no_such_setting": 1}
    )
    monkeypatch.setitem(ENGINES, "bimo-int8", broken)
    main(
        [
            *("--model", str(long_model), "--rounds", "1", "--no-install", "--output", str(tmp_path)),
            *("--engines", "bimo", "bimo-int8", "--workloads", "single"),
        ]
    )
    [file] = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert list(found["results"]["single"]) == ["bimo"]
    assert "no_such_setting" in found["failures"][0]["reason"]


def test_prompts_have_their_length_and_never_come_twice(tiny_model_dir: Path) -> None:
    prompts = Prompts(Tokenizer.from_directory(tiny_model_dir))
    made = prompts.questions(16, 90, salt=1) + prompts.questions(16, 90, salt=2)
    assert {len(ids) for ids in made} == {90}
    assert len({tuple(ids) for ids in made}) == 32
    ending = prompts.chat("one")[-3:]
    assert all(ids[-3:] == ending for ids in made)
    texts = [tuple(ids) for salt in (1, 2) for ids in prompts.texts(4, 1000, salt)]
    assert {len(ids) for ids in texts} == {1000} and len({ids[:16] for ids in texts}) == 8
    assert len(prompts.repeats(1)) == len(REPEATS) == 4


def test_every_workload_and_goal_has_its_engines() -> None:
    assert {*LIVE, *FRESH, *SERVED} == set(WORKLOADS)
    for engine in ENGINES.values():
        assert set(engine.workloads) <= set(WORKLOADS)
        assert not engine.peer or engine.peer in PEERS
        assert not set(engine.workloads) & set(SERVED) or engine.server
    for goal in GOALS:
        for name in (*goal.own, *goal.peers):
            assert goal.workload in ENGINES[name].workloads, goal.about


def test_goals_are_judged_in_words() -> None:
    results = {
        "single": {
            "bimo-int8": {"tokens/s": [300.0, 310.0, 290.0]},
            "bimo-torch": {"tokens/s": [100.0]},
            "llama-cpp-file": {"tokens/s": [160.0, 100.0, 150.0]},
            "transformers-bf16": {"tokens/s": [40.0]},
        },
        "cold": {"bimo": {"s": [3.0]}, "vllm-bf16": {"s": [20.0]}, "llama-cpp-file": {"s": [0.5]}},
        "history": {"bimo": {"warm/cold": [0.08], "warm s": [0.08], "cold s": [1.0]}},
    }
    shares = {("single", "bimo-int8"): 0.64}
    rows = {
        line.split("│")[1].strip(): line for line in text_of(goal_table(results, shares)).splitlines() if "│" in line
    }
    assert "2.00x" in rows["1 request, int8"] and "not reached" not in rows["1 request, int8"]
    assert "64%" in rows["1 request, int8, share of the limit"]
    assert "not reached" in rows["1 request, int8, share of the limit"]
    assert "2.50x" in rows["plain torch, 1 request"] and "not reached" in rows["plain torch, 1 request"]
    assert "llama-cpp-file" in rows["cold start to first token"] and "0.17x" in rows["cold start to first token"]
    assert rows["turn after 2,000 tokens, warm/cold"].count("reached") == 1
    assert "16 requests" not in rows  # not measured at all: no row
    table = text_of(workload_table("single", results, shares))
    assert "300 (290-310)" in table and "64%" in table
    assert table.index("bimo-int8") < table.index("llama-cpp-file") < table.index("transformers-bf16")


def test_numbers_count_the_right_way_round() -> None:
    assert times_better(300, 150, "tokens/s") == 2
    assert times_better(1, 2, "p99 s") == 2
    outcome = Outcome(seconds=2.0, tokens=6400, first_token=[n / 100 for n in range(1, 65)])
    assert outcome.quantile(0.5) == 0.32 and outcome.quantile(0.99) == 0.64


def test_a_server_is_asked_for_exactly_so_many_tokens() -> None:
    plain = chat_body("你好", NEW_TOKENS, "ignore_eos", [0, 2])
    assert plain["ignore_eos"] and plain["stream_options"] == {"include_usage": True}
    biased = chat_body("你好", NEW_TOKENS, "logit_bias", [0, 2])
    assert biased["logit_bias"] == {"0": -100, "2": -100} and "ignore_eos" not in biased
