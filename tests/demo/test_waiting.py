"""When the driver goes on, and when it gives up with the reason."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from demo_objects import ROUND
from rich.console import Console

from docstrings_demo.live import View
from docstrings_demo.observe import Seen
from docstrings_demo.podjobs import ScriptJob
from docstrings_demo.podtasks import PretrainTask
from docstrings_demo.problems import DemoError
from docstrings_demo.waiting import Watch
from tributary_api.meta import Condition
from tributary_api.shared import StoreEndpoint

JOB = ScriptJob(
    "pretrain", "hub", "pretrain", PretrainTask(store=StoreEndpoint(), models_uri="s3://tributary/m/")
)


@dataclass
class Played:
    """A cluster that plays one set of objects after another, one for each look at its rounds."""

    rounds: list[list[dict[str, Any]]] = field(default_factory=lambda: [[]])
    jobs: list[dict[str, Any]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)

    def items(self, plural: str, namespace: str | None = None, labels: str = "") -> list[dict[str, Any]]:
        if plural == "federatedrounds":
            return self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        if plural == "pods" and namespace:
            return [{"metadata": {"name": "p", "namespace": namespace}, "status": {"phase": "Failed"}}]
        return []

    def get(self, plural: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.jobs.pop(0) if len(self.jobs) > 1 else self.jobs[0]

    def log(self, namespace: str, pod: str, tail_lines: int = 200) -> list[str]:
        return self.logs


def watch(cluster: Played, stalled_seconds_max: float = 60.0) -> Watch:
    view = View(Console(file=io.StringIO()))
    return Watch(cluster, view, poll_seconds=0.0, stalled_seconds_max=stalled_seconds_max)  # type: ignore[arg-type]


def a_round(**conditions: str) -> dict[str, Any]:
    listed = [
        {"type": t, "status": s, "reason": f"Because{t}", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        for t, s in conditions.items()
    ]
    return {**ROUND, "status": {"conditions": listed}}


def conditions(seen: Seen) -> Sequence[Condition]:
    return seen.rounds[0].status.conditions if seen.rounds else ()


def is_complete(seen: Seen) -> bool:
    return any(c.type == "Complete" and c.status == "True" for c in conditions(seen))


def run(cluster: Played, seconds_max: float = 60.0, stalled_seconds_max: float = 60.0) -> Seen:
    waiting = watch(cluster, stalled_seconds_max)
    return waiting.until(is_complete, seconds_max, subject="round-1", conditions=conditions)


def test_it_goes_on_once_the_object_is_there_and_done() -> None:
    seen = run(Played([[], [a_round(Ready="False")], [a_round(Complete="True")]]))
    assert is_complete(seen)


def test_a_failed_object_ends_it_at_once_with_its_reason() -> None:
    with pytest.raises(DemoError, match="round-1: Failed: BecauseFailed"):
        run(Played([[a_round(Failed="True")]]))


def test_a_short_stall_is_waited_out() -> None:
    assert is_complete(run(Played([[a_round(Stalled="True")], [a_round(Complete="True")]])))


def test_a_long_stall_ends_it_with_its_reason() -> None:
    with pytest.raises(DemoError, match="Stalled: BecauseStalled"):
        run(Played([[a_round(Stalled="True")]]), stalled_seconds_max=0.0)


def test_taking_too_long_ends_it() -> None:
    with pytest.raises(DemoError, match="took longer than 0 s"):
        run(Played([[a_round(Ready="False")]]), seconds_max=0.0)


def a_job(kind: str) -> dict[str, Any]:
    return {"status": {"conditions": [{"type": kind, "status": "True"}]}}


def test_the_result_of_a_script_is_its_last_line() -> None:
    cluster = Played(jobs=[{}, {}, a_job("Complete")], logs=['{"published": 3}'])
    assert watch(cluster).result(JOB) == {"published": 3}


def test_a_script_that_failed_shows_its_last_words() -> None:
    cluster = Played(jobs=[a_job("Failed")], logs=["ValueError: no text"])
    with pytest.raises(DemoError, match="no text"):
        watch(cluster).result(JOB)
