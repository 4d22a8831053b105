"""Defective engines. Each is the shipped one with a single thing wrong, as a person might have written it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import private_engines as engines
import torch
import torch.distributed as dist
from privacy_proofs.engine_checks import trained
from privacy_proofs.randomness_defects import OnlyWhatWasDrawn
from torch import Tensor

from tributary_worker.objectives import Batch
from tributary_worker.privacy.engine import PrivateEngine
from tributary_worker.privacy.noise import GaussianNoise
from tributary_worker.privacy.optimizer import NoisyOptimizer

HALF_MAX = 65504.0
"""Largest finite fp16 number."""
LOSS_SCALE = 2.0**12
HALF = (257 + 2 * 48) * 64 // 2
"""Of the trained elements of `engine_checks.wide_model`."""


class RecordByRecord(PrivateEngine):
    """Not a defect: clipping spelled out, one record after the other, so that a defect can change a line."""

    def clipped_sum(
        self, batch: Batch, weights: Tensor, loss_scale: float = 1.0, *, total: Tensor | None = None
    ) -> Tensor:
        parts = [torch.zeros(trained(self).numel)]
        for row, weight in enumerate(weights.tolist()):
            if weight:
                one = {name: rows[row : row + 1] for name, rows in batch.items()}
                parts.append(self.contribution(self.gradient(one, loss_scale)))
        added = self.combined(torch.stack(parts).sum(0))
        return added if total is None else total.add_(added)

    def gradient(self, one: Batch, loss_scale: float) -> Tensor:
        loss = loss_scale * self.losses(one).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained(self).parameters)])

    def contribution(self, gradient: Tensor) -> Tensor:
        if not torch.isfinite(gradient).all():
            return torch.zeros_like(gradient)
        return gradient * self.factor(gradient)

    def factor(self, gradient: Tensor) -> float:
        return min(1.0, self.mechanism.max_grad_norm / max(self.norm(gradient), 1e-30))

    def norm(self, gradient: Tensor) -> float:
        return float(gradient.double().norm())

    def combined(self, total: Tensor) -> Tensor:
        return total


class Unclipped(RecordByRecord):
    def factor(self, gradient: Tensor) -> float:
        return 1.0


class ClippedAfterTheMean(Unclipped):
    def combined(self, total: Tensor) -> Tensor:
        return total * min(1.0, self.mechanism.max_grad_norm / max(self.norm(total), 1e-30))


class ClippedLayerByLayer(RecordByRecord):
    """Each parameter to C, though the noise is for C in all."""

    def contribution(self, gradient: Tensor) -> Tensor:
        pieces = gradient.split([p.numel() for p in trained(self).parameters])
        return torch.cat([super(ClippedLayerByLayer, self).contribution(piece) for piece in pieces])


class TiedWeightSkipped(RecordByRecord):
    """Head and embedding share a weight, and neither's part of the norm is counted."""

    def norm(self, gradient: Tensor) -> float:
        pieces = zip(trained(self).names, trained(self).views(gradient), strict=True)
        kept = [piece.flatten() for name, piece in pieces if not {"lm_head", "wte"} & set(name.split("."))]
        return float(torch.cat(kept).double().norm())


