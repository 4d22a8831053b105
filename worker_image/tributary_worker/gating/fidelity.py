"""How near is a candidate to what it was made from? KL(parent, candidate) and changed first ranks, token by
token.

With p the parent's probabilities of the next token and q the candidate's, KL = sum p (log p - log q), in
nats. A loss may stay the same while the answers change; these two see every change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tributary_api.records import FidelityReport
from tributary_api.release import Fidelity
from tributary_api.shared import TaskKind
from tributary_worker.compression.loading import LoadedModel
from tributary_worker.documents import Document
from tributary_worker.gating.integrity import RejectedError

UNFAITHFUL = "UnlikeParent"
STALE = "StaleWeights"

SAMPLE_NUMBERS_MAX = 2**25
"""Log-probabilities kept of one model: 128 MiB in fp32."""
SAMPLE_DOCUMENTS_MAX = 64
STALE_RATIO = 0.5
"""So much nearer to another model's parent than to its own, no compression is by itself."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Log-probabilities (positions, choices) of the first documents, fp32, by document."""

    names: list[str]
    log_probabilities: list[Tensor]


@torch.inference_mode()
def sample(loaded: LoadedModel, documents: Sequence[Document], task: TaskKind, tokens_max: int) -> Sample:
    """Of as many documents as fit into SAMPLE_NUMBERS_MAX, each cut to `tokens_max` tokens."""
    found: list[Tensor] = []
    names: list[str] = []
    numbers = 0
    for document in documents[:SAMPLE_DOCUMENTS_MAX]:
        ids = loaded.tokenizer(document.text).input_ids[: min(tokens_max, loaded.positions)]
        logits = loaded.model(input_ids=torch.tensor([ids], device=loaded.device)).logits[0]
        values = logits.float().log_softmax(-1).cpu()
        # The last position of a text predicts nothing that is in it; a classifier has one answer in all.
        values = values[None] if task is TaskKind.SEQUENCE_CLASSIFICATION else values[:-1]
        numbers += values.numel()
        if found and numbers > SAMPLE_NUMBERS_MAX:
            break
        found.append(values)
        names.append(document.name)
    return Sample(names, found)


def divergences(origin: Sample, derived: Sample) -> list[Tensor]:
    """KL(origin, derived) of each position, by document, in nats and float64."""
    pairs = zip(origin.log_probabilities, derived.log_probabilities, strict=True)
    return [_divergence(p.double(), q.double()) for p, q in pairs]


def mean_divergence(origin: Sample, derived: Sample) -> float:
    return float(torch.cat(divergences(origin, derived)).mean())


def are_alike(one: Sample, other: Sample) -> bool:
    """Whether both are about the same positions and choices, so that they can be compared at all."""
    return [v.shape for v in one.log_probabilities] == [v.shape for v in other.log_probabilities]


def fidelity_report(candidate: Sample, parent: Sample, previous: Sample | None) -> FidelityReport:
    if not are_alike(parent, candidate):
        message = "it gives other numbers of positions or choices than its parent: their vocabularies differ"
        raise RejectedError(UNFAITHFUL, message)
    by_document = divergences(parent, candidate)
    means = [float(found.mean()) for found in by_document]
    pairs = zip(parent.log_probabilities, candidate.log_probabilities, strict=True)
    flips = torch.cat([p.argmax(-1) != q.argmax(-1) for p, q in pairs])
    worst = max(range(len(means)), key=means.__getitem__)
    is_known = previous is not None and are_alike(previous, candidate)
    return FidelityReport(
        documents=len(means),
        tokens=len(flips),
        kl=float(torch.cat(by_document).mean()),
        flips=float(flips.double().mean()),
        worst_document=parent.names[worst],
        worst_kl=means[worst],
        previous_kl=mean_divergence(previous, candidate) if previous is not None and is_known else None,
    )


def check_fidelity(found: FidelityReport, limits: Fidelity) -> None:
    """Raises RejectedError beyond the spec's limits, and for weights that come from another model."""
    if found.previous_kl is not None and found.previous_kl < STALE_RATIO * found.kl:
        message = (
            f"its divergence from the model in service's parent is {found.previous_kl:.2g} nats, from its own"
        )
        raise RejectedError(STALE, f"{message} {found.kl:.2g}: these are old weights under a new name")
    _check_limit("maxKl", found.kl, limits.max_kl, "nats per token from its parent")
    _check_limit("maxFlips", found.flips, limits.max_flips, "of the first ranks differ from its parent's")


def _check_limit(field: str, value: float, limit: str | None, words: str) -> None:
    if limit is not None and not value <= float(limit):
        message = f"{value:.3g} {words}, more than gate.fidelity.{field} {limit}: compress less, or raise it"
        raise RejectedError(UNFAITHFUL, message)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    # A choice that the parent excludes adds nothing, however unlikely the candidate finds it.
    terms = torch.where(p == -math.inf, torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0)
