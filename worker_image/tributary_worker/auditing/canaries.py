"""Canaries on the real engine: records whose gradient is as large as one may be and known to the adversary.

White box, after Nasr et al. 2023 (arXiv:2302.07956): the adversary chooses the gradient of a record and sees
every noised gradient. The engine is the one that trains, with its own sampler, clipping, reduction by
DeepSpeed and noise; only the model is made so that each record's gradient lies in a coordinate of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tributary_api.records import MechanismSpec
from tributary_worker.lora import LoraLinear, LoraSettings
from tributary_worker.objectives import Batch
from tributary_worker.privacy.engine import PrivateEngine
from tributary_worker.privacy.sampler import EMPTY

GRADIENT_NORM = 1e6
"""Of every canary before clipping: the engine's clipping, not the canary's modesty, is what bounds it."""

CANARY, IS_PRESENT = "canary", "is_present"


class CanaryModel(nn.Module):
    """One adapter of rank 1 with a row for each canary: record i moves coordinate i and nothing else."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        base = nn.Linear(1, canaries, bias=False).requires_grad_(False)
        self.adapter = LoraLinear(base, LoraSettings(rank=1, alpha=1.0))
        nn.init.ones_(self.adapter.lora_a)

    def forward(self, rows: int) -> Tensor:
        """Outputs (rows, canaries)."""
        return self.adapter(torch.ones(rows, 1, device=self.adapter.lora_b.device))

    def losses(self, batch: Batch) -> Tensor:
        """Each record's loss, (batch,): an emptied record has no gradient."""
        outputs = self(len(batch[CANARY]))
        own = outputs.gather(1, batch[CANARY][:, None]).squeeze(1)
        return GRADIENT_NORM * own * batch[IS_PRESENT]


def canary_batch(indices: Sequence[int], is_present: Tensor) -> Batch:
    """The batch of some records of a data set in which record i is `is_present[i]` (0 or 1), else emptied."""
    rows = torch.tensor([max(index, 0) for index in indices])
    return {CANARY: rows, IS_PRESENT: is_present[rows]}


def evidence(engine: PrivateEngine, is_present: Tensor, first_step: int) -> npt.NDArray[np.float64]:
    """Log-likelihood ratio of each record's presence over all steps of one run, (canaries,).

    In units of C the gradient of coordinate i is N(1, sigma**2) in a step that has record i and
    N(0, sigma**2) in any other, so a step adds log(1 - q + q exp((2 z - 1) / (2 sigma**2))). Runs with other
    step numbers have other samples and other noise.
    """
    mechanism = engine.mechanism
    total = np.zeros(len(is_present))
    for step in range(first_step, first_step + mechanism.steps):
        z = _observed(engine, is_present, step) * mechanism.expected_batch_size / mechanism.max_grad_norm
        total += _log_likelihood_ratio(z, mechanism)
    return total


def _observed(engine: PrivateEngine, is_present: Tensor, step: int) -> npt.NDArray[np.float64]:
    """What the inner optimizer is handed in a step, by canary; the weights stay as they are."""
    clipped = torch.zeros(len(is_present), device=engine.device)
    for indices in engine.sampler.micro_batches(
        step, engine.rank, engine.world_size, engine.micro_batch_size
    ):
        is_record = torch.from_numpy(indices != EMPTY).to(engine.device)
        batch = canary_batch(indices.tolist(), is_present)
        clipped += engine.clipped_sum({k: v.to(engine.device) for k, v in batch.items()}, is_record)
    received = engine.record(clipped, step)
    ordered = torch.zeros(len(is_present), dtype=torch.float64)
    for run in engine.optimizer.layout:
        ordered[run.offset : run.offset + run.length] = received[run.local : run.local + run.length].cpu()
    return ordered.numpy()


def _log_likelihood_ratio(z: npt.NDArray[np.float64], mechanism: MechanismSpec) -> npt.NDArray[np.float64]:
    q = mechanism.sampling_probability
    exponent = (2.0 * z - 1.0) / (2.0 * mechanism.noise_multiplier**2)
    return np.logaddexp(np.log1p(-q) if q < 1.0 else -np.inf, np.log(q) + exponent)
