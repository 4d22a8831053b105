"""The `gate` stage: may a candidate go into service? It must load, answer, be finite, and be no worse.

Candidate, parent and stable model are scored on the same public documents; the verdict is written once, with
the score of every document, so that anybody can repeat the test. A candidate that fails is a verdict, not a
failure of the stage: the stage fails only when nothing can be said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tributary_api.failures import Reason
from tributary_api.records import Comparison, DocumentScore, GateVerdict, ModelScore
from tributary_api.release import GateMetric
from tributary_api.shared import ModelRef, TaskKind
from tributary_api.tasks import GateTask, ScoredModel
from tributary_store.objects import Objects
from tributary_worker.compression.loading import LoadedModel, fetch_model
from tributary_worker.documents import Document, read_documents
from tributary_worker.failures import StageFailure
from tributary_worker.noninferiority import DOCUMENTS_MIN, Finding, mean_difference
from tributary_worker.scoring import NonFiniteScoreError, model_score, score_documents
from tributary_worker.serving.generation import GenerationError
from tributary_worker.serving.service import warm_up
from tributary_worker.store_access import open_store, record_once, store_failures
from tributary_worker.task_input import progress_reporter, read_task, stage_log

Other = Literal["parent", "stable"]

REASONS: dict[Finding, str] = {"PASS": "NoWorse", "FAIL": "Worse", "INCONCLUSIVE": "TooFewDocuments"}
BROKEN = "CandidateBroken"
INCOMPARABLE = "NotComparable"
SEVERITY: tuple[Finding, ...] = ("FAIL", "INCONCLUSIVE", "PASS")
"""Of several comparisons the worst one decides."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A model and its scores, document by document."""

    model: ScoredModel
    documents: list[DocumentScore]

    @property
    def total(self) -> ModelScore:
        return model_score(self.model, self.documents)


class CandidateBrokenError(Exception):
    """The candidate cannot be put into service, whatever its quality."""


def main(_argv: Sequence[str]) -> int:
    task = read_task(GateTask)
    log = stage_log("gate")
    verdict = gate(open_store(task.store), task, log)
    log.info("verdict", verdict=verdict.verdict, reason=verdict.reason, message=verdict.message)
    return 0


def gate(store: Objects, task: GateTask, log: Any) -> GateVerdict:
    """Write the verdict, or find it. Raises StageFailure if there can be none."""
    return record_once(store, task.verdict_uri, GateVerdict, lambda: _verdict(store, task, log), log)


def _verdict(store: Objects, task: GateTask, log: Any) -> GateVerdict:
    with store_failures(missing=Reason.DATA_EMPTY):
        documents = read_documents(store, task.dataset, task.task)
    examiner = _Examiner(store, task, documents, log)
    try:
        candidate = examiner.candidate()
    except CandidateBrokenError as error:
        return GateVerdict(verdict="FAIL", reason=BROKEN, message=str(error), scores=[], comparisons=[])
    return judge(task, candidate, examiner.others(candidate))


def judge(task: GateTask, candidate: Scored, others: Sequence[Scored]) -> GateVerdict:
    """The verdict by the scores of all models. Pure: whoever has a verdict's scores can repeat it."""
    unlike = [other.model.role for other in others if not _is_comparable(candidate, other)]
    findings = [] if unlike else [_compared(task, candidate, o, m) for o in others for m in task.metrics]
    worst = min(findings, key=lambda found: SEVERITY.index(found[0]), default=None)
    if worst is None:
        words = f"candidate and {', '.join(unlike)} model cut the documents into different tokens"
        verdict, reason = "INCONCLUSIVE", INCOMPARABLE
    else:
        verdict, reason, words = worst[0], REASONS[worst[0]], _words(worst[1])
    return GateVerdict(
        verdict=verdict,
        reason=reason,
        message=words,
        scores=[scored.total for scored in (candidate, *others)],
        comparisons=[comparison for _, comparison in findings],
        per_document={scored.model.role: scored.documents for scored in (candidate, *others)},
    )


