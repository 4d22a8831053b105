"""Defective samplers and keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from tributary_api.records import MechanismSpec
from tributary_worker.privacy.keystream import derive_key
from tributary_worker.privacy.sampler import EMPTY, PoissonSampler


class Shuffled(PoissonSampler):
    """A shuffled loader, which most libraries have: every record once in an epoch, batches of one size."""

    def records(self, step: int) -> np.ndarray:
        size, total = self._mechanism.expected_batch_size, self._mechanism.num_examples
        epoch, batch = divmod(step, total // size)
        order = np.argsort(self._words(epoch, 0), kind="stable")
        return np.sort(order[batch * size : (batch + 1) * size])


class OfFixedSize(PoissonSampler):
    """A fresh batch in every step, but always of the expected size: replace-one sampling, another claim."""

    def records(self, step: int) -> np.ndarray:
        return np.sort(np.argsort(self._words(step, 0))[: self._mechanism.expected_batch_size])


class SameInEveryStep(PoissonSampler):
    def records(self, step: int) -> np.ndarray:
        return super().records(0)


class Uncapped(PoissonSampler):
    def __init__(self, mechanism: MechanismSpec, key: bytes) -> None:
        super().__init__(mechanism.model_copy(update={"batch_cap": mechanism.num_examples}), key)


class FirstOnesKept(PoissonSampler):
    """Beyond the cap the records at the front stay, again and again."""

    def records(self, step: int) -> np.ndarray:
        whole = PoissonSampler.records(Uncapped(self._mechanism, self._keystream._key), step)
        return whole[: self._mechanism.batch_cap]


class OnlyWhatWasDrawn(PoissonSampler):
    """As many micro-batches as the drawn records need: time and traffic tell how many those were."""

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> np.ndarray:
        slots = super().micro_batches(step, rank, world_size, micro_batch_size)
        return slots[(slots != EMPTY).any(1)]


def key_without_snapshot(tenant_key: bytes, computation_hash: str, _: str, purpose: Any) -> bytes:
    """A retry after the data changed has the noise of the first attempt: the difference is free of it."""
    return derive_key(tenant_key, computation_hash, "00" * 32, purpose)


def key_without_computation(tenant_key: bytes, _: str, snapshot_hash: str, purpose: Any) -> bytes:
    """A hub that trains twice with other settings gets equal noise twice."""
    return derive_key(tenant_key, "00" * 32, snapshot_hash, purpose)


class KeyOfTheMoment:
    """Fresh randomness in every attempt: two different deltas of one round would be published for one
    price."""

    def __init__(self) -> None:
        self._attempt = 0

    def __call__(self, tenant_key: bytes, computation_hash: str, snapshot_hash: str, purpose: Any) -> bytes:
        self._attempt += 1
        fresh = self._attempt.to_bytes(32, "big").hex()
        return derive_key(tenant_key, fresh, snapshot_hash, purpose)
