"""What clients and the aggregator must agree on about adapters: where they are, and their names.

No torch: the aggregator does without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from tributary_api.shared import TaskKind

Factor = Literal["lora_A", "lora_B"]

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "dense"),
}
"""Every linear layer of a block, which beats attention alone (Dettmers et al. 2023); by model type."""

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Layers of the GPT-2 family that keep their weight as (inputs, outputs)."""

INNER_MODEL = {
    "gpt2": "transformer.",
    "llama": "model.",
    "mistral": "model.",
    "qwen2": "model.",
    "bert": "bert.",
}
"""Where the architecture itself lies in a model with a head."""

BIDIRECTIONAL_TYPES = frozenset({"bert"})
"""Architectures in which every token sees every other, padding too unless it is masked."""

HEADS = {"gpt2": "score", "llama": "score", "mistral": "score", "qwen2": "score", "bert": "classifier"}
"""The layer of a classifier that gives the classes. Beside adapters it is trained in full, as is usual: it is
small, and new for the task."""

PEFT_PREFIX = "base_model.model."


def target_leaves(model_type: str, chosen: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the names of the modules to adapt; empty without a default for the type."""
    return tuple(chosen) or DEFAULT_TARGETS.get(model_type, ())


def leaf(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def targets(modules: Iterable[str], leaves: Sequence[str]) -> list[str]:
    return [module for module in modules if leaf(module) in leaves]


def is_transposed(model_type: str, module: str) -> bool:
    """Whether the module's weight is (inputs, outputs), unlike that of a linear layer."""
    return model_type in CONV1D_TYPES and leaf(module) in CONV1D_LEAVES


def head_of(model_type: str, task: TaskKind) -> str | None:
    """The module that is trained in full beside adapters; None if the task needs none."""
    return HEADS.get(model_type) if task is TaskKind.SEQUENCE_CLASSIFICATION else None


def factor_name(module: str, factor: Factor) -> str:
    """The name of a factor in PEFT's `adapter_model.safetensors`."""
    return f"{PEFT_PREFIX}{module}.{factor}.weight"


def is_factor(tensor: str, factor: Factor) -> bool:
    return tensor.startswith(PEFT_PREFIX) and tensor.endswith(f".{factor}.weight")


def module_of(tensor: str) -> str | None:
    """The module that a factor belongs to; None if the name is not a factor's."""
    for factor in ("lora_A", "lora_B"):
        if is_factor(tensor, factor):
            return tensor.removeprefix(PEFT_PREFIX).removesuffix(f".{factor}.weight")
    return None


def missing_prefix(model_type: str, modules: Iterable[str]) -> str:
    """What stored names lack of the running model's: a model may be stored without its head."""
    prefix = INNER_MODEL.get(model_type, "")
    return "" if any(module.startswith(prefix) for module in modules) else prefix