@dataclass(frozen=True, slots=True)
class _Examiner:
    """Scores the models of a task, one in memory at a time."""

    store: Objects
    task: GateTask
    documents: Sequence[Document]
    log: Any

    def candidate(self) -> Scored:
        """Raises CandidateBrokenError; a bundle that is missing or damaged is a StageFailure."""
        try:
            loaded = fetch_model(self.store, self.task.candidate, self.task.task)
            if self.task.task is TaskKind.CAUSAL_LM:
                warm_up(loaded)
            return self._score(ScoredModel(role="candidate", model=self.task.candidate), loaded)
        except (NonFiniteScoreError, GenerationError) as error:
            raise CandidateBrokenError(str(error)) from error
        except StageFailure as failure:
            if failure.reason is Reason.MODEL_UNSUPPORTED:
                raise CandidateBrokenError(failure.message) from failure
            raise

    def others(self, candidate: Scored) -> list[Scored]:
        """Parent and stable model. One with the candidate's own bytes is not computed again."""
        known = {self.task.candidate.digest: candidate.documents}
        scored = []
        for role, ref in self._others():
            model = ScoredModel(role=role, model=ref)
            if ref.digest not in known:
                known[ref.digest] = self._score_other(model)
            scored.append(Scored(model, known[ref.digest]))
        return scored

    def _others(self) -> list[tuple[Other, ModelRef]]:
        others: list[tuple[Other, ModelRef]] = [("parent", self.task.parent)]
        return others if self.task.stable is None else [*others, ("stable", self.task.stable)]

    def _score_other(self, model: ScoredModel) -> list[DocumentScore]:
        try:
            loaded = fetch_model(self.store, model.model, self.task.task)
            return self._score(model, loaded).documents
        except NonFiniteScoreError as error:
            message = f"the {model.role} model {model.model.uri} is broken: {error}"
            raise StageFailure(Reason.MODEL_UNSUPPORTED, message) from error

    def _score(self, model: ScoredModel, loaded: LoadedModel) -> Scored:
        report = progress_reporter(self.log, role=model.role)
        tokens_max = self.task.max_sequence_length
        return Scored(model, score_documents(loaded, self.documents, self.task.task, tokens_max, report))


def _is_comparable(candidate: Scored, other: Scored) -> bool:
    """Whether both predicted equally many tokens of each document: else their losses have different units."""
    return [d.tokens for d in candidate.documents] == [d.tokens for d in other.documents]


def _compared(
    task: GateTask, candidate: Scored, other: Scored, metric: GateMetric
) -> tuple[Finding, Comparison]:
    differences = _differences(candidate, other)
    bounds = mean_difference(differences, float(task.confidence))
    margin = float(metric.margin)
    comparison = Comparison(
        against=_other_role(other),
        model=other.model.model,
        margin=margin,
        mean_difference=bounds.mean,
        upper_bound=bounds.upper,
        documents=bounds.count,
    )
    return bounds.finding(margin), comparison


def _differences(candidate: Scored, other: Scored) -> list[float]:
    """Candidate's loss less the other's, for each document with a token to predict, in nats per token."""
    pairs = zip(candidate.documents, other.documents, strict=True)
    differences = [ours.loss - theirs.loss for ours, theirs in pairs if ours.tokens]
    if len(differences) < DOCUMENTS_MIN:
        message = f"{len(differences)} documents have two tokens; a comparison needs at least {DOCUMENTS_MIN}"
        raise StageFailure(Reason.DATA_EMPTY, message)
    return differences


def _other_role(other: Scored) -> Other:
    return "stable" if other.model.role == "stable" else "parent"


def _words(comparison: Comparison) -> str:
    return (
        f"{comparison.mean_difference:+.4f} nats per token against the {comparison.against} model, "
        f"upper bound {comparison.upper_bound:+.4f}, margin {comparison.margin:g}, "
        f"over {comparison.documents} documents"
    )
