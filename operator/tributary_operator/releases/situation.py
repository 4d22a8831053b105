"""What a decision about a release is made from, and the first conclusions: what serves, and what shall.

Stable is what the status recorded, or what a switch that was intended has reached: intent is written before
the Service changes, so a Service that selects the intended revision means that the switch has happened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from tributary_api.release import BlueGreen, ModelRelease, RejectedRevision, Revision, Transition
from tributary_api.shared import ModelRef
from tributary_operator.releases import identity, measures
from tributary_operator.releases.observed import ObservedRelease, ObservedRevision
from tributary_operator.settings import Settings


@dataclass(frozen=True)
class Situation:
    release: ModelRelease
    seen: ObservedRelease
    settings: Settings
    now: datetime

    def with_seen(self, **facts: Any) -> Situation:
        """With more that was seen."""
        return replace(self, seen=replace(self.seen, **facts))

    @property
    def strategy(self) -> BlueGreen:
        return self.release.spec.strategy.blue_green

    @cached_property
    def transition(self) -> Transition | None:
        """The last switch; with the present time for one that has happened unrecorded."""
        recorded = self.release.status.transition
        if recorded is None or recorded.switched_at is not None or self._selected != recorded.to_revision:
            return recorded
        return recorded.model_copy(update={"switched_at": self.now})

    @property
    def _selected(self) -> str:
        service = self.seen.service
        return service.revision if service is not None and service.is_ours else ""

    @cached_property
    def stable(self) -> str:
        """The revision that serves; empty before the first."""
        if self.transition is not None and self.transition.switched_at is not None:
            return self.transition.to_revision
        if self.release.status.stable is not None:
            return self.release.status.stable.revision
        # A release without any memory, as after a restored backup: what serves goes on serving.
        return self._selected if self.transition is None and self._selected in self.seen.revisions else ""

    @property
    def stable_record(self) -> Revision | None:
        """What is known about the stable revision: from its Deployment, else from an earlier status."""
        if self.stable in self.seen.revisions:
            return self.seen.revisions[self.stable].record
        known = [self.release.status.stable, self.release.status.candidate, *self.release.status.history]
        return next((r for r in known if r is not None and r.revision == self.stable), None)

    @cached_property
    def target(self) -> str:
        """The revision that the spec asks for; empty while its model is unknown."""
        model = self.seen.source.model
        return identity.revision(self.release, model, self.settings) if model is not None else ""

    @property
    def candidate(self) -> Revision | None:
        """The target as a revision, once its compressed model exists; None if it is stable already."""
        if not self.target or self.target == self.stable:
            return None
        if self.target in self.seen.revisions:
            return self.seen.revisions[self.target].record
        model = self.candidate_model
        if model is None or self.seen.source.model is None:
            return None
        sizes = self.seen.compression
        return Revision(
            revision=self.target,
            model=model,
            parent=self.seen.source.model,
            bytes=sizes.bytes if sizes else self.seen.source.weight_bytes,
            parent_bytes=sizes.parent_bytes if sizes else self.seen.source.weight_bytes,
        )

    @property
    def candidate_model(self) -> ModelRef | None:
        if not self.release.spec.compression:
            return self.seen.source.model
        return self.seen.compression.model if self.seen.compression else None

    @property
    def rivals(self) -> identity.Rivals:
        """What the candidate is compared with besides its parent."""
        stable, best, candidate = self.stable_record, self.best, self.candidate_model
        if stable is None or stable.model == candidate:
            stable = None
        known = [candidate, stable.model if stable else None]
        return identity.Rivals(
            stable=stable.model if stable else None,
            stable_parent=stable.parent if stable else None,
            best=best.model if best and best.model not in known else None,
        )

    @property
    def best(self) -> Revision | None:
        """The revision with the least loss of all that served, as far as the gate compared them.

        The bar that a candidate must reach never falls, so that small losses, each of them tolerable, cannot
        add up. A revision that is watched, or being switched away from, may turn out badly, and is no bar.
        """
        best, stable = self.release.status.best, self.stable_record
        is_proven = self.watched_until is not None and not self.is_watching
        if stable is None or not is_proven or (best and best.revision == stable.revision):
            return best
        return stable if best is None or measures.is_better(stable, best) else best

    @property
    def rejections(self) -> list[RejectedRevision]:
        """Verdicts of this release, the latest first. A changed spec gives its target another chance."""
        rejected = self.release.status.rejected_revisions
        if self.release.status.spec_hash == identity.spec_hash(self.release):
            return rejected
        return [r for r in rejected if self.target not in {"", r.revision}]

    @property
    def rejection(self) -> RejectedRevision | None:
        """Why the target does not replace the present stable revision."""
        pair = (self.target, self.stable)
        return next((r for r in self.rejections if (r.revision, r.stable) == pair), None)

    def is_kept(self, revision: str) -> bool:
        """It served before and its pods are still there: going back to it needs neither gate nor pods."""
        served = {r.revision for r in self.release.status.history}
        return revision != self.stable and revision in served and revision in self.seen.revisions

    def is_wanted(self, goal: str) -> bool:
        """A switch to it is to be finished."""
        return self.is_kept(goal) or (goal == self.target and self.rejection is None)

    @property
    def watched_until(self) -> datetime | None:
        """End of the analysis after the last switch; None without a switch."""
        if self.transition is None or self.transition.switched_at is None:
            return None
        return self.transition.switched_at + timedelta(seconds=self.strategy.post_promotion.analysis_seconds)

    @property
    def is_watching(self) -> bool:
        return self.watched_until is not None and self.now < self.watched_until

    @property
    def kept_until(self) -> datetime | None:
        """Until then the revision before the last switch stays warm."""
        if self.transition is None or self.transition.switched_at is None:
            return None
        return self.transition.switched_at + timedelta(seconds=self.strategy.scale_down_delay_seconds)

    def is_available(self, revision: str) -> bool:
        found = self.seen.revisions.get(revision)
        return found is not None and found.is_fully_available

    @property
    def is_serving(self) -> bool:
        """The Service selects the stable revision, and it answers."""
        found = self.seen.revisions.get(self.stable)
        return found is not None and self._selected == self.stable and found.ready > 0

    @property
    def retired(self) -> list[ObservedRevision]:
        """Deployments that nothing needs any more. What the Service selects is never among them."""
        needed = {self.stable, self._selected}
        if self.rejection is None:
            needed.add(self.target)
        if not self.target:
            # The model is not known at the moment; what was on its way may be asked for again.
            needed |= {r.revision for r in (self.release.status.candidate,) if r is not None}
        if self.transition is not None and (self.kept_until is None or self.now < self.kept_until):
            needed |= {self.transition.from_revision, self.transition.to_revision}
        return [found for name, found in sorted(self.seen.revisions.items()) if name not in needed]
