"""The loss of each record, for each kind of task. A record's loss depends on no other record of its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tributary_api.shared import TaskKind
from tributary_worker.lora_names import BIDIRECTIONAL_TYPES

Batch = Mapping[str, Tensor]
"""`input_ids` (batch, length), `attention_mask` as the function of that name makes it, and `labels`:
(batch, length), or (batch,) for classification."""

Objective = Callable[[Any, Batch], Tensor]
"""(model, batch) -> losses of shape (batch,), fp32, in nats."""

IGNORED_LABEL = -100


def causal_lm(model: Any, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy over the tokens of each record; 0 for a record without any."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.sum(1) / (targets != IGNORED_LABEL).sum(1).clamp(min=1)


def sequence_classification(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of each record's class; 0 for a record whose label is `IGNORED_LABEL`."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.float(), batch["labels"], ignore_index=IGNORED_LABEL, reduction="none")


def attention_mask(model_type: str, is_token: Tensor) -> Tensor:
    """The mask of texts that are padded on the right; `is_token` (batch, length) is bool.

    In a causal model no token that counts sees the padding: a mask would change nothing but the time, so it
    is of ones. In a bidirectional one it is (batch, 1, 1, length), which transformers takes as it is: it
    drops a smaller one that masks nothing, and the time would tell. A text without tokens keeps the first,
    so that the softmax over its tokens is defined.
    """
    if model_type not in BIDIRECTIONAL_TYPES:
        return torch.ones_like(is_token, dtype=torch.int64)
    mask = is_token.clone()
    mask[:, 0] = True
    return mask[:, None, None, :]


OBJECTIVES: dict[TaskKind, Objective] = {
    TaskKind.CAUSAL_LM: causal_lm,
    TaskKind.SEQUENCE_CLASSIFICATION: sequence_classification,
}


def synthetic_batch(task: TaskKind, config: Any, batch_size: int, length: int, device: torch.device) -> Batch:
    """Records of random tokens from a fixed seed: they look like data to the model and depend on none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch_size, length), generator=generator)
    labels = ids if task is TaskKind.CAUSAL_LM else torch.zeros(batch_size, dtype=torch.int64)
    mask = attention_mask(config.model_type, torch.ones_like(ids, dtype=torch.bool))
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}
