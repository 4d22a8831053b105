"""The verdict by the scores of all models. Pure: whoever has a verdict's scores can repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tributary_api.records import Comparison, DocumentScore, GateVerdict, ModelScore
from tributary_api.release import Gate, GateMetric
from tributary_api.tasks import ScoredModel
from tributary_worker.gating.documents import planned_looks
from tributary_worker.gating.spending import Look
from tributary_worker.noninferiority import (
    Bounds,
    Finding,
    MeanDifference,
    documents_wanted,
    mean_difference,
    sequential,
    share_difference,
)
from tributary_worker.scoring import model_score

Other = Literal["parent", "stable", "best"]

REASONS: dict[Finding, str] = {"PASS": "NoWorse", "FAIL": "Worse", "INCONCLUSIVE": "TooFewDocuments"}
INCOMPARABLE = "NotComparable"
SEVERITY: tuple[Finding, ...] = ("FAIL", "INCONCLUSIVE", "PASS")
"""Of several comparisons the worst one decides."""
BOUNDS: dict[str, Bounds] = {"loss": mean_difference, "accuracy": share_difference}
UNITS = {"loss": "nats per token", "accuracy": "of the documents wrong"}


@dataclass(frozen=True, slots=True)
class Scored:
    """A model and its scores, document by document, in the order of the test."""

    model: ScoredModel
    documents: list[DocumentScore]

    @property
    def total(self) -> ModelScore:
        return model_score(self.model, self.documents)


def judge(gate: Gate, planned: int, candidate: Scored, others: Sequence[Scored]) -> GateVerdict:
    """The verdict on what was scored so far of `planned` documents, every earlier look included.

    StageFailure if `planned` documents are too few for the test of `gate`.
    """
    looks = planned_looks(gate, planned)
    unlike = [other.model.role for other in others if not _is_comparable(candidate, other)]
    comparisons = [] if unlike else [_compared(looks, candidate, o, m) for o in others for m in gate.metrics]
    worst = min(comparisons, key=lambda found: SEVERITY.index(found.finding), default=None)
    if worst is None:
        words = f"candidate and {', '.join(unlike)} model cut the documents into different tokens"
        verdict, reason = "INCONCLUSIVE", INCOMPARABLE
    else:
        verdict, reason, words = worst.finding, REASONS[worst.finding], _words(worst, gate)
    return GateVerdict(
        verdict=verdict,
        reason=reason,
        message=words,
        scores=[scored.total for scored in (candidate, *others)],
        comparisons=comparisons,
        documents_planned=planned,
        per_document={scored.model.role: scored.documents for scored in (candidate, *others)},
    )


def _is_comparable(candidate: Scored, other: Scored) -> bool:
    """Whether both predicted equally many tokens of each document: else their losses have different units."""
    return [d.tokens for d in candidate.documents] == [d.tokens for d in other.documents]


def _compared(looks: Sequence[Look], candidate: Scored, other: Scored, metric: GateMetric) -> Comparison:
    margin = float(metric.margin)
    found = sequential(differences(candidate, other, metric.name), looks, margin, BOUNDS[metric.name])
    return Comparison(
        against=_other_role(other),
        model=other.model.model,
        metric=metric.name,
        margin=margin,
        mean_difference=found.mean,
        lower_bound=found.lower,
        upper_bound=found.upper,
        documents=found.count,
        finding=found.finding(margin),
    )


def differences(candidate: Scored, other: Scored, metric: Literal["loss", "accuracy"]) -> list[float]:
    """By how much the candidate is worse on each document: nats per token, or 1 where it alone is wrong."""
    pairs = zip(candidate.documents, other.documents, strict=True)
    if metric == "loss":
        return [ours.loss - theirs.loss for ours, theirs in pairs]
    return [theirs.accuracy - ours.accuracy for ours, theirs in pairs]


def _other_role(other: Scored) -> Other:
    match other.model.role:
        case "parent" | "stable" | "best" as role:
            return role
        case role:
            raise ValueError(f"a gate does not compare with the {role} model")


def _words(found: Comparison, gate: Gate) -> str:
    words = (
        f"{found.mean_difference:+.4f} {UNITS[found.metric]} against the {found.against} model, "
        f"upper bound {found.upper_bound:+.4f}, margin {found.margin:g}, over {found.documents} documents"
    )
    if found.finding != "INCONCLUSIVE":
        return words
    seen = MeanDifference(found.mean_difference, found.lower_bound, found.upper_bound, found.documents)
    wanted = documents_wanted(seen, found.margin, float(gate.confidence))
    return f"{words}; {_advice(wanted)}"


def _advice(wanted: int | None) -> str:
    if wanted is None:
        return "it is probably worse by more than the margin: raise gate.metrics.margin or use a better model"
    return f"about {wanted} documents would tell: enlarge gate.dataset, or raise the margin"
