"""Conditions, and the patch that turns one status into another."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tributary_operator import conditions
from tributary_operator.cluster import merge_patch
from tributary_operator.conditions import Progress

T0 = datetime(2026, 1, 1, tzinfo=UTC)
LATER = T0 + timedelta(hours=1)

leaves = st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
objects = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), leaves, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), leaves | inner, max_size=3),
    max_leaves=8,
)


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386, written down from its section 2 as an oracle."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


@given(objects, objects)
def test_a_merge_patch_turns_the_old_into_the_new(old: Any, new: Any) -> None:
    assert merged(old, merge_patch(old, new)) == new


@given(objects)
def test_nothing_is_sent_when_nothing_changed(same: Any) -> None:
    assert merge_patch(same, same) == {}


def of(progress: Progress, reason: str, now: datetime) -> Any:
    ready = "True" if progress == "done" else "False"
    return conditions.summary(progress, ready, reason, "message", generation=1, now=now)  # type: ignore[arg-type]


def test_a_transition_time_holds_while_the_status_does() -> None:
    first = conditions.merged([], of("progressing", "Planning", T0))
    second = conditions.merged(first, of("progressing", "Training", LATER))
    third = conditions.merged(second, of("done", "RoundComplete", LATER))
    times = {c.type: c.last_transition_time for c in third}
    assert conditions.find(second, "Ready").last_transition_time == T0  # type: ignore[union-attr]
    assert times == {"Ready": LATER, "Reconciling": LATER, "Stalled": T0}


def test_no_condition_is_lost() -> None:
    own = conditions.condition("Trained", "True", "Trained", "", generation=1, now=T0)
    assert {c.type for c in conditions.merged([own], of("done", "Done", T0))} == {
        "Trained",
        "Ready",
        "Reconciling",
        "Stalled",
    }


def test_events_tell_of_transitions_only() -> None:
    planning, training = of("progressing", "Planning", T0), of("progressing", "Training", LATER)
    stalled = of("stalled", "ModelMissing", LATER)
    assert conditions.transition(planning, of("progressing", "Planning", LATER)) == ()
    assert [e.reason for e in conditions.transition(planning, training)] == ["Training"]
    assert [e.type for e in conditions.transition(training, stalled)] == ["Warning"]
