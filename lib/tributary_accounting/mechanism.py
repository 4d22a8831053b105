"""The DP-SGD mechanism: sampler, neighbouring relation and accountant are one object.

A shuffled loader accounted as Poisson sampling would understate ε several times over, so nothing
else in the code states a sampling rate, a batch cap or a divisor.
"""

from __future__ import annotations

import math

import dp_accounting

from tributary_api.records import MechanismSpec

RELATION = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
"""Zero-out: the neighbouring data set has one record replaced by an empty one, so that N may be public."""

CAP_DEVIATIONS = 5
"""Five standard deviations above the mean: truncating there leaves ε unchanged to four digits."""


def dp_sgd(
    num_examples: int, expected_batch_size: int, steps: int, noise_multiplier: float, max_grad_norm: float
) -> MechanismSpec:
    """DP-SGD with truncated Poisson sampling.

    Raises:
        ValueError: the expected batch is larger than the data set.
    """
    if expected_batch_size > num_examples:
        raise ValueError(
            f"expectedBatchSize {expected_batch_size} is larger than the {num_examples} examples of "
            "the client: lower it, or leave this client out"
        )
    return MechanismSpec(
        num_examples=num_examples,
        expected_batch_size=expected_batch_size,
        batch_cap=batch_cap(num_examples, expected_batch_size),
        steps=steps,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )


def batch_cap(num_examples: int, expected_batch_size: int) -> int:
    """B_max = ceil(qN + 5·sqrt(qN(1-q))), at most N. It fixes the number of micro-batches of every step."""
    q = expected_batch_size / num_examples
    deviation = math.sqrt(expected_batch_size * (1 - q))
    return min(num_examples, math.ceil(expected_batch_size + CAP_DEVIATIONS * deviation))


def event(mechanism: MechanismSpec) -> dp_accounting.DpEvent:
    """The whole training as a DpEvent."""
    step = dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=mechanism.num_examples,
        sampling_probability=mechanism.sampling_probability,
        truncated_batch_size=mechanism.batch_cap,
        noise_multiplier=mechanism.noise_multiplier,
    )
    return dp_accounting.SelfComposedDpEvent(step, mechanism.steps)


def rounded_num_examples(num_examples: int) -> int:
    """Declared N rounded down to two significant digits.

    A smaller N is the safer statement, and fewer distinct values need fewer calibrations.
    """
    magnitude: int = 10 ** max(0, len(str(num_examples)) - 2)
    return num_examples // magnitude * magnitude
