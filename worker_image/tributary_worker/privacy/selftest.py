"""Proof, on the running engine and before any private record is read, that clipping and noise are in force.

It fails closed: a DeepSpeed that was updated, misconfigured or bypassed stops the training instead of
leaking. All figures come from random tokens and from noise that no training step uses, so they may be
published.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from tributary_api.records import SelfTestFigures
from tributary_worker.objectives import Batch
from tributary_worker.privacy.clipping import per_example_norms
from tributary_worker.privacy.engine import LAYOUT_STEP, PrivateEngine
from tributary_worker.privacy.errors import PrivacyError

PLANTED_NORM = 1e6
PLANTED_TOLERANCE = 1e-3
"""Covers fp32 rounding on the way through DeepSpeed; a missing clip misses by a factor of a million."""

INDEPENDENCE_TOLERANCE = 1e-4
"""Relative to the gradient's norm: fp32 rounding, should a kernel choose its blocks by the data."""

NOISE_SAMPLES_MIN = 200_000
"""So many that a standard deviation 2 % off is always found; small models draw several times."""

DEVIATIONS = 6.0
"""A sound engine fails a check of six standard deviations once in 5e8 starts."""

PLANTED_STEP = LAYOUT_STEP + 1
NOISE_STEP = LAYOUT_STEP + 2


def run_self_test(engine: PrivateEngine, batch: Batch) -> SelfTestFigures:
    """Check the engine with a batch of `micro_batch_size` synthetic records; weights and randomness stay as
    they were.

    Raises: PrivacyError: a record can move the gradient too far or change another record's share, or the
    noise is not what it should be.
    """
    randomness = torch.get_rng_state()
    weights = _weights(engine)
    _check_independence(engine, batch)
    planted = _planted_ratio(engine, batch)
    noise = _noise_ratio(engine)
    torch.set_rng_state(randomness)
    if not torch.equal(weights, _weights(engine)):
        raise PrivacyError("the self-test moved the weights: the optimizer cannot be trusted")
    return SelfTestFigures(
        planted_record_ratio=planted, noise_std_ratio=noise, trainable_parameters=engine.adapters.numel
    )


def _check_independence(engine: PrivateEngine, batch: Batch) -> None:
    """The first record's gradient is the same among other neighbours: clipping bounds a record only if what
    it changes is its own gradient alone. Layers that mix a batch (batch norm, expert capacity) fail here."""
    others = {name: torch.cat([rows[:1], rows[1:].flip(-1)]) for name, rows in batch.items()}
    among = engine.adapters.gradients(lambda: engine.losses(batch), engine.micro_batch_size)
    amid = engine.adapters.gradients(lambda: engine.losses(others), engine.micro_batch_size)
    moved = per_example_norms([a[:1] - b[:1] for a, b in zip(among, amid, strict=True)])
    if not float(moved) <= INDEPENDENCE_TOLERANCE * float(per_example_norms([g[:1] for g in among])):
        raise PrivacyError(
            "a record's gradient depends on its neighbours in the batch: the model mixes records"
        )


def _planted_ratio(engine: PrivateEngine, batch: Batch) -> float:
    """How far one record with a gradient of norm 1e6 moves what the optimizer gets, over C/(qN)."""
    only_first = torch.zeros(engine.micro_batch_size, device=engine.device)
    only_first[0] = 1.0
    loss_scale = PLANTED_NORM / _first_norm(engine, batch)
    planted = engine.clipped_sum(batch, only_first, loss_scale)
    # The last rank plants it: every rank's share must reach the owners.
    mine = planted if engine.rank == engine.world_size - 1 else torch.zeros_like(planted)
    moved = engine.record(mine, PLANTED_STEP) - engine.record(torch.zeros_like(mine), PLANTED_STEP)
    norm = math.sqrt(_mean_square(engine, moved) * engine.adapters.numel)
    ratio = norm * engine.mechanism.expected_batch_size / engine.mechanism.max_grad_norm
    if not abs(ratio - 1.0) <= PLANTED_TOLERANCE:
        raise PrivacyError(
            f"a planted record of norm {PLANTED_NORM:g} moved the gradient by {ratio:.4g} clipping norms"
        )
    return round(ratio, 6)


def _first_norm(engine: PrivateEngine, batch: Batch) -> float:
    gradients = engine.adapters.gradients(lambda: engine.losses(batch), engine.micro_batch_size)
    norm = float(per_example_norms([g[:1] for g in gradients]))
    if not (math.isfinite(norm) and norm > 0):
        raise PrivacyError(
            f"the base model has a gradient of norm {norm} on random tokens: it cannot be trained"
        )
    return norm


def _noise_ratio(engine: PrivateEngine) -> float:
    """Standard deviation of what the optimizer gets when no record takes part, over sigma C/(qN)."""
    draws = max(2, math.ceil(NOISE_SAMPLES_MIN / engine.adapters.numel))
    nothing = torch.zeros(engine.adapters.numel, device=engine.device)
    previous, squares, products = torch.zeros(0), 0.0, 0.0
    for draw in range(draws):
        noise = engine.record(nothing, NOISE_STEP + draw) / engine.noise_std
        squares += _mean_square(engine, noise) / draws
        products += _mean(engine, noise * previous) / draws if draw else 0.0
        previous = noise
    samples = draws * engine.adapters.numel
    if not abs(math.sqrt(squares) - 1.0) <= DEVIATIONS / math.sqrt(2 * samples):
        raise PrivacyError(f"the noise has {math.sqrt(squares):.4g} times the standard deviation that is due")
    if not abs(products) <= DEVIATIONS / math.sqrt(samples):
        raise PrivacyError("the noise of one step repeats in the next")
    return round(math.sqrt(squares), 6)


def _mean_square(engine: PrivateEngine, values: Tensor) -> float:
    return _mean(engine, values.double().square())


def _mean(engine: PrivateEngine, owned: Tensor) -> float:
    """Mean over all trained elements of values that lie with their owners; padding must be 0, and counts
    nothing."""
    sums = torch.tensor([float(owned.double().sum()), float(engine.owned)], dtype=torch.float64)
    sums = sums.to(engine.device)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def _weights(engine: PrivateEngine) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in engine.adapters.parameters])
