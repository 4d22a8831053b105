"""Teach a compressed model to answer like the uncompressed one, on public text and on text that the teacher
writes.

With p the teacher's and q the student's probabilities of the next token at a temperature T, the loss of a
token is alpha T^2 D(p, q) - (1 - alpha) log q_1(next) (Hinton et al. 2015, "Distilling the knowledge in a
neural network"), where D is KL(p, q), KL(q, p), or the generalised Jensen-Shannon divergence beta KL(p, m)
+ (1 - beta) KL(q, m) with m = beta p + (1 - beta) q (Agarwal et al. 2024, "On-policy distillation of
language models", section 2).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tributary_api.failures import Reason
from tributary_api.release import Distill, Divergence
from tributary_api.shared import TaskKind
from tributary_worker.compression.directories import save_model
from tributary_worker.compression.loading import LoadedModel, load_model
from tributary_worker.compression.texts import documents_as_tokens, padded, sampled_texts
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure
from tributary_worker.objectives import IGNORED_LABEL

WARM_UP_PART = 0.1
GRADIENT_NORM_MAX = 1.0

Progress = Callable[[int, int], None]


def distill_directory(
    source: Path,
    target: Path,
    step: Distill,
    *,
    teacher: Path,
    documents: Sequence[Document],
    report: Progress,
) -> None:
    """Write the student of `source`, taught by the model of `teacher`, to the empty directory `target`.

    Language models only. Raises StageFailure (ModelUnsupported) if the student does not stay finite.
    """
    student, master = load_model(source, TaskKind.CAUSAL_LM), load_model(teacher, TaskKind.CAUSAL_LM)
    if len(student.tokenizer) != len(master.tokenizer) or student.vocabulary != master.vocabulary:
        raise _unsupported("teacher and student have different vocabularies; distill before changing tokens")
    teach(student, master, _Pool.of(master, step, documents), step, report)
    save_model(student.model, source, target)


def teach(student: LoadedModel, teacher: LoadedModel, pool: _Pool, step: Distill, report: Progress) -> None:
    """Train the student's weights in place, in fp32; the same on the same CPU."""
    model = student.model.requires_grad_(True).eval()  # dropout would blur what is to be imitated
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(step.learning_rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: pace(n, step.steps))
    for number, rows in enumerate(pool.batches(step), start=1):
        ids = padded(rows, 0, student.device)
        targets = padded(rows, IGNORED_LABEL, student.device)[:, 1:]
        with torch.no_grad():
            wanted = teacher.model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = distillation_loss(wanted, model(input_ids=ids, use_cache=False).logits[:, :-1], targets, step)
        if not bool(torch.isfinite(loss)):
            raise _unsupported(
                f"the student's loss is {float(loss)} at step {number}: lower distill.learningRate"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
        optimizer.step()
        schedule.step()
        report(number, step.steps)
    model.requires_grad_(False)


def pace(number: int, steps: int) -> float:
    """The part of the peak learning rate at a step: up over the first tenth, down like a cosine."""
    warm_up = max(1, round(WARM_UP_PART * steps))
    if number < warm_up:
        return (number + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(1, steps - warm_up)))


def distillation_loss(teacher: Tensor, student: Tensor, targets: Tensor, step: Distill) -> Tensor:
    """Mean over all tokens that count, in nats; logits (rows, positions, vocabulary), targets (rows,
    positions).
    """
    counts = targets != IGNORED_LABEL
    p, q, labels = teacher[counts].float(), student[counts].float(), targets[counts]
    temperature, alpha = float(step.temperature), float(step.alpha)
    apart = divergence((p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1), step).mean()
    own = F.cross_entropy(q, labels) if alpha < 1 else apart.new_zeros(())
    return alpha * temperature**2 * apart + (1 - alpha) * own


def divergence(p: Tensor, q: Tensor, step: Distill) -> Tensor:
    """Of each row of log-probabilities p (teacher) and q (student), in nats."""
    match step.divergence:
        case Divergence.FORWARD:
            return _kl(p, q)
        case Divergence.REVERSE:
            return _kl(q, p)
        case Divergence.JENSEN_SHANNON:
            beta = float(step.beta)
            mixture = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
            return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


class _Pool:
    """The texts to learn from, as tokens: public ones, and the teacher's own."""

    def __init__(self, public: Sequence[list[int]], sampled: Sequence[list[int]]) -> None:
        self._public, self._sampled = public, sampled

    @classmethod
    def of(cls, teacher: LoadedModel, step: Distill, documents: Sequence[Document]) -> _Pool:
        part = float(step.sampled_fraction)
        public = documents_as_tokens(teacher, documents, step.max_sequence_length) if part < 1 else []
        if part < 1 and not public:
            raise StageFailure(
                Reason.DATA_EMPTY,
                'distill.dataset has no text of two tokens: give another, or set sampledFraction to "1"',
            )
        count = step.sampled_texts if part > 0 else 0
        return cls(public, sampled_texts(teacher, count, step.max_sequence_length, step.seed))

    def batches(self, step: Distill) -> Iterator[list[list[int]]]:
        """`steps` batches, drawn with replacement, each text from the teacher with the chance asked for."""
        randomness, part = random.Random(step.seed), float(step.sampled_fraction)
        for _ in range(step.steps):
            sources = [
                self._sampled if randomness.random() < part else self._public for _ in range(step.batch_size)
            ]
            yield [randomness.choice(source) for source in sources]


def _unsupported(message: str) -> StageFailure:
    return StageFailure(Reason.MODEL_UNSUPPORTED, message)
