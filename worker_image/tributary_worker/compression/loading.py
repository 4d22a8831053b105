"""Loading of a model directory, plain or compressed: what evaluate, gate and serve compute with.

A compressed model is widened while it is loaded, so it takes the memory of its parent, and its results are
those of the stored int8 weights. Nothing is loaded in part: a missing, superfluous or misshapen tensor
refuses the model.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from tributary_api.failures import Reason
from tributary_api.shared import ModelRef, TaskKind
from tributary_store import bundle
from tributary_store.objects import Objects
from tributary_worker.failures import StageFailure

CLASSES = {
    TaskKind.CAUSAL_LM: AutoModelForCausalLM,
    TaskKind.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
}
FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
"""Of transformers' loading report: with any of these it would go on with random or dropped weights."""
NAMES_SHOWN_MAX = 3


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to compute on `device`, and its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def positions(self) -> int:
        """The longest sequence that the model was made for, in tokens."""
        return int(self.model.config.max_position_embeddings)


def load_model(directory: Path, task: TaskKind) -> LoadedModel:
    """The model of a bundle's directory, for inference. Raises StageFailure (ModelUnsupported) if unfit."""
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = _complete_model(directory, task)
    except StageFailure:
        raise
    except MemoryError:
        raise
    except Exception as error:  # transformers raises whatever its parsers and constructors happen to raise
        raise _unsupported(f"the model cannot be loaded: {type(error).__name__}: {error}") from error
    _check_vocabulary(tokenizer, model)
    return LoadedModel(model.eval().requires_grad_(False).to(device), tokenizer, device)


def fetch_model(store: Objects, ref: ModelRef, task: TaskKind) -> LoadedModel:
    """Pull a bundle and load it; its files are gone afterwards. StoreErrors go through."""
    with tempfile.TemporaryDirectory() as directory:
        bundle.pull(store, ref, Path(directory))
        return load_model(Path(directory), task)


def _complete_model(directory: Path, task: TaskKind) -> Any:
    # Half precision is slow on CPUs, and a comparison of models must not be one of roundings.
    model, report = CLASSES[task].from_pretrained(
        directory, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    for fault in FAULTS:
        if names := sorted(str(name) for name in report.get(fault) or ()):
            shown = ", ".join(names[:NAMES_SHOWN_MAX])
            kind = fault.replace("_", " ")
            raise _unsupported(f"weights and config.json disagree ({task}): {len(names)} {kind}, as {shown}")
    return model


def _check_vocabulary(tokenizer: Any, model: Any) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise _unsupported(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size} embeddings: "
            "the bundle was put together from two models; push it again"
        )


def _unsupported(message: str) -> StageFailure:
    return StageFailure(Reason.MODEL_UNSUPPORTED, message)
