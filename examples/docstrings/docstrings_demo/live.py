"""What one sees of the demo: a live picture on a terminal, a line per change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from docstrings_demo.observe import Load, Pod, Seen
from tributary_api.client import FederatedClient
from tributary_api.meta import Condition
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound

NO_NUMBER = "–"
LOAD_LINE_EVERY_SECONDS = 10


class View:
    """Headlines stay on the screen; the picture below them is drawn anew."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.started = time.monotonic()
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._said: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def headline(self, text: str) -> None:
        line = f"{self.seconds:5.0f} s  {text}"
        self.console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)

    def detail(self, subject: str, text: str) -> None:
        """Something about a subject; said only when it differs from what was said before."""
        if text and self._said.get(subject) != text:
            self._said[subject] = text
            self.console.print(
                f"{self.seconds:5.0f} s    {subject}: {text}", highlight=False, markup=False, soft_wrap=True
            )

    def show(self, seen: Seen) -> None:
        if self._live:
            # Only now: the set-up of the embedded cluster draws progress of its own.
            self._live.start()
            self._live.update(picture(seen), refresh=True)
            return
        for subject, text in lines(seen):
            self.detail(subject, text)
        if seen.load and self.seconds - self._load_said_at() > LOAD_LINE_EVERY_SECONDS:
            self._said["load at"] = str(self.seconds)
            self.detail("requests", load_text(seen.load))

    def _load_said_at(self) -> float:
        return float(self._said.get("load at", "-inf"))


def lines(seen: Seen) -> Iterator[tuple[str, str]]:
    """(subject, what there is to say about it) for everything but the requests, which change all the time."""
    for fedround in seen.rounds:
        yield fedround.metadata.name, standing(fedround.status.conditions)
        for client in seen.clients:
            pods = seen.training_pods(fedround.run_key, client.metadata.namespace)
            yield f"{fedround.metadata.name} {client.metadata.namespace}", work(pods)
    for client in seen.clients:
        yield client.metadata.namespace, budget_text(client)
    for release in seen.releases:
        yield release.metadata.name, f"{standing(release.status.conditions)}; {revisions(release)}"


def picture(seen: Seen) -> Group:
    parts = [clients_table(seen)]
    conditions = Table(box=None, pad_edge=False)
    for column in ("OBJECT", "STANDING"):
        conditions.add_column(column)
    for fedround in seen.rounds:
        conditions.add_row(fedround.metadata.name, standing(fedround.status.conditions))
    for release in seen.releases:
        conditions.add_row(release.metadata.name, standing(release.status.conditions))
        conditions.add_row("", revisions(release))
    return Group(*parts, Text(), conditions, Text(load_text(seen.load) if seen.load else ""))


def clients_table(seen: Seen) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("CLIENT", "READY", "ε SPENT", "ε RESERVED", "ε LEFT", "PODS", "STEPS"):
        table.add_column(column)
    latest = latest_round(seen.rounds)
    for client in seen.clients:
        privacy = client.status.privacy
        pods = seen.training_pods(latest.run_key, client.metadata.namespace) if latest else []
        table.add_row(
            f"{client.metadata.namespace}/{client.metadata.name}",
            reason(client.status.conditions, "Ready"),
            privacy.spent_epsilon or NO_NUMBER,
            privacy.reserved_epsilon or NO_NUMBER,
            privacy.remaining_epsilon or NO_NUMBER,
            phases(pods),
            progress(pods),
        )
    return table


def latest_round(rounds: Sequence[FederatedRound]) -> FederatedRound | None:
    return max(rounds, key=lambda r: (str(r.metadata.creation_timestamp), r.metadata.name), default=None)


def work(pods: Sequence[Pod]) -> str:
    """What the pods of one client do; empty if it has none."""
    return f"{phases(pods)} {progress(pods)}".rstrip(f" {NO_NUMBER}") if pods else ""


def phases(pods: Sequence[Pod]) -> str:
    counted = {phase: sum(pod.phase == phase for pod in pods) for phase in sorted({p.phase for p in pods})}
    return ", ".join(f"{number} {phase.lower()}" for phase, number in counted.items()) or NO_NUMBER


def progress(pods: Sequence[Pod]) -> str:
    leader = next((pod for pod in pods if pod.steps), None)
    return f"step {leader.step} of {leader.steps}" if leader else NO_NUMBER


def budget_text(client: FederatedClient) -> str:
    privacy = client.status.privacy
    return (
        f"{reason(client.status.conditions, 'Ready')}, ε spent {privacy.spent_epsilon or NO_NUMBER}, "
        f"reserved {privacy.reserved_epsilon or NO_NUMBER}, left {privacy.remaining_epsilon or NO_NUMBER}"
    )


def reason(conditions: Sequence[Condition], kind: str) -> str:
    return next((c.reason for c in conditions if c.type == kind), NO_NUMBER)


def standing(conditions: Sequence[Condition]) -> str:
    """The most telling condition: what stalls it, else what it is busy with, else whether it is ready."""
    by_type = {c.type: c for c in conditions}
    for kind in ("Failed", "Stalled", "Reconciling"):
        found = by_type.get(kind)
        if found and found.status == "True":
            return f"{kind}: {found.reason}: {found.message}"
    ready = by_type.get("Ready")
    return f"Ready {ready.status}: {ready.reason}: {ready.message}" if ready else "new"


def revisions(release: ModelRelease) -> str:
    named = (("serves", release.status.stable), ("candidate", release.status.candidate))
    return (
        ", ".join(f"{word} {revision.revision}" for word, revision in named if revision) or "serves nothing"
    )


def load_text(load: Load) -> str:
    per_release = ", ".join(f"{number} by {release}" for release, number in load.per_release)
    return (
        f"{load.sent} sent, {load.failed} failed; answered {per_release or 'none'}; "
        f"p50 {load.p50_seconds * 1000:.0f} ms, p99 {load.p99_seconds * 1000:.0f} ms"
    )
