"""The integer layout of a compressed bundle, and which tensors of a model it covers.

The layout is `pack-quantized` of compressed-tensors: 8 or 4 bits a weight, packed into int32, and one scale
for each row of the stored matrix, or each group of a row. Of the int8 layouts it is the one that covers
weights and embeddings and leaves activations alone, so that every runtime computes the same model:
transformers widens it while loading, and vLLM has kernels for it (its classes CompressedTensorsWNA16 and
CompressedTensorsEmbeddingWNA16Int). With `int-quantized` vLLM would round the activations too, which no
gate of ours has measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)

FORMAT = CompressionFormat.pack_quantized.value
CONFIG_FIELD = "quantization_config"
"""Field of config.json that says how the weights are stored."""
DEQUANTIZE_FIELD = "dequantize"
"""Makes transformers widen the weights while loading: packed ones it can neither tie nor put in a Conv1D."""

WEIGHT_SUFFIX = ".weight"
TIED_HEAD = "lm_head.weight"
HEAD_SCALE = "lm_head.weight_scale"
"""In a compressed checkpoint if the head has a matrix of its own."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is special about one model type. `embedding` is the tensor that a tied head shares."""

    embedding: str
    targets: tuple[str, ...]
    kept: tuple[str, ...] = ()
    """Last parts of the modules whose matrices stay as they are."""


CLASSIFICATION_HEAD = "score"
"""Stays as it is: a few rows that decide everything, and too few bytes to gain."""

_LLAMA_LIKE = Architecture("model.embed_tokens.weight", ("Linear", "Embedding"))
ARCHITECTURES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    # vLLM keeps the position embedding in a plain layer that cannot be quantised, and it is small.
    "gpt2": Architecture("transformer.wte.weight", ("Linear", "Conv1D", "Embedding"), kept=("wpe",)),
}
"""By `model_type` of config.json: those whose loading is tested."""


def is_covered(name: str, dimensions: int, architecture: Architecture) -> bool:
    """Whether a tensor of the checkpoint is a matrix to be stored in int8."""
    module = name.removesuffix(WEIGHT_SUFFIX).rpartition(".")[2]
    return (
        dimensions == 2
        and name.endswith(WEIGHT_SUFFIX)
        and module not in (*architecture.kept, CLASSIFICATION_HEAD)
    )


@dataclass(frozen=True, slots=True)
class Precision:
    """How many bits a weight has, and how many weights of a row share a scale; 0 for the whole row."""

    bits: int
    group_size: int = 0

    @property
    def largest_level(self) -> int:
        """The lowest level is never reached, so that w and -w have the same precision."""
        return int(2 ** (self.bits - 1)) - 1


INT8 = Precision(8)


def weight_scheme(targets: Iterable[str], precision: Precision = INT8) -> QuantizationScheme:
    """Symmetric integers with a scale per row, or per group of a row; activations stay as they are."""
    grouped = {"strategy": QuantizationStrategy.GROUP, "group_size": precision.group_size}
    rows = {"strategy": QuantizationStrategy.CHANNEL}
    weights = QuantizationArgs(
        num_bits=precision.bits, symmetric=True, **(grouped if precision.group_size else rows)
    )
    return QuantizationScheme(targets=list(targets), weights=weights, format=FORMAT)


def quantization_config(
    architecture: Architecture, *, has_head: bool, precision: Precision = INT8
) -> dict[str, Any]:
    """The `quantization_config` of config.json; `has_head` says that the head has a matrix of its own."""
    targets, ignore = list(architecture.targets), _ignored(architecture)
    # A tied head is nothing to quantise, and vLLM knows an untied one by its name alone.
    (targets if has_head else ignore).append("re:.*lm_head$")
    config = QuantizationConfig(
        # One group: transformers widens all matrices of a checkpoint by the first one's scheme.
        config_groups={"group_0": weight_scheme(targets, precision)},
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    return {**config.model_dump(mode="json"), DEQUANTIZE_FIELD: True}


def _ignored(architecture: Architecture) -> list[str]:
    return [f"re:.*{module}$" for module in (*architecture.kept, CLASSIFICATION_HEAD)]
