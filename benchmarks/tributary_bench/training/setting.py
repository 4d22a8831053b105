"""What every arm of the comparison trains, so that nothing but the privacy differs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tributary_accounting.mechanism import batch_cap
from tributary_api.round import DeepSpeedSettings
from tributary_worker.privacy.sampler import micro_batches_per_rank


class MethodName(StrEnum):
    LORA = "lora"
    FULL = "full"


class ArmName(StrEnum):
    OURS = "ours"
    PLAIN = "plain"
    OPACUS_HOOKS = "opacus-hooks"
    OPACUS_GHOST = "opacus-ghost"


ARMS: dict[MethodName, tuple[ArmName, ...]] = {
    MethodName.LORA: (ArmName.PLAIN, ArmName.OURS, ArmName.OPACUS_HOOKS, ArmName.OPACUS_GHOST),
    # Opacus's hooks would keep a copy of every weight for every record; ghost clipping is its own advice.
    MethodName.FULL: (ArmName.PLAIN, ArmName.OURS, ArmName.OPACUS_GHOST),
}


@dataclass(frozen=True)
class Setting:
    """A step of `micro_batches` times `micro_batch_size` records of `length` tokens."""

    method: MethodName
    micro_batches: int = 4
    micro_batch_size: int = 8
    length: int = 128
    layers: int = 12
    width: int = 768
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    noise_multiplier: float = 1.0
    max_grad_norm: float = 0.5
    zero_stage: int = DeepSpeedSettings().zero_stage

    @property
    def records(self) -> int:
        return self.micro_batches * self.micro_batch_size


PADDING_EXAMPLES, PADDING_EXPECTED_BATCH = 10_000, 128
"""The round whose padding is reported."""


def padding_ratio(micro_batch_size: int) -> float:
    """Slots computed over records expected: what a truncated Poisson batch costs by its fixed shape alone."""
    cap = batch_cap(PADDING_EXAMPLES, PADDING_EXPECTED_BATCH)
    return micro_batches_per_rank(cap, 1, micro_batch_size) * micro_batch_size / PADDING_EXPECTED_BATCH
