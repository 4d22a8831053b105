"""What the gate measured, as the metrics of a revision."""

from __future__ import annotations

from tributary_api.records import GateVerdict, ModelScore
from tributary_api.release import Revision
from tributary_api.shared import Metric

MEASURES = ("loss", "perplexity", "accuracy")


def measured(revision: Revision, verdict: GateVerdict | None) -> Revision:
    """The revision with its scores, and those of the models that it was compared with."""
    if verdict is None:
        return revision
    metrics = [metric for score in verdict.scores for metric in _metrics(score)]
    return revision.model_copy(update={"metrics": metrics})


def _metrics(score: ModelScore) -> list[Metric]:
    values = {"loss": score.loss, "perplexity": score.perplexity, "accuracy": score.accuracy}
    return [Metric(name=_name(score.role, name), value=f"{values[name]:.6g}") for name in MEASURES]


def _name(role: str, measure: str) -> str:
    """`loss` for the revision itself, `parentLoss` and `stableLoss` for the others."""
    return measure if role == "candidate" else role + measure[0].upper() + measure[1:]
