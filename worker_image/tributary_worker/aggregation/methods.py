"""What the deltas of a round's method say about the base model's weights.

A method names the variables, which are what clients' values are combined of, and turns their combination
into changes of weights. Of LoRA with A frozen the variables are the factors B: mean(B) A = mean(B A), and a
robust strategy judges what the client trained. With A trained, and for full training, they are the weights
themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.round import LoraMethod
from tributary_api.tasks import AggregateTask
from tributary_store.tensors import TensorInfo
from tributary_worker import lora_names
from tributary_worker.aggregation.base import BaseModel, check_changeable
from tributary_worker.aggregation.blocks import Block, Segment, Variable
from tributary_worker.aggregation.changes import Change, LowRank
from tributary_worker.aggregation.deltas import ExpectedTensor
from tributary_worker.aggregation.numbers import WEIGHT_DTYPES, Array
from tributary_worker.aggregation.values import Copies
from tributary_worker.failures import StageFailure
from tributary_worker.lora_init import frozen_a

WEIGHT_SUFFIX = ".weight"
HEAD_SUFFIXES = (WEIGHT_SUFFIX, ".bias")
CHANGE_ELEMENTS = 1 << 21
"""Elements of a low-rank change that are worked out at a time."""

Combined = Iterable[tuple[Block, Array]]
"""Blocks of variables in order, and the float64 values of each, combined, in an array that is used again."""


class MethodPlan(Protocol):
    """A method of training, applied to one base model."""

    @property
    def is_dense(self) -> bool:
        """Deltas are as large as the model and have its tensors: they are streamed."""
        ...

    def expected(self) -> Mapping[str, ExpectedTensor]:
        """The tensors of every delta."""
        ...

    def is_trained(self, tensor: str) -> bool: ...

    def variables(self, tensors: Sequence[TensorInfo]) -> list[Variable]:
        """The variables that decide about these tensors of the base model, in the same order."""
        ...

    def changes(self, combined: Combined) -> Iterator[Change]:
        """What is added to the trained tensors, in their order, each from its first element to its last."""
        ...


def plan_for(task: AggregateTask, base: BaseModel) -> MethodPlan:
    """StageFailure (ModelUnsupported) if the round's method cannot be applied to this model."""
    lora = task.method.lora
    if lora is None:
        return FullPlan({name: info for name, info in base.tensors.items() if info.dtype in WEIGHT_DTYPES})
    head = lora_names.head_of(base.model_type, task.task)
    targets, heads = _targets(lora, base, head), _heads(base, head)
    for info in [*(target.tensor for target in targets.values()), *heads.values()]:
        check_changeable(info)
    return (FrozenPlan if lora.freeze_a else ProductPlan)(lora, task.run_key, targets, heads)


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

    def factor(self, factor: lora_names.Factor) -> str:
        return lora_names.factor_name(self.module, factor)

    def change(self, b: Array, a: Array, scale: float) -> LowRank:
        """scale · B A as the weight is stored."""
        return LowRank(a.T, b.T, scale) if self.is_transposed else LowRank(b, a, scale)


@dataclass(frozen=True, slots=True)
class FullPlan:
    """W += the combination of the deltas of all weights."""

    tensors: Mapping[str, TensorInfo]

    @property
    def is_dense(self) -> bool:
        return True

    def expected(self) -> Mapping[str, ExpectedTensor]:
        return {name: ExpectedTensor(info.shape) for name, info in self.tensors.items()}

    def is_trained(self, tensor: str) -> bool:
        return tensor in self.tensors

    def variables(self, tensors: Sequence[TensorInfo]) -> list[Variable]:
        return [Variable(info.name, info.elements) for info in tensors if info.name in self.tensors]

    def changes(self, combined: Combined) -> Iterator[Change]:
        return dense_changes(combined)


