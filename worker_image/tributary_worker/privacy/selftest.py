"""Proof, on the running engine and before any private record is read, that clipping and noise are in force.

It fails closed: a DeepSpeed that was updated, misconfigured or bypassed stops the training instead of
leaking. All figures come from random tokens and from noise that no training step uses, so they may be
published.
"""

from __future__ import annotations

import math
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from tributary_api.records import SelfTestFigures
from tributary_worker.objectives import Batch
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
    if weights != _weights(engine):
        raise PrivacyError("the self-test moved the weights: the optimizer cannot be trusted")
    return SelfTestFigures(
        planted_record_ratio=planted, noise_std_ratio=noise, trainable_parameters=engine.trained.numel
    )


def _check_independence(engine: PrivateEngine, batch: Batch) -> None:
    """The first record's share is the same among other neighbours: clipping bounds a record only if what it
    changes is its own gradient alone. Layers that mix a batch (batch norm, expert capacity) fail here."""
    others = {name: torch.cat([rows[:1], rows[1:].flip(-1)]) for name, rows in batch.items()}
    # Too small to be clipped, which would hide a change of its size.
    loss_scale = engine.mechanism.max_grad_norm / (10 * _first_norm(engine, batch))
    among = engine.clipped_sum(batch, _only_first(engine), loss_scale)
    limit = INDEPENDENCE_TOLERANCE * _norm(among)
    if not _norm(among.sub_(engine.clipped_sum(others, _only_first(engine), loss_scale))) <= limit:
        raise PrivacyError(
            "a record's gradient depends on its neighbours in the batch: the model mixes records"
        )


def _planted_ratio(engine: PrivateEngine, batch: Batch) -> float:
    """How far one record with a gradient of norm 1e6 moves what the optimizer gets, over C/(qN)."""
    loss_scale = PLANTED_NORM / _first_norm(engine, batch)
    planted = engine.clipped_sum(batch, _only_first(engine), loss_scale)
    # The last rank plants it: every rank's share must reach the owners.
    mine = planted if engine.rank == engine.world_size - 1 else planted.zero_()
    moved = engine.record(mine, PLANTED_STEP)
    moved -= engine.record(mine.zero_(), PLANTED_STEP)
    norm = math.sqrt(_mean_square(engine, moved) * engine.trained.numel)
    ratio = norm * engine.mechanism.expected_batch_size / engine.mechanism.max_grad_norm
    if not abs(ratio - 1.0) <= PLANTED_TOLERANCE:
        raise PrivacyError(
            f"a planted record of norm {PLANTED_NORM:g} moved the gradient by {ratio:.4g} clipping norms"
        )
    return round(ratio, 6)


def _first_norm(engine: PrivateEngine, batch: Batch) -> float:
    norm = float(engine.norms(batch)[0])
    if not (math.isfinite(norm) and norm > 0):
        raise PrivacyError(
            f"the base model has a gradient of norm {norm} on random tokens: it cannot be trained"
        )
    return norm


def _only_first(engine: PrivateEngine) -> Tensor:
    weights = torch.zeros(engine.micro_batch_size, device=engine.device)
    weights[0] = 1.0
    return weights


def _noise_ratio(engine: PrivateEngine) -> float:
    """Standard deviation of what the optimizer gets when no record takes part, over sigma C/(qN)."""
    numel = engine.trained.numel
    draws = max(2, math.ceil(NOISE_SAMPLES_MIN / numel))
    nothing = torch.zeros(numel, device=engine.device)
    previous, squares, products = torch.zeros(0), 0.0, 0.0
    for draw in range(draws):
        noise = engine.record(nothing, NOISE_STEP + draw).div_(engine.noise_std)
        squares += _mean_square(engine, noise) / draws
        products += _mean(engine, previous.mul_(noise)) / draws if draw else 0.0
        previous = noise
    samples = draws * numel
    if not abs(math.sqrt(squares) - 1.0) <= DEVIATIONS / math.sqrt(2 * samples):
        raise PrivacyError(f"the noise has {math.sqrt(squares):.4g} times the standard deviation that is due")
    if not abs(products) <= DEVIATIONS / math.sqrt(samples):
        raise PrivacyError("the noise of one step repeats in the next")
    return round(math.sqrt(squares), 6)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _mean_square(engine: PrivateEngine, values: Tensor) -> float:
    return _mean_of_sums(engine, _norm(values) ** 2)


def _mean(engine: PrivateEngine, owned: Tensor) -> float:
    return _mean_of_sums(engine, float(owned.sum(dtype=torch.float64)))


def _mean_of_sums(engine: PrivateEngine, owned_sum: float) -> float:
    """Mean over all trained elements of values that lie with their owners; padding must be 0, and counts
    nothing."""
    sums = torch.tensor([owned_sum, float(engine.owned)], dtype=torch.float64).to(engine.device)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def _weights(engine: PrivateEngine) -> str:
    """Digest of the trained weights: a second copy of them would not fit beside a large model."""
    digest = sha256()
    with engine.gathered() as weights:
        for tensor in weights:
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
