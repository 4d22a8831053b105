"""The model that a training starts from, and the delta that it ends with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tributary_api.failures import Reason
from tributary_api.shared import TaskKind
from tributary_api.tasks import TrainTask
from tributary_store import bundle
from tributary_store.objects import Objects
from tributary_worker import lora, lora_names
from tributary_worker.aggregation.numbers import Array
from tributary_worker.batches import padding_id
from tributary_worker.failures import StageFailure
from tributary_worker.lora_init import frozen_a
from tributary_worker.store_access import store_failures

FROM_BUNDLE = {"local_files_only": True, "trust_remote_code": False}
"""A bundle is data: nothing of it is run, and nothing that it names is fetched."""
BASE_DTYPES = {"Float32": torch.float32, "BFloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model ready to be trained, its tokenizer, and the files that it was read from."""

    model: Any
    tokenizer: Any
    directory: Path

    @property
    def missing_prefix(self) -> str:
        """What the bundle's names lack of the running model's."""
        return lora_names.missing_prefix(self.model.config.model_type, [name for name, _ in self.stored()])

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of every floating-point tensor of the bundle, one in memory at a time."""
        for path in sorted(self.directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point():
                        yield name, tensor


def load_base_model(task: TrainTask, store: Objects, directory: Path) -> BaseModel:
    """Read the base from a bundle whose every byte was checked, and mark the weights to train, in fp32."""
    with store_failures():
        bundle.pull(store, task.base_model, directory)
    kind = AutoModelForCausalLM if task.task is TaskKind.CAUSAL_LM else AutoModelForSequenceClassification
    dtype = BASE_DTYPES[task.training.base_dtype]
    try:
        model, loading = kind.from_pretrained(directory, dtype=dtype, output_loading_info=True, **FROM_BUNDLE)
        tokenizer = AutoTokenizer.from_pretrained(directory, **FROM_BUNDLE)
    except (OSError, ValueError, KeyError) as error:
        message = f"{task.base_model.uri} does not load: {error}"
        raise StageFailure(Reason.MODEL_UNSUPPORTED, message) from error
    check_model(task, model, loading["missing_keys"])
    model.config.pad_token_id = padding_id(tokenizer)
    return BaseModel(model, tokenizer, directory)


def check_model(task: TrainTask, model: Any, missing: Collection[str]) -> None:
    """Refuse a base model that the task does not fit; `missing` names weights that its bundle does not
    have."""
    known = sorted(lora_names.DEFAULT_TARGETS)
    if model.config.model_type not in known:
        # Others may let one record of a batch change the gradient of another.
        found = repr(model.config.model_type)
        raise _unsupported(f"model type {found} cannot train privately yet: use one of {', '.join(known)}")
    if task.task is TaskKind.CAUSAL_LM and model.config.model_type in lora_names.BIDIRECTIONAL_TYPES:
        # Every token sees those that it should predict.
        raise _unsupported(f"{model.config.model_type} is no CausalLM: set task to SequenceClassification")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and task.training.max_sequence_length > positions:
        raise _unsupported(f"maxSequenceLength is above the model's {positions} positions: lower it")
    if missing:
        # They were drawn at random just now: every client would train another model.
        lacking = ", ".join(sorted(missing)[:3])
        raise _unsupported(
            f"{task.base_model.uri} lacks {lacking}, which a {task.task} model has: push the model with it"
        )


def _unsupported(message: str) -> StageFailure:
    return StageFailure(Reason.MODEL_UNSUPPORTED, message)


def mark_trained(task: TrainTask, base: BaseModel) -> None:
    """Leave a gradient to the weights that the round's method trains, and to no other."""
    method = task.method.lora
    if method is None:
        base.model.requires_grad_(True)
    else:
        settings = lora.LoraSettings(method.rank, method.alpha, method.freeze_a, tuple(method.target_modules))
        # From the run key: every client of the round has the same frozen A without anybody sending it.
        lora.add_adapters(base.model, settings, seed=task.grant.run_key, task=task.task)
    in_full = {n for n, p in base.model.named_parameters() if p.requires_grad and not _is_factor(n)}
    unknown = sorted(in_full - {base.missing_prefix + name for name, _ in base.stored()})
    if unknown:
        raise _unsupported(
            f"{task.base_model.uri} stores {unknown[0]} under another name: save it with transformers anew"
        )


def delta_of(task: TrainTask, base: BaseModel, trained: Mapping[str, Tensor]) -> dict[str, Array]:
    """What the training changed, fp32: factors under PEFT's names, and the change of every weight that is
    trained in full under its name in the bundle. `trained` is by the names of the running model.

    Since B starts at zero, (alpha / rank) B A is the change of a weight with an adapter. Of the method `full`
    every tensor of the bundle is here: one that the task has no use for, such as another head, as zeros.
    """
    prefix = base.missing_prefix
    delta = {lora_names.PEFT_PREFIX + name: _array(trained[name]) for name in trained if _is_factor(name)}
    for name, before in base.stored():
        after = trained.get(prefix + name)
        if after is not None:
            delta[name] = _array(after.to("cpu", torch.float32) - before.to(torch.float32))
        elif task.method.lora is None:
            delta[name] = _array(torch.zeros_like(before))
    return delta


def frozen_factors(task: TrainTask, base: BaseModel) -> dict[str, Array]:
    """The factors that every client draws alike from the run key, under PEFT's names."""
    method = task.method.lora
    if method is None or not method.freeze_a:
        return {}
    return {
        lora_names.factor_name(name, "lora_A"): frozen_a(
            task.grant.run_key, name, method.rank, lora.features(adapter.base)[0]
        )
        for name, adapter in lora.adapters(base.model)
    }


def _is_factor(name: str) -> bool:
    return lora_names.module_of(lora_names.PEFT_PREFIX + name) is not None


def _array(tensor: Tensor) -> Array:
    # A copy: the weights of a running engine go on changing, and ZeRO 3 takes them back.
    array: Array = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array
