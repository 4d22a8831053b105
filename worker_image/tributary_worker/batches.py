"""Records as the model reads them: tokens of one fixed length, so that no shape tells anything about the
data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tributary_api.shared import TaskKind
from tributary_worker.data import Record
from tributary_worker.objectives import IGNORED_LABEL, Batch, attention_mask
from tributary_worker.privacy.sampler import EMPTY

CHARACTERS_PER_TOKEN_MAX = 32
"""A text is cut to this many characters for each token that is used, or one long record would show in the
time."""

TOKENIZER_BATCH = 1000


class TokenizedRecords:
    """Records as token ids (N, length) int32. An empty record has none, and one whose label is not among
    the model's (`config.num_labels`) has no label: neither has a gradient."""

    def __init__(
        self, records: Sequence[Record], tokenizer: Any, task: TaskKind, length: int, config: Any
    ) -> None:
        self._task = task
        self._model_type = str(config.model_type)
        self._lengths = np.zeros(len(records), dtype=np.int32)
        self._ids = np.full((len(records), length), padding_id(tokenizer), dtype=np.int32)
        classes = int(config.num_labels)
        self._classes = np.array([_class_of(record, classes) for record in records], dtype=np.int64)
        self._tokenize(records, tokenizer, length)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """The batch of some records; `EMPTY` gives a row without a label, hence without a gradient."""
        rows = np.array(indices)
        is_record = rows != EMPTY
        ids = np.where(is_record[:, None], self._ids[rows], self._ids.dtype.type(0))
        lengths = np.where(is_record, self._lengths[rows], 0)
        labels = self._labels(rows, ids, lengths)
        labels = np.where(is_record.reshape(-1, *[1] * (labels.ndim - 1)), labels, IGNORED_LABEL)
        is_token = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])
        tensors = {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "attention_mask": attention_mask(self._model_type, is_token),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _labels(
        self, rows: npt.NDArray[np.int64], ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]
    ) -> npt.NDArray[Any]:
        if self._task is TaskKind.SEQUENCE_CLASSIFICATION:
            return self._classes[rows]
        return np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, IGNORED_LABEL)

    def _tokenize(self, records: Sequence[Record], tokenizer: Any, length: int) -> None:
        characters = CHARACTERS_PER_TOKEN_MAX * length
        for start in range(0, len(records), TOKENIZER_BATCH):
            texts = [(r.text or "")[:characters] for r in records[start : start + TOKENIZER_BATCH]]
            for row, tokens in enumerate(_tokens(texts, tokenizer, length), start):
                self._lengths[row] = len(tokens)
                self._ids[row, : len(tokens)] = tokens


def _class_of(record: Record, classes: int) -> int:
    if record.text is None or record.label is None or record.label >= classes:
        return IGNORED_LABEL
    return record.label


def padding_id(tokenizer: Any) -> int:
    """The id that fills a row up; any will do, since no token that counts sees it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def _tokens(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of each text, at most `length`; none for an empty text or one that the tokenizer refuses."""
    present = [i for i, text in enumerate(texts) if text]
    rows: list[list[int]] = [[] for _ in texts]
    for i in present:
        try:
            rows[i] = tokenizer(texts[i], truncation=True, max_length=length).input_ids
        except (ValueError, TypeError, UnicodeError):
            # A lone surrogate, for example: a bad record, and nobody's business.
            continue
    return rows
