"""What a decision about a round is made from: a run for the builders, and all that was seen for the steps."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from tributary_api.records import RoundPlan
from tributary_api.round import FederatedRound
from tributary_operator.rounds.observed import ObservedRound
from tributary_operator.settings import Settings


@dataclass(frozen=True, slots=True)
class Run:
    """A planned round. Its children are functions of it."""

    fedround: FederatedRound
    plan: RoundPlan
    settings: Settings

    @property
    def deadline(self) -> datetime:
        return self.plan.planned_at + timedelta(seconds=self.fedround.spec.active_deadline_seconds)


@dataclass(frozen=True, slots=True)
class Situation:
    fedround: FederatedRound
    seen: ObservedRound
    settings: Settings
    now: datetime

    @property
    def plan(self) -> RoundPlan:
        if self.seen.plan is None:
            raise AssertionError("the steps after the plan run only when there is one")
        return self.seen.plan

    @property
    def run(self) -> Run:
        return Run(self.fedround, self.plan, self.settings)