def dense_changes(combined: Combined) -> Iterator[Change]:
    """Of variables that are the weights themselves."""
    for block, values in combined:
        place = 0
        for segment in block:
            yield Change(segment.name, segment.start, values[place : place + segment.elements])
            place += segment.elements


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """W += (alpha / rank) · B A. B starts at zero, so the product that a client started from adds nothing."""

    method: LoraMethod
    run_key: str
    targets: Mapping[str, Target]
    """By the name of the base model's tensor."""
    heads: Mapping[str, TensorInfo]
    """Tensors of the base model that are trained in full beside the adapters."""

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def scale(self) -> float:
        return self.method.alpha / self.method.rank

    def is_trained(self, tensor: str) -> bool:
        return tensor in self.targets or tensor in self.heads

    def variables(self, tensors: Sequence[TensorInfo]) -> list[Variable]:
        trained = (info for info in tensors if self.is_trained(info.name))
        return [
            Variable(info.name, info.elements)
            if info.name in self.heads
            else self.variable(self.targets[info.name])
            for info in trained
        ]

    def variable(self, target: Target) -> Variable:
        return Variable(target.tensor.name, target.tensor.elements)

    def expected(self) -> Mapping[str, ExpectedTensor]:
        tensors = {name: ExpectedTensor(info.shape) for name, info in self.heads.items()}
        for target in self.targets.values():
            tensors[target.factor("lora_B")] = ExpectedTensor((target.outputs, self.method.rank))
            tensors[target.factor("lora_A")] = self.expected_a(target)
        return tensors

    def expected_a(self, target: Target) -> ExpectedTensor:
        return ExpectedTensor((self.method.rank, target.inputs))

    def values(self, copies: Copies, client: int, segment: Segment) -> Array:
        """Values of one client's variable."""
        return copies.read(client, segment.name, segment.start, segment.stop)


@dataclass(frozen=True, slots=True)
class FrozenPlan(LoraPlan):
    """A is the same for all clients, from the run's key, so B alone is combined: mean(B) A = mean(B A)."""

    def expected_a(self, target: Target) -> ExpectedTensor:
        digest = sha256_of(self._frozen_a(target).tobytes())
        return ExpectedTensor((self.method.rank, target.inputs), is_required=False, digest=digest)

    def variable(self, target: Target) -> Variable:
        return Variable(target.factor("lora_B"), target.outputs * self.method.rank)

    def changes(self, combined: Combined) -> Iterator[Change]:
        by_factor = {target.factor("lora_B"): target for target in self.targets.values()}
        for name, b in _whole(combined):
            target = by_factor.get(name)
            if target is None:
                yield Change(name, 0, b)
                continue
            values = b.reshape(target.outputs, self.method.rank)
            yield from _low_rank(target, target.change(values, self._frozen_a(target), self.scale))

    def _frozen_a(self, target: Target) -> Array:
        return frozen_a(self.run_key, target.module, self.method.rank, target.inputs)


def _whole(combined: Combined) -> Iterator[tuple[str, Array]]:
    """Small variables put together again."""
    name, parts = "", list[Array]()
    for block, values in combined:
        place = 0
        for segment in block:
            if segment.name != name:
                if parts:
                    yield name, np.concatenate(parts)
                name, parts = segment.name, []
            parts.append(values[place : place + segment.elements].copy())
            place += segment.elements
    if parts:
        yield name, np.concatenate(parts)


def _low_rank(target: Target, change: LowRank) -> Iterator[Change]:
    elements = target.tensor.elements
    for start in range(0, elements, CHANGE_ELEMENTS):
        stop = min(elements, start + CHANGE_ELEMENTS)
        yield Change(target.tensor.name, start, change.elements(start, stop))


@dataclass(frozen=True, slots=True)
class ProductPlan(LoraPlan):
    """Every client has an A of its own: the products Bᵢ Aᵢ are combined, exactly, and never B and A apart."""

    def changes(self, combined: Combined) -> Iterator[Change]:
        return dense_changes(combined)

    def values(self, copies: Copies, client: int, segment: Segment) -> Array:
        """Elements of one client's (alpha / rank) · B A, float64."""
        if segment.name in self.heads:
            return copies.read(client, segment.name, segment.start, segment.stop)
        target = self.targets[segment.name]
        rank = self.method.rank
        b = copies.read(client, target.factor("lora_B"), 0, target.outputs * rank)
        a = copies.read(client, target.factor("lora_A"), 0, target.inputs * rank)
        change = target.change(b.reshape(-1, rank), a.reshape(rank, -1), self.scale)
        return change.elements(segment.start, segment.stop)


@dataclass(frozen=True, slots=True)
class LocalValues:
    """The `Values` of adapters, whose deltas were copied and checked before."""

    plan: LoraPlan
    copies: Copies

    def block(self, client: int, block: Block) -> list[Array]:
        return [self.plan.values(self.copies, client, segment) for segment in block]


def _heads(base: BaseModel, head: str | None) -> dict[str, TensorInfo]:
    """The tensors of the layer that gives a classifier's classes."""
    names = {f"{head}{suffix}" for suffix in HEAD_SUFFIXES}
    return {name: info for name, info in base.tensors.items() if name in names}


def _targets(method: LoraMethod, base: BaseModel, head: str | None) -> dict[str, Target]:
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
        if module != head
    }
