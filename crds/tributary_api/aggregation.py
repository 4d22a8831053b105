"""How the deltas of a round become one model: strategy, server optimizer, encoding."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tributary_api.base import ApiModel, Decimal, validations


class StrategyName(StrEnum):
    FED_AVG = "FedAvg"
    NORM_BOUNDING = "NormBounding"
    MEDIAN = "Median"
    TRIMMED_MEAN = "TrimmedMean"
    GEOMETRIC_MEDIAN = "GeometricMedian"
    KRUM = "Krum"
    MULTI_KRUM = "MultiKrum"


MEDIAN_CLIENTS_MIN = 3
"""The median of two is their mean, and one bad delta is half of it."""
CLIENTS_MIN: dict[StrategyName, tuple[int, int]] = {
    StrategyName.MEDIAN: (0, MEDIAN_CLIENTS_MIN),
    StrategyName.GEOMETRIC_MEDIAN: (0, MEDIAN_CLIENTS_MIN),
    StrategyName.TRIMMED_MEAN: (2, 1),
    StrategyName.KRUM: (2, 3),
    StrategyName.MULTI_KRUM: (2, 3),
}
"""(a, b): the strategy needs a · byzantineClients + b deltas; those that are not named need one."""
COUNTS_BYZANTINE = (StrategyName.TRIMMED_MEAN, StrategyName.KRUM, StrategyName.MULTI_KRUM)
"""Strategies that must be told how many clients may be bad."""


class ServerOptimizerName(StrEnum):
    FED_AVG_M = "FedAvgM"
    FED_ADAM = "FedAdam"
    FED_YOGI = "FedYogi"
    FED_ADAGRAD = "FedAdagrad"


class ServerOptimizerSettings(ApiModel):
    """An optimizer at the server, which takes the clients' combined change for its gradient. Its state goes on in a round that starts from this one with roundRef."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            ("double(self.learningRate) > 0.0", "learningRate must be above 0"),
            (
                "double(self.beta1) < 1.0 && double(self.beta2) < 1.0",
                'beta1 and beta2 must be below 1, for example "0.9" and "0.99"',
            ),
            ("double(self.tau) > 0.0", 'tau must be above 0, for example "1e-3"'),
        )
    )
    name: ServerOptimizerName
    """FedAvgM: momentum. FedAdam, FedYogi, FedAdagrad: a step size of its own for each weight."""
    learning_rate: Decimal
    """Of the server; 1 for FedAvgM, 1e-3 to 1e-1 for the others, where it is about the most that a weight moves in a round."""
    beta1: Decimal = "0.9"
    """How much of the earlier change is kept."""
    beta2: Decimal = "0.99"
    """How much of the earlier squares is kept: FedAdam and FedYogi."""
    tau: Decimal = "1e-3"
    """Added to the root of the squares: smaller adapts more to each weight. Not for FedAvgM."""


class DeltaEncoding(StrEnum):
    """How a noised delta is stored. The privacy cost is the same for all."""

    FLOAT32 = "Float32"
    BFLOAT16 = "BFloat16"
    INT8 = "Int8"
    INT4 = "Int4"


class Aggregation(ApiModel):
    """How the clients' deltas become one model."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                f"has(self.byzantineClients) == (self.strategy in {[str(s) for s in COUNTS_BYZANTINE]})",
                f"byzantineClients goes with {', '.join(COUNTS_BYZANTINE)}: set it there and leave it out elsewhere",
            ),
            (
                "!has(self.normBound) || self.strategy == 'NormBounding'",
                "normBound goes with NormBounding: leave it out or change the strategy",
            ),
            (
                "!has(self.normBound) || double(self.normBound) > 0.0",
                "normBound must be above 0; leave it out to take the median of the norms",
            ),
        )
    )
    strategy: StrategyName = StrategyName.FED_AVG
    """FedAvg: the weighted mean. NormBounding: the same of shortened deltas. Median, TrimmedMean: coordinate by coordinate. GeometricMedian, Krum, MultiKrum: by the distances between whole deltas."""
    weighting: Literal["NumExamples", "Uniform"] = "NumExamples"
    """Weight of a client's delta in FedAvg and NormBounding: its declared number of examples, or the same for all. The other strategies count every client once: a declared number may be a lie."""
    byzantine_clients: Annotated[int, Field(ge=1, le=10000)] | None = None
    """How many clients may send anything at all: TrimmedMean needs 2 of them and 1 more, Krum and MultiKrum 2 of them and 3 more."""
    norm_bound: Decimal | None = None
    """NormBounding: a delta with a larger L2 norm is shortened to this one. Absent: the median of the norms."""
    server_optimizer: ServerOptimizerSettings | None = None
    """Absent: the combined change is added as it is."""
    delta_encoding: DeltaEncoding = DeltaEncoding.FLOAT32
    """How clients store their deltas after noise: BFloat16 halves the bytes, Int8 has about a quarter, Int4 an eighth."""
    parallelism: Annotated[int, Field(ge=1, le=64)] = 1
    """Pods that share the work of the aggregation. The result does not depend on it."""

    @property
    def clients_min(self) -> int:
        """With fewer deltas than this the strategy cannot do what it is for."""
        if self.strategy is StrategyName.NORM_BOUNDING and self.norm_bound is None:
            return MEDIAN_CLIENTS_MIN
        factor, offset = CLIENTS_MIN.get(self.strategy, (0, 1))
        return factor * (self.byzantine_clients or 0) + offset


def enough_clients(count: str) -> str:
    """CEL on a round's spec: the expression `count` is at least `Aggregation.clients_min`."""
    a = "self.aggregation"
    byzantine = f"(has({a}.byzantineClients) ? {a}.byzantineClients : 0)"
    needs = "".join(
        f"{a}.strategy == '{strategy}' ? {f'{factor} * {byzantine} + ' if factor else ''}{offset} : "
        for strategy, (factor, offset) in CLIENTS_MIN.items()
    )
    bounding = f"{a}.strategy == 'NormBounding' && !has({a}.normBound) ? {MEDIAN_CLIENTS_MIN} : "
    return f"{count} >= ({needs}{bounding}0)"
