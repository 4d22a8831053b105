"""A smaller dense model: feed-forward layers of fewer hidden units, and fewer blocks.

Hidden units go by the mean size of their activations (Muralidharan et al. 2024, "Compact language models
via pruning and knowledge distillation", section 2.2), in each layer the same number, so that the result is
a plain model of the same type. Blocks go by their influence, 1 - mean cos(input, output) over all positions
(Men et al. 2024, "ShortGPT", section 3): what hardly turns the hidden state is missed least. Both are
measured on public or sampled text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tributary_api.failures import Reason
from tributary_api.release import Prune
from tributary_api.shared import TaskKind
from tributary_worker.compression.directories import save_model
from tributary_worker.compression.loading import LoadedModel, load_model
from tributary_worker.compression.texts import documents_as_tokens, sampled_texts
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure

WIDTH_MULTIPLE = 32
"""Of the pruned layers: int8 kernels work on so many channels at a time."""
TEXTS_MAX = 128
"""More texts change the order of the units no more."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a model type keeps its blocks and feed-forward layers."""

    blocks: str
    count_field: str
    width_field: str
    down: str
    """The matrix that reads the hidden units."""
    rows: tuple[str, ...]
    """Tensors of a block whose first dimension is the hidden units."""
    columns: tuple[str, ...]
    """Tensors whose second is."""


_LLAMA_LIKE = Shape(
    "model.layers",
    "num_hidden_layers",
    "intermediate_size",
    "mlp.down_proj",
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ("mlp.down_proj.weight",),
)
SHAPES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    # A Conv1D stores its matrix the other way round.
    "gpt2": Shape(
        "transformer.h",
        "n_layer",
        "n_inner",
        "mlp.c_proj",
        ("mlp.c_fc.bias", "mlp.c_proj.weight"),
        ("mlp.c_fc.weight",),
    ),
}
"""By `model_type`."""


@dataclass(frozen=True, slots=True)
class Importance:
    """What each hidden unit (blocks, width) and each block (blocks,) is worth."""

    units: Tensor
    blocks: Tensor


def prune_directory(
    source: Path, target: Path, step: Prune, task: TaskKind, documents: Sequence[Document]
) -> None:
    """Write the pruned model of `source` to the empty directory `target`. Raises StageFailure
    (ModelUnsupported).
    """
    loaded = load_model(source, task)
    shape = _shape(loaded.model.config.model_type)
    units, blocks = _kept_counts(loaded.model, shape, step)
    importance = measure(loaded, shape, _texts(loaded, step, task, documents))
    kept_blocks = largest(importance.blocks, blocks)
    kept_units = [largest(importance.units[block], units) for block in kept_blocks]
    save_model(smaller(loaded.model, shape, kept_blocks, kept_units), source, target)


def _shape(model_type: str) -> Shape:
    if model_type not in SHAPES:
        known = ", ".join(sorted(SHAPES))
        raise _unsupported(f"cannot prune model type {model_type!r}, only {known}; remove the prune step")
    return SHAPES[model_type]


def _kept_counts(model: Any, shape: Shape, step: Prune) -> tuple[int, int]:
    """How many units of each layer and how many blocks stay."""
    blocks, width = len(_blocks(model, shape)), _width(model, shape)
    units = width
    if float(step.ffn_fraction) > 0:
        wanted = width * (1 - float(step.ffn_fraction)) / WIDTH_MULTIPLE
        units = max(1, round(wanted)) * WIDTH_MULTIPLE
        if units >= width:
            message = f"prune.ffnFraction {step.ffn_fraction} of {width} units is less than {WIDTH_MULTIPLE}"
            raise _unsupported(f"{message}: raise it, or set it to 0")
    left = blocks - round(blocks * float(step.depth_fraction))
    if left < 1:
        raise _unsupported(
            f"prune.depthFraction {step.depth_fraction} leaves none of {blocks} blocks: lower it"
        )
    return units, left


def _texts(
    loaded: LoadedModel, step: Prune, task: TaskKind, documents: Sequence[Document]
) -> list[list[int]]:
    if documents:
        texts = documents_as_tokens(loaded, documents[:TEXTS_MAX], step.max_sequence_length)
        if not texts:
            message = "prune.dataset has no text of two tokens among its first: give another, or none"
            raise StageFailure(Reason.DATA_EMPTY, message)
        return texts
    if task is not TaskKind.CAUSAL_LM:
        raise _unsupported("a classifier writes no text to measure on: give prune.dataset")
    return sampled_texts(loaded, TEXTS_MAX, step.max_sequence_length, seed=0)


@torch.inference_mode()
def measure(loaded: LoadedModel, shape: Shape, texts: Sequence[Sequence[int]]) -> Importance:
    """Importance over all positions of the texts, one text at a time, in float64."""
    blocks = _blocks(loaded.model, shape)
    units = [torch.zeros(_width(loaded.model, shape), dtype=torch.float64) for _ in blocks]
    turned = torch.zeros(len(blocks), dtype=torch.float64)
    positions = sum(len(ids) for ids in texts)

    def add_units(place: int) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            units[place] += inputs[0].detach().double().abs().flatten(0, -2).sum(0).cpu()

        return hook

    def add_turn(place: int) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            turned[place] += (1 - F.cosine_similarity(inputs[0].double(), after.double(), dim=-1)).sum().cpu()

        return hook

    with ExitStack() as hooks:
        for place, block in enumerate(blocks):
            down = block.get_submodule(shape.down)
            hooks.callback(down.register_forward_pre_hook(add_units(place)).remove)
            hooks.callback(block.register_forward_hook(add_turn(place)).remove)
        for ids in texts:
            loaded.model(input_ids=torch.tensor([ids], device=loaded.device), use_cache=False)
    return Importance(torch.stack(units) / positions, turned / positions)


def largest(values: Tensor, count: int) -> list[int]:
    """The places of the `count` largest values, rising; of equal ones the first."""
    order = sorted(range(len(values)), key=lambda place: (-float(values[place]), place))
    return sorted(order[:count])


def smaller(model: Any, shape: Shape, blocks: Sequence[int], units: Sequence[Sequence[int]]) -> Any:
    """A model of these blocks of `model`, each with these of its hidden units."""
    config = copy.deepcopy(model.config)
    setattr(config, shape.count_field, len(blocks))
    setattr(config, shape.width_field, len(units[0]))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[block] for block in blocks]
    found = type(model)(config)
    found.load_state_dict(_kept_tensors(model.state_dict(), shape, blocks, units))
    return found.eval()


def _kept_tensors(
    state: Mapping[str, Tensor], shape: Shape, blocks: Sequence[int], units: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    prefix = f"{shape.blocks}."
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    for place, (block, rows) in enumerate(zip(blocks, units, strict=True)):
        index = torch.tensor(rows)
        before = f"{prefix}{block}."
        for name in (name for name in state if name.startswith(before)):
            part = name.removeprefix(before)
            kept[f"{prefix}{place}.{part}"] = _cut(state[name].cpu(), part, shape, index)
    return kept


def _cut(tensor: Tensor, part: str, shape: Shape, units: Tensor) -> Tensor:
    if part in shape.rows:
        return tensor.index_select(0, units)
    return tensor.index_select(1, units) if part in shape.columns else tensor


def _blocks(model: Any, shape: Shape) -> Any:
    return model.get_submodule(shape.blocks)


def _width(model: Any, shape: Shape) -> int:
    first = dict(_blocks(model, shape)[0].named_parameters())[shape.rows[0]]
    return int(first.shape[0])


def _unsupported(message: str) -> StageFailure:
    return StageFailure(Reason.MODEL_UNSUPPORTED, message)
