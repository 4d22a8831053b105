"""Public text for compression, as tokens: documents of a data set, or what a model writes itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tributary_worker.compression.loading import LoadedModel
from tributary_worker.documents import Document

SAMPLES_AT_ONCE = 64
"""Texts written in one batch: their keys and values are in memory together."""
TOKENS_MIN = 2
"""With fewer there is nothing to predict."""


def documents_as_tokens(
    loaded: LoadedModel, documents: Sequence[Document], tokens_max: int
) -> list[list[int]]:
    """Each document with something to predict, cut to `tokens_max` tokens."""
    if not documents:
        return []  # which a tokenizer does not take
    longest = min(tokens_max, loaded.positions)
    encoded = loaded.tokenizer([d.text for d in documents], truncation=True, max_length=longest).input_ids
    return [list(ids) for ids in encoded if len(ids) >= TOKENS_MIN]


def sampled_texts(loaded: LoadedModel, count: int, tokens_max: int, seed: int) -> list[list[int]]:
    """`count` texts that the model writes from the beginning, each token drawn by its probability.

    The same on the same CPU for the same seed. A text ends with the model's end token or at `tokens_max`.
    """
    length = min(tokens_max, loaded.positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [
            _written(loaded, min(SAMPLES_AT_ONCE, count - n), length)
            for n in range(0, count, SAMPLES_AT_ONCE)
        ]
    return [ids for part in parts for ids in part]


@torch.inference_mode()
def _written(loaded: LoadedModel, count: int, length: int) -> list[list[int]]:
    start, end = _ends(loaded)
    ids = torch.full((count, 1), start, device=loaded.device)
    cache = None
    while ids.shape[1] < length:
        output = loaded.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = output.logits[:, -1, : len(loaded.tokenizer)].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1)], dim=1)
    return [_up_to(row, end) for row in ids.tolist()]


def _ends(loaded: LoadedModel) -> tuple[int, int]:
    """The tokens that a text begins and ends with."""
    tokenizer = loaded.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return (tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end), end


def _up_to(ids: list[int], end: int) -> list[int]:
    """Up to the first end token after a text that has begun."""
    return next((ids[: place + 1] for place in range(TOKENS_MIN, len(ids)) if ids[place] == end), ids)


def padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    """(rows, longest), filled on the right, where no token of a causal model that counts sees it."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)
