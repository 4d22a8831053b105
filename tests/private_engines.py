"""Small private engines, and what their optimizers are handed, on any number of ranks."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
import torch.distributed as dist

from tributary_accounting.mechanism import dp_sgd
from tributary_api.records import MechanismSpec
from tributary_worker import lora, objectives
from tributary_worker.privacy.engine import EngineSettings, PrivateEngine
from tributary_worker.privacy.sampler import EMPTY

SAMPLING_KEY, NOISE_KEY = bytes(range(32)), bytes(range(32, 64))
LENGTH, NUM_EXAMPLES, BATCH = 12, 50, 10
MECHANISM = dp_sgd(NUM_EXAMPLES, BATCH, steps=3, noise_multiplier=0.8, max_grad_norm=0.3)
ODD_TARGETS = ("c_attn", "lm_head")
"""257 rows of the vocabulary times rank 3: an odd number of elements, so that ZeRO has to pad."""


def adapted_gpt2(*, freeze_a: bool = True, targets: tuple[str, ...] = ODD_TARGETS) -> Any:
    model = tiny_models.gpt2(width=16)
    lora.add_adapters(model, lora.LoraSettings(3, 6.0, freeze_a, targets), seed="a round")
    return model


def adapted_llama(*, freeze_a: bool = True) -> Any:
    model = tiny_models.llama(width=16)
    lora.add_adapters(model, lora.LoraSettings(3, 6.0, freeze_a), seed="a round")
    return model


def full_gpt2() -> Any:
    """All weights are trained, the embedding at both ends of the model among them."""
    return tiny_models.gpt2(width=16)


MODELS = {"lora": adapted_gpt2, "full": full_gpt2}


def engine(
    model: Any,
    *,
    zero_stage: int = 2,
    micro_batch_size: int = 4,
    mechanism: MechanismSpec = MECHANISM,
    kind: type[PrivateEngine] = PrivateEngine,
    **settings: Any,
) -> PrivateEngine:
    return kind(
        model,
        lambda batch: objectives.causal_lm(model, batch),
        mechanism=mechanism,
        sampling_key=SAMPLING_KEY,
        noise_key=NOISE_KEY,
        settings=EngineSettings(zero_stage, micro_batch_size, learning_rate=0.01, **settings),
    )


def data_set(seed: int = 0) -> torch.Tensor:
    """NUM_EXAMPLES records of random tokens, (N, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 257, (NUM_EXAMPLES, LENGTH), generator=generator)


def load(data: torch.Tensor, indices: list[int]) -> objectives.Batch:
    """The batch of some records; rows of `EMPTY` hold another record, which must not matter."""
    ids = data[indices]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def summed(private: PrivateEngine, data: torch.Tensor, step: int) -> torch.Tensor:
    """This rank's clipped sum of a step."""
    batches = private.sampler.micro_batches(step, private.rank, private.world_size, private.micro_batch_size)
    sums = [
        private.clipped_sum(load(data, indices.tolist()), torch.from_numpy(indices != EMPTY))
        for indices in batches
    ]
    return torch.stack(sums).sum(0)


def weights(private: PrivateEngine) -> torch.Tensor:
    """All trained weights, flat; on every rank."""
    with private.gathered() as tensors:
        return torch.cat([tensor.flatten().clone() for tensor in tensors])


def received(private: PrivateEngine, data: torch.Tensor, step: int) -> torch.Tensor:
    """The whole gradient that the optimizers of all ranks are handed in a step, by global offset."""
    mine = private.record(summed(private, data, step), step)
    whole, owners = torch.zeros(private.trained.numel), torch.zeros(private.trained.numel)
    for run in private.optimizer.layout:
        whole[run.offset : run.offset + run.length] = mine[run.local : run.local + run.length]
        owners[run.offset : run.offset + run.length] = 1
    dist.all_reduce(whole)
    dist.all_reduce(owners)
    return whole / owners