class BrokenRecordsPassed(RecordByRecord):
    def contribution(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor(gradient)


class RecordsMixed(PrivateEngine):
    """The losses are centred over the batch, as some objectives do: each depends on every record."""

    def clipped_sum(self, batch: Batch, weights: Tensor, *rest: Any, **more: Any) -> Tensor:
        losses = self.losses
        self.losses = lambda batch: losses(batch) * losses(batch).mean()
        try:
            return super().clipped_sum(batch, weights, *rest, **more)
        finally:
            self.losses = losses


class DividedByWhatWasDrawn(PrivateEngine):
    def record(self, clipped: Tensor, step: int) -> Tensor:
        factor = self.mechanism.expected_batch_size / max(1, len(self.sampler.records(step)))
        return super().record(clipped * factor, step)


class MeanOverRanks(PrivateEngine):
    """As if it were forgotten that DeepSpeed averages."""

    def record(self, clipped: Tensor, step: int) -> Tensor:
        return super().record(clipped / self.world_size, step)


class SkippedOnOverflow(PrivateEngine):
    """fp16 with a loss scale: a step whose losses overflow is left out, so their number tells of the data."""

    overflowed = False

    def clipped_sum(self, batch: Batch, weights: Tensor, *rest: Any, **more: Any) -> Tensor:
        with torch.no_grad():
            largest = float((LOSS_SCALE * self.losses(batch)).abs().max())
        self.overflowed = self.overflowed or not largest <= HALF_MAX
        return super().clipped_sum(batch, weights, *rest, **more)

    def apply(self, clipped: Tensor, step: int) -> None:
        if not self.overflowed:
            super().apply(clipped, step)
        self.overflowed = False


def of_kind(kind: type[PrivateEngine]) -> Callable[..., PrivateEngine]:
    return lambda model, **settings: engines.engine(model, **settings, kind=kind)


def silently_frozen(model: Any, **settings: Any) -> PrivateEngine:
    """What has no gradient per record is left out without a word."""
    if hasattr(model, "unsupported"):
        model.unsupported.requires_grad_(False)
    return engines.engine(model, **settings)


def tied_weight_counted_once(model: Any, **settings: Any) -> PrivateEngine:
    """The embedding's gradient lacks what the head, which has the same weight, adds to it."""
    private = engines.engine(model, **settings)
    private.trained._layers = [layer for layer in private.trained._layers if layer.name != "lm_head"]
    return private


def with_only_what_was_drawn(model: Any, **settings: Any) -> PrivateEngine:
    private = engines.engine(model, **settings)
    private.sampler = OnlyWhatWasDrawn(private.mechanism, engines.SAMPLING_KEY)
    return private


class NoNoise(GaussianNoise):
    def _standard(self, step: int, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start)


class SameInEveryStep(GaussianNoise):
    def _standard(self, step: int, start: int, stop: int) -> np.ndarray:
        return super()._standard(0, start, stop)


class SameInBothHalves(GaussianNoise):
    """The offset wraps around: what two ranks own gets equal noise."""

    def _standard(self, step: int, start: int, stop: int) -> np.ndarray:
        return super()._standard(step, 0, HALF)[np.arange(start, stop) % HALF]


class Uniform(GaussianNoise):
    """The right standard deviation and the wrong shape."""

    def _standard(self, step: int, start: int, stop: int) -> np.ndarray:
        words = self._keystream.words(step, start, stop - start).astype(np.float64)
        return np.sqrt(12.0) * (words / 2.0**64 - 0.5)


class InTheParametersPrecision(GaussianNoise):
    """bf16, in which a model may be kept: 8 bits of fraction."""

    def _standard(self, step: int, start: int, stop: int) -> np.ndarray:
        noise = torch.from_numpy(super()._standard(step, start, stop))
        return noise.to(torch.bfloat16).double().numpy()


class OffTheGrid(GaussianNoise):
    """Added in floating point and left as it is: the low bits of the sum depend on the gradient."""

    def add(self, gradient: np.ndarray, step: int, start: int) -> np.ndarray:
        return gradient + self.draw(step, start, start + len(gradient)).astype(np.float32)


def with_noise(kind: type[GaussianNoise], strength: Callable[[], float] = lambda: 1.0) -> Callable[..., Any]:
    """Engines whose optimizer draws its noise in another way."""

    def make(model: Any, **settings: Any) -> PrivateEngine:
        private = engines.engine(model, **settings)
        private.optimizer.noise = kind(engines.NOISE_KEY, private.noise_std * strength())
        return private

    return make


def share_of_a_rank() -> float:
    """One over the root of the number of ranks: right if every rank added noise, but each element has one
    owner."""
    return float(dist.get_world_size()) ** -0.5


def keyed_by_local_place(model: Any, **settings: Any) -> PrivateEngine:
    """Every rank counts its elements from 0, so the ranks' noise is the same."""
    private = engines.engine(model, **settings)
    optimizer: NoisyOptimizer = private.optimizer
    places, step = optimizer.layout, optimizer._add_noise

    def add_noise(number: int) -> None:
        with _layout(optimizer, [replace(run, offset=run.local) for run in places]):
            step(number)

    optimizer._add_noise = add_noise  # type: ignore[method-assign]
    return private


@contextmanager
def _layout(optimizer: NoisyOptimizer, runs: Any) -> Iterator[None]:
    before = optimizer.layout
    optimizer.set_layout(runs)
    try:
        yield
    finally:
        optimizer.set_layout(before)
