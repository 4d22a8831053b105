"""What counts as a failed demo: each promise of the summary, broken alone, is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from docstrings_demo.summary import (
    Budget,
    ClientSummary,
    ReleaseSummary,
    RequestSummary,
    RoundSummary,
    Summary,
    shortfalls,
    table_rows,
    write,
)

BUDGETS = [Budget(namespace="algebra", spent=11.0, budget=20.0)]


def good() -> Summary:
    rounds = [
        RoundSummary(
            name=f"round-{i}",
            clients=[ClientSummary(namespace="algebra", epsilon=8.0, pods=2)],
            loss_before=5.8 - i,
            loss_after=5.7 - i,
        )
        for i in (1, 2)
    ]
    releases = [
        ReleaseSummary(
            digest=f"sha256:{i}", bytes=30, parent_bytes=100, loss=5.0, parent_loss=5.0, gate="PASS"
        )
        for i in (1, 2)
    ]
    requests = RequestSummary(sent=900, failed=0, per_release={"assistant/a": 400, "assistant/b": 500})
    return Summary(rounds=rounds, releases=releases, requests=requests, seconds=300.0)


def set_loss(s: Summary) -> None:
    s.rounds[1].loss_after = s.rounds[1].loss_before


def set_pods(s: Summary) -> None:
    s.rounds[0].clients[0].pods = 1


def set_bytes(s: Summary) -> None:
    s.releases[0].bytes = 36


def set_gate(s: Summary) -> None:
    s.releases[1].gate = "INCONCLUSIVE"


def same_model(s: Summary) -> None:
    s.releases[1].digest = s.releases[0].digest


def few_requests(s: Summary) -> None:
    s.requests.sent = 499


def one_failure(s: Summary) -> None:
    s.requests.failed = 1


def one_release_seen(s: Summary) -> None:
    s.requests.per_release = {"assistant/b": 900}


def one_round(s: Summary) -> None:
    s.rounds.pop()


def test_a_good_run_has_no_shortfall() -> None:
    assert shortfalls(good(), BUDGETS) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (set_loss, "round-2: the loss"),
        (set_pods, "round-1: no client trained in more than one pod"),
        (one_round, "1 rounds"),
        (set_bytes, "36 bytes"),
        (set_gate, "INCONCLUSIVE"),
        (same_model, "1 models"),
        (few_requests, "499 requests"),
        (one_failure, "1 requests failed"),
        (one_release_seen, "assistant/b alone"),
    ],
)
def test_each_broken_promise_is_named(spoil: Callable[[Summary], None], words: str) -> None:
    spoilt = good().model_copy(deep=True)
    spoil(spoilt)
    missed = shortfalls(spoilt, BUDGETS)
    assert len(missed) == 1
    assert words in missed[0]


@pytest.mark.parametrize("spent", [0.0, 20.1, float("nan")])
def test_a_ledger_that_is_empty_overspent_or_unreadable_is_named(spent: float) -> None:
    budgets = [Budget(namespace="algebra", spent=spent, budget=20.0)]
    assert len(shortfalls(good(), budgets)) == 1


def test_the_file_has_exactly_the_promised_fields(tmp_path: Path) -> None:
    path = tmp_path / "out" / "summary.json"
    write(good(), path)
    written = json.loads(path.read_text())
    assert set(written) == {"rounds", "releases", "requests", "seconds"}
    assert set(written["rounds"][0]) == {"name", "clients", "loss_before", "loss_after"}
    assert set(written["rounds"][0]["clients"][0]) == {"namespace", "epsilon", "pods"}
    assert set(written["releases"][0]) == {"digest", "bytes", "parent_bytes", "loss", "parent_loss", "gate"}
    assert set(written["requests"]) == {"sent", "failed", "per_release"}


def test_the_table_names_every_client_and_release() -> None:
    text = "\n".join(" ".join(row) for row in table_rows(good(), {"algebra": BUDGETS[0]}))
    assert "algebra" in text
    assert "0.30 of its parent" in text
