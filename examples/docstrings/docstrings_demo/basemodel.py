"""The base model: trained by a Job the first time, kept outside the checkout, and only pushed after that."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from docstrings_demo.owners import CHECKOUT
from docstrings_demo.podjobs import PACKAGE
from tributary_api.shared import ModelRef
from tributary_dev.places import cache_root
from tributary_store import bundle
from tributary_store.objects import Objects

INPUTS = (PACKAGE / "corpus.py", PACKAGE / "pretrain.py", CHECKOUT / "requirements" / "worker.txt")
"""What the model depends on: the corpus, the training, and the versions of everything in the image."""


def cached_model() -> Path:
    """Where this base model lies, or would lie once it was trained."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS))
    return cache_root() / "demo" / "base-models" / digest.hexdigest()[:16]


def push_cached(store: Objects, models_uri: str) -> ModelRef | None:
    """Push the model that an earlier run has kept; None if there is none."""
    folder = cached_model()
    return bundle.push(store, folder, models_uri, description="docstrings") if folder.is_dir() else None


def keep(store: Objects, ref: ModelRef) -> None:
    """Keep a model that was just trained, all of it or nothing."""
    folder = cached_model()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        bundle.pull(store, ref, scratch)
        if not folder.exists():
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def reference(line: str) -> ModelRef | None:
    """The model that a line of the training Job's log names, if it is that line."""
    try:
        decoded = json.loads(line)
    except ValueError:
        return None
    found = decoded.get("model") if isinstance(decoded, dict) else None
    return ModelRef.model_validate(found) if found else None
