"""out/demo/summary.json: every number from an object, a record or a counter of this run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

BYTES_RATIO_MAX = 0.35
REQUESTS_MIN = 500
RELEASES_SEEN_MIN = 2


class ClientSummary(BaseModel):
    namespace: str
    epsilon: float
    """ε of this round, as the client's receipt states it."""
    pods: int
    """Worker pods that made this client's delta."""


class RoundSummary(BaseModel):
    name: str
    clients: list[ClientSummary]
    loss_before: float
    loss_after: float


class ReleaseSummary(BaseModel):
    digest: str
    bytes: int
    parent_bytes: int
    loss: float
    parent_loss: float
    gate: str


class RequestSummary(BaseModel):
    sent: int
    failed: int
    per_release: dict[str, int]


class Summary(BaseModel):
    rounds: list[RoundSummary]
    releases: list[ReleaseSummary]
    requests: RequestSummary
    seconds: float


class Budget(BaseModel):
    """A client's privacy ledger at the end."""

    namespace: str
    spent: float
    budget: float


def write(summary: Summary, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary.model_dump(), indent=2) + "\n")


def shortfalls(summary: Summary, budgets: Sequence[Budget]) -> list[str]:
    """What the run promised and did not keep, in words; empty if all is well."""
    return [
        *_of_rounds(summary.rounds),
        *_of_budgets(budgets),
        *_of_releases(summary.releases),
        *_of_requests(summary.requests),
    ]


def _of_rounds(rounds: Sequence[RoundSummary]) -> Iterator[str]:
    if len(rounds) != 2:
        yield f"{len(rounds)} rounds are complete, not 2"
    for item in rounds:
        if not item.loss_after < item.loss_before:
            yield f"{item.name}: the loss went from {item.loss_before:.4f} to {item.loss_after:.4f}"
        if not any(client.pods > 1 for client in item.clients):
            yield f"{item.name}: no client trained in more than one pod"


def _of_budgets(budgets: Sequence[Budget]) -> Iterator[str]:
    for item in budgets:
        if not 0 < item.spent <= item.budget:
            yield f"{item.namespace}: spent ε {item.spent} of {item.budget}"


def _of_releases(releases: Sequence[ReleaseSummary]) -> Iterator[str]:
    if len({item.digest for item in releases}) != RELEASES_SEEN_MIN:
        yield f"{len(releases)} releases with {len({r.digest for r in releases})} models, not 2"
    for item in releases:
        if item.bytes > BYTES_RATIO_MAX * item.parent_bytes:
            yield f"{item.digest}: {item.bytes} bytes are more than {BYTES_RATIO_MAX} of {item.parent_bytes}"
        if item.gate != "PASS":
            yield f"{item.digest}: the gate says {item.gate}"


def _of_requests(requests: RequestSummary) -> Iterator[str]:
    if requests.sent < REQUESTS_MIN:
        yield f"{requests.sent} requests were sent, not {REQUESTS_MIN}"
    if requests.failed:
        yield f"{requests.failed} requests failed"
    if len(requests.per_release) < RELEASES_SEEN_MIN:
        yield f"answers came from {', '.join(requests.per_release) or 'no release'} alone"


def table_rows(summary: Summary, budgets: Mapping[str, Budget]) -> Iterator[tuple[str, str]]:
    """The summary for people."""
    for item in summary.rounds:
        yield item.name, f"loss {item.loss_before:.4f} → {item.loss_after:.4f}"
        for client in item.clients:
            ledger = budgets[client.namespace]
            total = f"{ledger.spent:.2f} of {ledger.budget:g} in all"
            yield f"  {client.namespace}", f"ε {client.epsilon:.2f}, {client.pods} pods; {total}"
    for release in summary.releases:
        ratio = release.bytes / release.parent_bytes
        loss = f"loss {release.loss:.4f} (parent {release.parent_loss:.4f})"
        yield release.digest[:19], f"{release.bytes} bytes, {ratio:.2f} of its parent; {loss}; {release.gate}"
    answered = ", ".join(f"{number} by {name}" for name, number in summary.requests.per_release.items())
    yield "requests", f"{summary.requests.sent} sent, {summary.requests.failed} failed; {answered}"
    yield "seconds", f"{summary.seconds:.0f}"
