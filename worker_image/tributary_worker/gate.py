"""The `gate` stage: may a candidate go into service? It must be in order, like its parent, and no worse.

Three questions, the cheapest first. Integrity: it loads here, answers, is finite, small enough, and speaks
its parent's tokens. Fidelity: it is near to what it was made from. Non-inferiority: on public documents it
is no worse than its uncompressed parent, the model in service and the best one that ever served, so that
small losses cannot add up.

The documents are looked at in parts, and the test stops as soon as it is sure. The verdict is written once,
with the score of every document, so that anybody can repeat it. A candidate that fails is a verdict, not a
failure of the stage: the stage fails only when nothing can be said.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tributary_api.failures import Reason
from tributary_api.records import DocumentScore, FidelityReport, GateVerdict, PromptAnswer
from tributary_api.release import GoldenPrompt
from tributary_api.shared import ModelRef, TaskKind
from tributary_api.tasks import GateTask, ScoredModel
from tributary_store.objects import Objects
from tributary_worker.documents import Document, read_documents
from tributary_worker.failures import StageFailure
from tributary_worker.gating import integrity
from tributary_worker.gating.documents import in_test_order, planned_looks, with_tokens
from tributary_worker.gating.fidelity import Sample, check_fidelity, fidelity_report, sample
from tributary_worker.gating.integrity import BROKEN, RejectedError
from tributary_worker.gating.judging import Other, Scored, judge
from tributary_worker.gating.models import Models
from tributary_worker.scoring import NonFiniteScoreError, score_documents
from tributary_worker.serving.generation import GenerationError
from tributary_worker.serving.service import warm_up
from tributary_worker.store_access import open_store, record_once, store_failures
from tributary_worker.task_input import progress_reporter, read_task, stage_log


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
        documents = read_documents(store, task.gate.dataset, task.task)
    ordered = in_test_order(documents, task.gate.dataset.digest)
    with tempfile.TemporaryDirectory() as workspace:
        examiner = _Examiner(task, Models(store, task.task, Path(workspace)), ordered, log)
        try:
            examiner.examine()
            return examiner.compare()
        except RejectedError as error:
            return examiner.rejection(error)


@dataclass(slots=True)
class _Examiner:
    """Asks the three questions, with one model in memory at a time."""

    task: GateTask
    models: Models
    documents: list[Document]
    """In the order of the test; once the candidate is loaded, those it can predict something of."""
    log: Any
    scores: dict[str, list[DocumentScore]] = field(default_factory=dict[str, list[DocumentScore]])
    """By the digest of the model: one with another's bytes is not computed again."""
    fidelity: FidelityReport | None = None
    answers: list[PromptAnswer] = field(default_factory=list[PromptAnswer])

    @property
    def is_lm(self) -> bool:
        return self.task.task is TaskKind.CAUSAL_LM

    def examine(self) -> None:
        """Integrity and fidelity. Raises RejectedError; a bundle missing or damaged is a StageFailure."""
        candidate, parent = self.task.candidate, self.task.parent
        loaded = self._candidate()
        self.documents = with_tokens(self.documents, loaded, 2 if self.is_lm else 1)
        planned_looks(self.task.gate, len(self.documents))
        integrity.check_size(self.models.weight_bytes(candidate), self.task.gate.max_weight_bytes)
        asked = integrity.prompts(self.task.gate.golden_prompts, self.documents) if self.is_lm else []
        ours = self._examined(candidate, asked)
        self.answers = ours.answers
        theirs = ours if parent.digest == candidate.digest else self._examined(parent, asked)
        integrity.check_tokens(ours.tokens, theirs.tokens)
        integrity.check_answers(asked, ours.answers, theirs.answers)
        self.fidelity = fidelity_report(ours.sample, theirs.sample, self._previous(ours.tokens))
        check_fidelity(self.fidelity, self.task.gate.fidelity)

    def compare(self) -> GateVerdict:
        """Non-inferiority, look by look. Raises RejectedError for a candidate that is worse than guessing."""
        planned = len(self.documents)
        for look in planned_looks(self.task.gate, planned):
            candidate = self._scored("candidate", self.task.candidate, look.documents)
            integrity.check_sense(candidate.total, self._choices())
            others = [self._scored(role, ref, look.documents) for role, ref in self._others()]
            verdict = judge(self.task.gate, planned, candidate, others)
            self.log.info("looked", documents=look.documents, planned=planned, finding=verdict.verdict)
            if verdict.verdict != "INCONCLUSIVE" or not verdict.comparisons:
                break
        return verdict.model_copy(update={"fidelity": self.fidelity, "answers": self.answers})

    def rejection(self, error: RejectedError) -> GateVerdict:
        return GateVerdict(
            verdict="FAIL",
            reason=error.reason,
            message=str(error),
            scores=[],
            comparisons=[],
            fidelity=self.fidelity,
            answers=self.answers,
        )

    def _candidate(self) -> Any:
        """The candidate in memory, once it has answered something."""
        try:
            loaded = self.models.load(self.task.candidate)
            if self.is_lm:
                warm_up(loaded)
            return loaded
        except GenerationError as error:
            raise RejectedError(BROKEN, str(error)) from error
        except StageFailure as failure:
            if failure.reason is Reason.MODEL_UNSUPPORTED:
                raise RejectedError(BROKEN, failure.message) from failure
            raise

    def _examined(self, ref: ModelRef, asked: Sequence[GoldenPrompt]) -> _Examined:
        loaded = self.models.load(ref)
        try:
            return _Examined(
                integrity.tokens_digest(loaded, self.documents),
                integrity.answers(loaded, asked),
                sample(loaded, self.documents, self.task.task, self.task.max_sequence_length),
            )
        except GenerationError as error:
            raise self._broken(ref, error) from error

    def _previous(self, tokens: str) -> Sample | None:
        """Of what the live model was made from, if it is comparable and another one than our parent."""
        ref = self.task.stable_parent
        if ref is None or ref.digest in {self.task.parent.digest, self.task.candidate.digest}:
            return None
        found = self._examined(ref, [])
        return found.sample if found.tokens == tokens else None

    def _others(self) -> list[tuple[Other, ModelRef]]:
        """The parent, and the other models as far as there are any. One that is missing is a StageFailure."""
        named: list[tuple[Other, ModelRef | None]] = [
            ("parent", self.task.parent),
            ("stable", self.task.stable),
            ("best", self.task.best),
        ]
        return [(role, ref) for role, ref in named if ref is not None]

    def _choices(self) -> int:
        config = self.models.load(self.task.candidate).model.config
        return int(config.vocab_size if self.is_lm else config.num_labels)

    def _scored(self, role: Any, ref: ModelRef, count: int) -> Scored:
        """The scores of the first `count` documents; only those not yet scored are computed."""
        known = self.scores.setdefault(ref.digest, [])
        more = self.documents[len(known) : count]
        if more:
            report = progress_reporter(self.log, role=role)
            tokens_max = self.task.max_sequence_length
            try:
                known += score_documents(self.models.load(ref), more, self.task.task, tokens_max, report)
            except NonFiniteScoreError as error:
                raise self._broken(ref, error) from error
        return Scored(ScoredModel(role=role, model=ref), known[:count])

    def _broken(self, ref: ModelRef, error: Exception) -> Exception:
        """A broken candidate is a verdict; of a model it is compared with, somebody must be told."""
        if ref.digest == self.task.candidate.digest:
            return RejectedError(BROKEN, str(error))
        role = "parent" if ref.digest == self.task.parent.digest else "stable or best"
        message = f"the {role} model {ref.uri} is broken: {error}"
        return StageFailure(Reason.MODEL_UNSUPPORTED, message)


@dataclass(frozen=True, slots=True)
class _Examined:
    """What a model does with the documents and prompts, without a label or a loss."""

    tokens: str
    answers: list[PromptAnswer]
    sample: Sample
