"""The score of a model on public documents: loss in nats and accuracy, document by document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tributary_api.failures import Reason
from tributary_api.records import DocumentScore, ModelScore
from tributary_api.shared import TaskKind
from tributary_api.tasks import ScoredModel
from tributary_worker.compression.loading import LoadedModel
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure
from tributary_worker.objectives import IGNORED_LABEL

BATCH_TOKENS_MAX = 1024
"""Positions in one forward pass, padding included: enough to keep a CPU busy, small enough for its caches."""
BATCH_LOGITS_MAX = 2**25
"""Numbers in one pass's logits: 128 MiB in fp32, whatever the vocabulary."""
PERPLEXITY_LOSS_MAX = 700.0
"""exp of more is beyond a float."""

Progress = Callable[[int, int], None]


class NonFiniteScoreError(Exception):
    """The model's loss on a document is NaN or infinite."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A document as tokens, and its place in the data set."""

    place: int
    ids: list[int]


def score_documents(
    loaded: LoadedModel,
    documents: Sequence[Document],
    task: TaskKind,
    tokens_max: int,
    report: Progress,
    *,
    batch_tokens_max: int = BATCH_TOKENS_MAX,
) -> list[DocumentScore]:
    """Scores in the order of the documents, each cut to `tokens_max` tokens (fewer if the model has fewer).

    A document without a token to predict has `tokens` 0. Raises NonFiniteScoreError, or StageFailure for a
    label that the model does not know.
    """
    is_classification = task is TaskKind.SEQUENCE_CLASSIFICATION
    score = _score_classes if is_classification else _score_tokens
    # A classifier reads its answer at the last token: without padding there is no doubt which that is.
    batch_tokens_max = 1 if is_classification else batch_tokens_max
    scores: dict[int, DocumentScore] = {}
    for rows in _batches(loaded, _rows(loaded, documents, tokens_max), batch_tokens_max):
        for row, (tokens, loss, accuracy) in zip(rows, score(loaded, rows, documents), strict=True):
            name = documents[row.place].name
            if not math.isfinite(loss):
                raise NonFiniteScoreError(f"the loss on document {name} is {loss}")
            scores[row.place] = DocumentScore(document=name, tokens=tokens, loss=loss, accuracy=accuracy)
        report(len(scores), len(documents))
    return [scores[place] for place in range(len(documents))]


def model_score(scored: ScoredModel, scores: Sequence[DocumentScore]) -> ModelScore:
    """A model's means over all tokens. Raises StageFailure if there is not one token."""
    counted = [score for score in scores if score.tokens]
    tokens = sum(score.tokens for score in counted)
    if not tokens:
        raise StageFailure(Reason.DATA_EMPTY, "no document has two tokens: give a data set with longer texts")
    loss = math.fsum(score.loss * score.tokens for score in counted) / tokens
    return ModelScore(
        role=scored.role,
        model=scored.model,
        loss=loss,
        perplexity=math.exp(min(loss, PERPLEXITY_LOSS_MAX)),
        accuracy=math.fsum(score.accuracy * score.tokens for score in counted) / tokens,
        documents=len(counted),
        tokens=tokens,
    )


def _rows(loaded: LoadedModel, documents: Sequence[Document], tokens_max: int) -> list[_Row]:
    """The documents as tokens, the short ones first, so that a batch has little padding."""
    length = min(tokens_max, loaded.positions)
    encoded = loaded.tokenizer([d.text for d in documents], truncation=True, max_length=length).input_ids
    return sorted((_Row(i, ids) for i, ids in enumerate(encoded)), key=lambda row: (len(row.ids), row.place))


def _batches(loaded: LoadedModel, rows: Sequence[_Row], batch_tokens_max: int) -> Iterator[list[_Row]]:
    logits_max = BATCH_LOGITS_MAX // loaded.vocabulary
    batch: list[_Row] = []
    for row in rows:
        positions = (len(batch) + 1) * max(1, len(row.ids))
        if batch and positions > min(batch_tokens_max, logits_max):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _score_tokens(
    loaded: LoadedModel, rows: Sequence[_Row], _documents: Sequence[Document]
) -> list[tuple[int, float, float]]:
    """(predicted tokens, mean loss, part of them ranked first) of each row."""
    width = max(len(row.ids) for row in rows)
    if width < 2:
        return [(0, 0.0, 0.0) for _ in rows]
    # Padding on the right: no token that counts sees it, since the models are causal.
    ids = _padded(rows, width, 0).to(loaded.device)
    targets = _padded(rows, width, IGNORED_LABEL).to(loaded.device)[:, 1:]
    logits = loaded.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    hits = logits.argmax(-1) == targets
    counts = (targets != IGNORED_LABEL).sum(1)
    sums = [values.double().view_as(targets).sum(1) for values in (losses, hits)]
    means = [(total / counts.clamp(min=1)).tolist() for total in sums]
    return list(zip(counts.tolist(), *means, strict=True))


@torch.inference_mode()
def _score_classes(
    loaded: LoadedModel, rows: Sequence[_Row], documents: Sequence[Document]
) -> list[tuple[int, float, float]]:
    """(1, loss of the label, 1 if it is ranked first) of each row; (0, 0, 0) for an empty text."""
    return [_score_class(loaded, row, documents[row.place]) for row in rows]


def _score_class(loaded: LoadedModel, row: _Row, document: Document) -> tuple[int, float, float]:
    if not row.ids:
        return 0, 0.0, 0.0
    logits = loaded.model(input_ids=torch.tensor([row.ids], device=loaded.device)).logits[0].float()
    label = document.label
    if label is None or label >= len(logits):
        known = f"the model has {len(logits)} classes"
        raise StageFailure(Reason.DATA_UNPARSEABLE, f"document {document.name} has label {label}, {known}")
    return 1, -float(logits.double().log_softmax(0)[label]), float(int(logits.argmax()) == label)


def _padded(rows: Sequence[_Row], width: int, filler: int) -> Tensor:
    return torch.tensor([row.ids + [filler] * (width - len(row.ids)) for row in rows])
