"""Which files of a Hugging Face directory make a model bundle, and which must never be in one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from tributary_store.digests import read_span
from tributary_store.errors import BundleRefused, ObjectDamaged
from tributary_store.tensors import read_header

BUNDLE_FILE = "bundle.json"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
TAKEN = (WEIGHTS, "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")
"""Weights, configuration, tokenizer and chat template. Anything else stays behind."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz", "*.dill")
"""Formats that can run code when they are loaded."""


def is_taken(name: str) -> bool:
    return name != BUNDLE_FILE and not name.startswith(".") and any(fnmatch(name, taken) for taken in TAKEN)


def is_pickle(name: str) -> bool:
    return any(fnmatch(name.lower(), pickle) for pickle in PICKLES)


def bundle_files(directory: Path) -> list[Path]:
    """The files to publish, by name. BundleRefused names what is wrong and what to do about it."""
    if not directory.is_dir():
        raise BundleRefused(f"{directory} is not a directory: give the one that save_pretrained wrote")
    files = sorted(path for path in directory.iterdir() if path.is_file() or path.is_symlink())
    _refuse_pickles(path.name for path in files)
    taken = [path for path in files if is_taken(path.name)]
    for path in taken:
        _refuse_foreign_link(directory, path)
    _check_config(directory / CONFIG_FILE)
    _check_weights(directory, {path.name for path in taken})
    return taken


def check_names(names: Iterable[str]) -> None:
    """Refuse a manifest that names a file which no bundle may hold, before anything is written to disk."""
    names = list(names)
    _refuse_pickles(names)
    for name in names:
        if Path(name).name != name or not is_taken(name):
            raise BundleRefused(f"the bundle's manifest names {name!r}, which no bundle may hold")


def _refuse_pickles(names: Iterable[str]) -> None:
    if pickles := sorted(name for name in names if is_pickle(name)):
        raise BundleRefused(
            f"{', '.join(pickles)}: pickles can run code when they are loaded; convert the weights with "
            "save_pretrained(..., safe_serialization=True) and remove these files"
        )


def _refuse_foreign_link(directory: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleRefused(
            f"{path.name} is a link to {path.resolve()}, outside the directory: copy it here (cp -L)"
        )


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise BundleRefused(
            f"{path.parent} has no {CONFIG_FILE}: give a directory that save_pretrained wrote"
        )
    config = _json_object(path)
    if "auto_map" in config:
        raise BundleRefused(
            f"{CONFIG_FILE} has auto_map: a model that brings its own code is not run; "
            "use an architecture that transformers knows"
        )


def _check_weights(directory: Path, names: set[str]) -> None:
    if WEIGHTS_INDEX_FILE in names:
        shards = set(_json_object(directory / WEIGHTS_INDEX_FILE).get("weight_map", {}).values())
    else:
        shards = {WEIGHTS_FILE}
    if missing := sorted(shards - names):
        raise BundleRefused(f"no weights: {', '.join(missing)} missing in {directory}; save the model again")
    for name in sorted(name for name in names if fnmatch(name, WEIGHTS)):
        path = directory / name
        try:
            read_header(name, path.stat().st_size, partial(read_span, path))
        except ObjectDamaged as error:
            raise BundleRefused(str(error)) from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise BundleRefused(f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BundleRefused(f"{path.name} is not a JSON object")
    return value
