"""The documents of a gate's test: each once, in an order that says nothing, and enough of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import norm

from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.release import Gate
from tributary_worker.compression.loading import LoadedModel
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure
from tributary_worker.gating.spending import Look, looks

DOCUMENTS_MIN = 20
"""At each look. The mean of fewer skewed differences is too far from Student's distribution."""


def in_test_order(documents: Sequence[Document], seed: str) -> list[Document]:
    """Each document once, as if drawn at random: a test that stops early must not see a sorted part.

    The order follows from `seed` and the texts alone, so that anybody finds it again.
    """
    once = {(document.name, document.label): document for document in documents}
    return sorted(once.values(), key=lambda found: sha256_of(f"{seed} {found.name} {found.label}".encode()))


def with_tokens(documents: Sequence[Document], loaded: LoadedModel, tokens_min: int) -> list[Document]:
    """Those that give the model something to predict."""
    encoded = loaded.tokenizer([document.text for document in documents]).input_ids
    return [found for found, ids in zip(documents, encoded, strict=True) if len(ids) >= tokens_min]


def planned_looks(gate: Gate, total: int) -> tuple[Look, ...]:
    """The looks of the test at `total` documents. StageFailure if that is fewer than it needs."""
    wanted = documents_needed(gate)
    if total < wanted:
        message = (
            f"{gate.dataset.uri} has {total} different documents with something to predict, "
            f"and the test needs at least {wanted}: add public ones, or raise the margin"
        )
        raise StageFailure(Reason.DATA_TOO_SMALL, message)
    return looks(total, DOCUMENTS_MIN, 1 - float(gate.confidence))


def documents_needed(gate: Gate) -> int:
    """The fewest documents on which any candidate could pass.

    For accuracy: with n documents on which two models never disagree, Tango's upper bound is z^2 / (n + z^2).
    """
    margins = [float(metric.margin) for metric in gate.metrics if metric.name == "accuracy"]
    # The last look is a little stricter than the spec's confidence, since earlier ones spent some of it.
    level = looks(DOCUMENTS_MIN * 4, DOCUMENTS_MIN, 1 - float(gate.confidence))[-1].level
    square = float(norm.isf(level)) ** 2
    return max([DOCUMENTS_MIN, *(math.floor(square * (1 - margin) / margin) + 1 for margin in margins)])
