"""What the gate measured, as the metrics of a revision."""

from __future__ import annotations

from tributary_api.records import GateVerdict, ModelScore
from tributary_api.release import Revision
from tributary_api.shared import Metric

MEASURES = ("loss", "perplexity", "accuracy")
BARS = ("bestLoss", "stableLoss")
"""Where the loss of the best revision stands: under its own name, unless it is the stable one as well."""


def measured(revision: Revision, verdict: GateVerdict | None) -> Revision:
    """The revision with its scores, and those of the models that it was compared with."""
    if verdict is None:
        return revision
    metrics = [metric for score in verdict.scores for metric in _metrics(score)]
    return revision.model_copy(update={"metrics": metrics, "bar": _bar(verdict)})


def is_better(revision: Revision, best: Revision) -> bool:
    """Whether the gate measured less loss for it than for `best`, on the same documents.

    A revision that was compared with an earlier best one, and is gone back to, says nothing about this one.
    """
    losses = {metric.name: float(metric.value) for metric in revision.metrics}
    bar = next((losses[name] for name in BARS if name in losses), None)
    return revision.bar == best.model.digest and bar is not None and losses["loss"] < bar


def _bar(verdict: GateVerdict) -> str | None:
    digests = {_name(score.role, "loss"): score.model.digest for score in verdict.scores}
    return next((digests[name] for name in BARS if name in digests), None)


def _metrics(score: ModelScore) -> list[Metric]:
    values = {"loss": score.loss, "perplexity": score.perplexity, "accuracy": score.accuracy}
    return [Metric(name=_name(score.role, name), value=f"{values[name]:.6g}") for name in MEASURES]


def _name(role: str, measure: str) -> str:
    """`loss` for the revision itself, `parentLoss`, `stableLoss` and `bestLoss` for the others."""
    return measure if role == "candidate" else role + measure[0].upper() + measure[1:]
