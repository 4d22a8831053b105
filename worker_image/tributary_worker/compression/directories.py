"""Model directories: what is written beside the weights, so that each step ends in one that transformers
loads.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tributary_api.failures import Reason
from tributary_store.bundle_files import CONFIG_FILE, WEIGHTS, WEIGHTS_INDEX_FILE
from tributary_worker.failures import StageFailure


def stored_dtype(directory: Path) -> torch.dtype:
    """In which the weights of a directory are stored: that of the first floating-point one."""
    for file in sorted(directory.glob(WEIGHTS)):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point():
                    found: torch.dtype = tensor.dtype
                    return found
    raise StageFailure(Reason.MODEL_UNSUPPORTED, "the model has no floating-point weights; push it again")


def save_model(model: Any, source: Path, target: Path) -> None:
    """Write `model` with the tokenizer and the data type of `source` to the empty directory `target`."""
    model.to(stored_dtype(source)).save_pretrained(target)
    for file in sorted(source.iterdir()):
        if _is_companion(file) and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _is_companion(file: Path) -> bool:
    named = {CONFIG_FILE, WEIGHTS_INDEX_FILE}
    return file.is_file() and file.name not in named and not fnmatch(file.name, WEIGHTS)
