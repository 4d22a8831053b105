"""Integer weights: each row w becomes round(w / s) with s = max|w| / 127, stored with its scale.

With 4 bits each group of a row has a scale of its own, max|w| / 7.

Symmetric round-to-nearest with a scale per channel (Jacob et al. 2018, "Quantization and training of neural
networks for efficient integer-arithmetic-only inference", section 2, without zero points). No text is needed
for it. Rows are those of the stored matrix: output channels, tokens, or the inputs of GPT-2's Conv1D.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from tributary_api.failures import Reason
from tributary_api.release import QuantizationScheme, Quantize
from tributary_store.bundle_files import CONFIG_FILE, WEIGHTS, WEIGHTS_INDEX_FILE
from tributary_worker.compression.layout import (
    ARCHITECTURES,
    CONFIG_FIELD,
    FORMAT,
    HEAD_SCALE,
    INT8,
    TIED_HEAD,
    WEIGHT_SUFFIX,
    Architecture,
    Precision,
    is_covered,
    quantization_config,
    weight_scheme,
)
from tributary_worker.failures import StageFailure

METADATA = {"format": "pt"}
"""transformers refuses a safetensors file that does not say what wrote it."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def precision_of(step: Quantize) -> Precision:
    """Of the weights under a scheme."""
    return INT8 if step.scheme is QuantizationScheme.INT8 else Precision(4, step.group_size)


def quantize_directory(source: Path, target: Path, precision: Precision = INT8) -> None:
    """Write the Hugging Face model of `source` to the empty directory `target` with integer weights.

    Raises StageFailure (ModelUnsupported) for an architecture, data type or value that cannot be stored so.
    """
    config = read_config(source)
    architecture = _architecture(config)
    placed: dict[str, str] = {}
    for file in sorted(source.glob(WEIGHTS)):
        stored: dict[str, Tensor] = {}
        for name, tensor in _tensors(file, is_tied(config), architecture):
            stored |= _stored(name, tensor, architecture, precision)
        save_file(stored, target / file.name, metadata=METADATA)
        placed |= dict.fromkeys(stored, file.name)
    config[CONFIG_FIELD] = quantization_config(
        architecture, has_head=HEAD_SCALE in placed, precision=precision
    )
    _write_json(target / CONFIG_FILE, config)
    if (source / WEIGHTS_INDEX_FILE).exists():
        _write_json(target / WEIGHTS_INDEX_FILE, {"metadata": {}, "weight_map": placed})
    _copy_the_rest(source, target)


def read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise _unsupported(f"config.json cannot be read ({error}); push the whole model") from error
    if not isinstance(config, dict):
        raise _unsupported("config.json is not a JSON object; push the whole model")
    return config


def row_scales(weight: Tensor, precision: Precision = INT8) -> Tensor:
    """The scales of a matrix (rows, columns), as (rows, groups of a row)."""
    groups = weight.unflatten(1, (-1, precision.group_size or weight.shape[1]))
    scales = groups.abs().amax(dim=2) / precision.largest_level
    return torch.where(scales == 0, torch.ones_like(scales), scales)  # zeros have no scale of their own


def _architecture(config: Mapping[str, Any]) -> Architecture:
    if CONFIG_FIELD in config:
        raise _unsupported("the model is quantised already; remove the quantize step")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise _unsupported(f"cannot quantise model type {kind!r}, only {known}; remove the quantize step")
    return ARCHITECTURES[kind]


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding, by the config or by the default of its architecture."""
    return bool(AutoConfig.for_model(**config).tie_word_embeddings)


def _tensors(file: Path, tied: bool, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, one at a time, without a tied head's copy of the embedding."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                tensor = tensors.get_tensor(name)
                is_head = tied and name == TIED_HEAD and architecture.embedding in names
                if not (is_head and torch.equal(tensor, tensors.get_tensor(architecture.embedding))):
                    yield name, tensor
    except SafetensorError as error:
        raise _unsupported(f"{file.name} is not a safetensors file ({error}); push it again") from error


def _stored(name: str, tensor: Tensor, architecture: Architecture, precision: Precision) -> dict[str, Tensor]:
    """What stands on disk for one tensor: itself, or the parts of its packed form."""
    if tensor.is_floating_point():
        _check(name, tensor)
    if not is_covered(name, tensor.dim(), architecture):
        return {name: tensor}
    weight = tensor.to(torch.float32)
    _check_groups(name, weight, precision)
    parts = {"weight": weight, "weight_scale": row_scales(weight, precision)}
    packed = BaseCompressor.get_value_from_registry(FORMAT).compress(
        parts, weight_scheme(architecture.targets, precision)
    )
    prefix = name.removesuffix(WEIGHT_SUFFIX)
    return {f"{prefix}.{part}": value.contiguous() for part, value in packed.items()}


def _check_groups(name: str, weight: Tensor, precision: Precision) -> None:
    columns, size = weight.shape[1], precision.group_size
    if size and columns % size:
        raise _unsupported(
            f"{name} has {columns} columns, no multiple of quantize.groupSize {size}: change it"
        )


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise _unsupported(f"{name} has data type {tensor.dtype}; store it as float32, float16 or bfloat16")
    if not bool(torch.isfinite(tensor).all()):
        raise _unsupported(f"{name} holds NaN or infinite values; the model is broken, use another one")


def _copy_the_rest(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _unsupported(message: str) -> StageFailure:
    return StageFailure(Reason.MODEL_UNSUPPORTED, message)
