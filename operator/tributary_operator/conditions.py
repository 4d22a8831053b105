"""Kubernetes conditions, as the API conventions and kstatus define them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from tributary_api.meta import Condition, ConditionStatus
from tributary_operator.decision import Event

READY = "Ready"
RECONCILING = "Reconciling"
STALLED = "Stalled"

MESSAGE_LENGTH_MAX = 1024
"""Shorter than the CRD allows: a status carries many of them."""


def condition(
    type_: str, status: ConditionStatus, reason: str, message: str, *, generation: int, now: datetime
) -> Condition:
    return Condition(
        type=type_,
        status=status,
        reason=reason,
        message=message[:MESSAGE_LENGTH_MAX],
        observed_generation=generation,
        last_transition_time=now.replace(microsecond=0),
    )


def merged(old: Sequence[Condition], new: Sequence[Condition]) -> list[Condition]:
    """`new` over `old`, in order of type: none is lost, and a transition time holds while the status does."""
    by_type = {c.type: c for c in old}
    for c in new:
        before = by_type.get(c.type)
        if before is not None and before.status == c.status:
            c = c.model_copy(update={"last_transition_time": before.last_transition_time})  # noqa: PLW2901
        by_type[c.type] = c
    return [by_type[t] for t in sorted(by_type)]


Progress = Literal["done", "progressing", "stalled"]


def summary(
    progress: Progress, ready: ConditionStatus, reason: str, message: str, *, generation: int, now: datetime
) -> list[Condition]:
    """Ready, Reconciling and Stalled: followers of kstatus wait for Reconciling and give up on Stalled."""
    flags: tuple[tuple[str, bool], ...] = (
        (RECONCILING, progress == "progressing"),
        (STALLED, progress == "stalled"),
    )
    return [
        condition(READY, ready, reason, message, generation=generation, now=now),
        *(
            condition(
                type_,
                "True" if on else "False",
                reason,
                message if on else "",
                generation=generation,
                now=now,
            )
            for type_, on in flags
        ),
    ]


def find(conditions: Sequence[Condition], type_: str) -> Condition | None:
    return next((c for c in conditions if c.type == type_), None)


def is_true(conditions: Sequence[Condition], type_: str) -> bool:
    found = find(conditions, type_)
    return found is not None and found.status == "True"


def transition(old: Sequence[Condition], new: Sequence[Condition]) -> tuple[Event, ...]:
    """An event when the reason of Ready changed, none while it holds."""
    before, after = find(old, READY), find(new, READY)
    if after is None or (before is not None and before.reason == after.reason):
        return ()
    is_warning = is_true(new, STALLED)
    return (Event(after.reason, after.message, "Warning" if is_warning else "Normal"),)
