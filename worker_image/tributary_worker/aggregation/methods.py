"""How the deltas of a round's method become changes of the base model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.round import LoraMethod, Method
from tributary_store.tensors import TensorInfo
from tributary_worker import lora_names
from tributary_worker.aggregation.base import BaseModel, check_changeable
from tributary_worker.aggregation.changes import Change, Dense, LowRank, weighted_mean
from tributary_worker.aggregation.deltas import Delta, ExpectedTensor
from tributary_worker.aggregation.numbers import WEIGHT_DTYPES, Array
from tributary_worker.failures import StageFailure
from tributary_worker.lora_init import frozen_a

READS_PARALLEL = 8
"""Clients whose tensor is in memory at the same time."""
WEIGHT_SUFFIX = ".weight"


class MethodPlan(Protocol):
    """A method of training, applied to one base model."""

    def expected(self) -> Mapping[str, ExpectedTensor]:
        """The tensors of every delta."""
        ...

    def change(self, tensor: str, deltas: Sequence[Delta]) -> Change | None:
        """What the deltas together add to a tensor of the base model; None if it was not trained."""
        ...


def plan_for(method: Method, base: BaseModel, run_key: str) -> MethodPlan:
    """StageFailure (ModelUnsupported) if the method cannot be applied to this model."""
    if method.lora is None:
        return FullPlan({name: info for name, info in base.tensors.items() if info.dtype in WEIGHT_DTYPES})
    targets = _targets(method.lora, base)
    for target in targets.values():
        check_changeable(target.tensor)
    return LoraPlan(method.lora, run_key, targets)


@dataclass(frozen=True, slots=True)
class Target:
    """A weight with an adapter. `module` is its layer's name in the running model, as adapters are named."""

    tensor: TensorInfo
    module: str
    is_transposed: bool

    @property
    def outputs(self) -> int:
        return self.tensor.shape[1 if self.is_transposed else 0]

    @property
    def inputs(self) -> int:
        return self.tensor.shape[0 if self.is_transposed else 1]


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """W += (alpha / rank) · B A. With A frozen, mean(B) A = mean(B A); else the mean is of products."""

    method: LoraMethod
    run_key: str
    targets: Mapping[str, Target]
    """By the name of the base model's tensor."""

    def expected(self) -> Mapping[str, ExpectedTensor]:
        tensors: dict[str, ExpectedTensor] = {}
        for target in self.targets.values():
            shape_a, shape_b = (self.method.rank, target.inputs), (target.outputs, self.method.rank)
            tensors[lora_names.factor_name(target.module, "lora_B")] = ExpectedTensor(shape_b)
            tensors[lora_names.factor_name(target.module, "lora_A")] = (
                ExpectedTensor(shape_a, is_required=False, digest=sha256_of(self._frozen_a(target).tobytes()))
                if self.method.freeze_a
                else ExpectedTensor(shape_a)
            )
        return tensors

    def change(self, tensor: str, deltas: Sequence[Delta]) -> Change | None:
        target = self.targets.get(tensor)
        if target is None:
            return None
        b, a = self._mean_of_b(target, deltas) if self.method.freeze_a else _stack(target, deltas)
        scale = self.method.alpha / self.method.rank
        return LowRank(a.T, b.T, scale) if target.is_transposed else LowRank(b, a, scale)

    def _frozen_a(self, target: Target) -> Array:
        return frozen_a(self.run_key, target.module, self.method.rank, target.inputs)

    def _mean_of_b(self, target: Target, deltas: Sequence[Delta]) -> tuple[Array, Array]:
        name = lora_names.factor_name(target.module, "lora_B")
        return weighted_mean(_read_all(name, deltas)), self._frozen_a(target).astype(np.float64)


def _stack(target: Target, deltas: Sequence[Delta]) -> tuple[Array, Array]:
    """[w₁B₁ … wₙBₙ] and [A₁; …; Aₙ]: their product is the exact weighted mean of the products BᵢAᵢ.

    B starts at zero, so the product that a client started from adds nothing.
    """
    weight_sum = sum(delta.weight for delta in deltas)
    name_b, name_a = (lora_names.factor_name(target.module, factor) for factor in ("lora_B", "lora_A"))
    b = [weight / weight_sum * values for weight, values in _read_all(name_b, deltas)]
    a = [values for _, values in _read_all(name_a, deltas)]
    return np.concatenate(b, axis=1), np.concatenate(a, axis=0)


@dataclass(frozen=True, slots=True)
class FullPlan:
    """W += the weighted mean of the deltas of all weights."""

    tensors: Mapping[str, TensorInfo]

    def expected(self) -> Mapping[str, ExpectedTensor]:
        return {name: ExpectedTensor(info.shape) for name, info in self.tensors.items()}

    def change(self, tensor: str, deltas: Sequence[Delta]) -> Change | None:
        if tensor not in self.tensors:
            return None
        mean = weighted_mean(_read_all(tensor, deltas))
        return Dense(mean.reshape(rows_and_columns(self.tensors[tensor])))


def rows_and_columns(info: TensorInfo) -> tuple[int, int]:
    """A tensor as a matrix with its first dimension as rows."""
    rows = info.shape[0] if info.shape else 1
    return rows, int(np.prod(info.shape[1:], dtype=np.int64))


def _read_all(name: str, deltas: Sequence[Delta]) -> Iterator[tuple[float, Array]]:
    """(weight, tensor) of each delta in order, a few read at a time."""
    with ThreadPoolExecutor(READS_PARALLEL) as pool:
        for start in range(0, len(deltas), READS_PARALLEL):
            batch = deltas[start : start + READS_PARALLEL]
            for delta, values in zip(batch, pool.map(lambda d: d.read(name), batch), strict=True):
                yield delta.weight, values


def _targets(method: LoraMethod, base: BaseModel) -> dict[str, Target]:
    leaves = lora_names.target_leaves(base.model_type, method.target_modules)
    modules = {
        name.removesuffix(WEIGHT_SUFFIX): info
        for name, info in base.tensors.items()
        if name.endswith(WEIGHT_SUFFIX) and len(info.shape) == 2
    }
    chosen = lora_names.targets(modules, leaves)
    absent = sorted(set(leaves) - {lora_names.leaf(module) for module in chosen})
    if absent or not chosen:
        raise StageFailure(
            Reason.MODEL_UNSUPPORTED,
            f"{base.ref.uri} ({base.model_type or 'of unknown type'}) has no weight of its own for "
            f"{', '.join(absent) or 'any adapter'}: change method.lora.targetModules",
        )
    prefix = lora_names.missing_prefix(base.model_type, modules)
    return {
        f"{module}{WEIGHT_SUFFIX}": Target(
            modules[module], prefix + module, lora_names.is_transposed(base.model_type, module)
        )
        for module in chosen
    }
