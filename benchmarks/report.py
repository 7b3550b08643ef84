"""The tables people read: a table a workload, then every goal with what was reached, in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from benchmarks.engines import ENGINES
from benchmarks.workloads import WORKLOADS

__all__ = ["GOALS", "Goal", "Results", "Shares", "goal_table", "workload_table"]

# workload -> engine -> name of the number -> its value in each round
Results = Mapping[str, Mapping[str, Mapping[str, list[float]]]]
Shares = Mapping[tuple[str, str], float]  # (workload, engine) -> share of the measured limit


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be reached: `times` the best peer, or a share of the limit, or a value of bimo's own at most.

    `own`: bimo's entries, the first that was measured counts. `peers`: those it is held against; empty: all.
    `times` counts the better way round: 1.0 of a number where less is better means no more than the best peer.
    """

    about: str
    workload: str
    own: tuple[str, ...] = ("bimo",)
    peers: tuple[str, ...] = ()
    number: str = ""  # "": the workload's first
    times: float | None = None
    share: float | None = None
    at_most: float | None = None


LLAMA_FILE = ("llama-cpp-file", "llama-cpp-lookup")
GOALS = (
    Goal(about="1 request, int8", workload="single", own=("bimo-int8", "bimo"), times=2.0),
    Goal(about="1 request, int8, share of the limit", workload="single", own=("bimo-int8", "bimo"), share=0.7),
    Goal(about="1 request, the file's 4 bits", workload="single-file", own=("bimo-file",), times=2.2),
    Goal(about="answers that repeat", workload="repeat", own=("bimo-file", "bimo"), peers=LLAMA_FILE, times=3.5),
    Goal(about="16 requests", workload="batch16", times=2.5),
    Goal(about="64 requests over HTTP", workload="http64", times=2.0),
    Goal(about="64 over HTTP, p99 to first token", workload="http64", number="p99 s", times=1.0),
    Goal(about="prompt of 1,000 tokens", workload="prefill1000", times=1.5),
    Goal(about="prompt of 4,000 tokens", workload="prefill4000", times=1.5),
    Goal(about="turn after 2,000 tokens, warm/cold", workload="history", at_most=0.10),
    Goal(about="cold start to first token", workload="cold", times=1.0),
    Goal(about="memory, 16 x 1,000 tokens, int8", workload="memory", own=("bimo-int8", "bimo"), times=1.0),
    Goal(
        about="plain torch, 1 request", workload="single", own=("bimo-torch",), peers=("transformers-bf16",), times=3.0
    ),
    Goal(
        about="plain torch, 16 requests",
        workload="batch16",
        own=("bimo-torch",),
        peers=("transformers-bf16",),
        times=2.5,
    ),
)


def more_is_better(number: str) -> bool:
    return number == "tokens/s"


def workload_table(workload: str, results: Results, shares: Shares) -> Table:
    """Every engine's median (lowest-highest), against the best peer and the limit; best first."""
    spec, measured = WORKLOADS[workload], results[workload]
    medians = {engine: statistics.median(numbers[spec.unit]) for engine, numbers in measured.items()}
    best = best_of({engine: value for engine, value in medians.items() if not ENGINES[engine].is_own}, spec.unit)
    others = list(dict.fromkeys(name for numbers in measured.values() for name in numbers if name != spec.unit))
    table = Table(title=f"{workload}: {spec.about}", title_justify="left")
    for heading in ("engine", "weights"):
        table.add_column(heading)
    for heading in (f"{spec.unit}, median (min-max)", "best peer = 1", "of the limit", *others):
        table.add_column(heading, justify="right")
    for engine in sorted(medians, key=medians.__getitem__, reverse=spec.more_is_better):
        values = measured[engine][spec.unit]
        share = shares.get((workload, engine))
        cells = [f"{shown(medians[engine])} ({shown(min(values))}-{shown(max(values))})"]
        cells.append(f"{times_better(medians[engine], medians[best], spec.unit):.2f}x" if best else "no peer")
        cells.append(f"{share:.0%}" if share is not None else "")
        cells += [shown(statistics.median(measured[engine][name])) for name in others]
        table.add_row(engine, ENGINES[engine].weights, *cells)
    return table


def goal_table(results: Results, shares: Shares) -> Table:
    """Each goal with bimo's and the best peer's median, and whether it is reached."""
    table = Table(title="goals", title_justify="left")
    for heading in ("measure", "bimo", "best peer", "reached", "goal", "verdict"):
        table.add_column(heading)
    for goal in GOALS:
        if results.get(goal.workload):
            table.add_row(goal.about, *_judged(goal, results[goal.workload], shares))
    return table


def _judged(goal: Goal, measured: Mapping[str, Mapping[str, list[float]]], shares: Shares) -> tuple[str, ...]:
    """The cells after the goal's name."""
    number = goal.number or WORKLOADS[goal.workload].unit
    medians = {engine: statistics.median(numbers[number]) for engine, numbers in measured.items()}
    own = next((engine for engine in goal.own if engine in medians), None)
    peers = [engine for engine in goal.peers or medians if engine in medians and not ENGINES[engine].is_own]
    best = best_of({engine: medians[engine] for engine in peers}, number)
    own_cell = f"{shown(medians[own])} {own}" if own else "-"
    peer_cell = f"{shown(medians[best])} {best}" if best else "-"
    if goal.share is not None:
        share = shares.get((goal.workload, own or ""))
        goal_cell = f">= {goal.share:.0%} of the limit"
        if share is None:
            return own_cell, "", "-", goal_cell, "not measured"
        return own_cell, "", f"{share:.0%}", goal_cell, verdict(share >= goal.share)
    if goal.at_most is not None:
        goal_cell = f"<= {goal.at_most:g}"
        if own is None:
            return own_cell, peer_cell, "-", goal_cell, "not measured"
        return own_cell, peer_cell, shown(medians[own]), goal_cell, verdict(medians[own] <= goal.at_most)
    assert goal.times is not None
    goal_cell = f">= {goal.times:g}x" if more_is_better(number) else "no more than the best peer"
    if own is None or best is None:
        return own_cell, peer_cell, "-", goal_cell, "not measured" if own is None else "no peer measured"
    reached = times_better(medians[own], medians[best], number)
    return own_cell, peer_cell, f"{reached:.2f}x", goal_cell, verdict(reached >= goal.times)


def verdict(reached: bool) -> str:
    return "[green]reached[/green]" if reached else "[red]not reached[/red]"


def best_of(medians: Mapping[str, float], number: str) -> str | None:
    """The engine with the best value."""
    if not medians:
        return None
    return (max if more_is_better(number) else min)(medians, key=medians.__getitem__)


def times_better(own: float, other: float, number: str) -> float:
    """How many times as good: above 1 is better, whichever way the number counts."""
    return own / other if more_is_better(number) else other / own


def shown(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
