"""The four ways to take the same step. Each is made once, in a process of its own, then steps when asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from training_worlds import NOWHERE, TENANT_KEY, client_object, train_task
from transformers import GPT2Config, GPT2LMHeadModel

from tributary_accounting.mechanism import dp_sgd
from tributary_bench.training.opacus_models import as_linears, untied
from tributary_bench.training.setting import ArmName, MethodName, Setting
from tributary_worker import distributed, lora
from tributary_worker.objectives import Batch, causal_lm
from tributary_worker.privacy.engine import ADAM_BETAS
from tributary_worker.train import build_engine

SEED = "bench"
SNAPSHOT = "0" * 64
Step = Callable[[], None]


def base_model(setting: Setting) -> Any:
    """A random model in fp32, without dropout, which the private arms do without."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=setting.layers, n_embd=setting.width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def marked(model: Any, setting: Setting) -> Any:
    """The model with the weights that the method trains, and no other, asking for a gradient."""
    if setting.method is MethodName.LORA:
        lora.add_adapters(model, lora.LoraSettings(setting.rank, setting.alpha), SEED)
    return model


def micro_batches(setting: Setting, vocabulary: int) -> list[Batch]:
    """The records of the step: random tokens, the same for every arm."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.micro_batches, setting.micro_batch_size, setting.length)
    return [batch_of(ids) for ids in torch.randint(0, vocabulary, shape, generator=generator)]


def batch_of(ids: torch.Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@contextmanager
def arm(name: ArmName, setting: Setting) -> Iterator[Step]:
    """The arm's step. DeepSpeed's arms have a process group of one."""
    if name in (ArmName.OPACUS_HOOKS, ArmName.OPACUS_GHOST):
        yield opacus_step(setting, is_ghost=name is ArmName.OPACUS_GHOST)
        return
    layout = distributed.RankLayout(0, 0, 1, 1, distributed.LOOPBACK, distributed.free_port())
    os.environ.update(layout.environment)
    with distributed.process_group(layout):
        yield private_step(setting) if name is ArmName.OURS else plain_step(setting)


def private_step(setting: Setting) -> Step:
    """Our engine, built from a task as in a training pod. With q = 1 every record is in every step."""
    model = marked(base_model(setting), setting)
    method = {"rank": setting.rank, "alpha": setting.alpha}
    task = train_task(
        NOWHERE,
        client_object(),
        method={"lora": method} if setting.method is MethodName.LORA else {"full": {}},
        training={
            "microBatchSize": setting.micro_batch_size,
            "learningRate": str(setting.learning_rate),
            "maxSequenceLength": setting.length,
            "deepspeed": {"zeroStage": setting.zero_stage},
        },
    )
    everything = (setting.records, setting.records)
    mechanism = dp_sgd(*everything, 1, setting.noise_multiplier, setting.max_grad_norm)
    task = task.model_copy(update={"grant": task.grant.model_copy(update={"mechanism": mechanism})})
    engine = build_engine(task, model, TENANT_KEY, SNAPSHOT)
    records = torch.cat([batch["input_ids"] for batch in micro_batches(setting, model.config.vocab_size)])
    steps = iter(range(10**6))
    return lambda: engine.train_step(next(steps), lambda indices: batch_of(records[list(indices)]))


def plain_step(setting: Setting) -> Step:
    """The same training on DeepSpeed without privacy."""
    model = marked(base_model(setting), setting)
    config = {
        "train_micro_batch_size_per_gpu": setting.micro_batch_size,
        "gradient_accumulation_steps": setting.micro_batches,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": setting.zero_stage, "overlap_comm": False},
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adam(model, setting), config=config, dist_init_required=False
    )
    batches = micro_batches(setting, model.config.vocab_size)

    def step() -> None:
        for batch in batches:
            engine.backward(causal_lm(engine, batch).mean())
            engine.step()

    return step


def opacus_step(setting: Setting, *, is_ghost: bool) -> Step:
    """Opacus without DeepSpeed, with per-example gradients (hooks) or ghost clipping."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    bare = opacus_model(setting, is_ghost=is_ghost).train()
    wrap = (
        GradSampleModuleFastGradientClipping(bare, strict=False, max_grad_norm=setting.max_grad_norm)
        if is_ghost
        else GradSampleModule(bare, strict=False)
    )
    optimizer = (DPOptimizerFastGradientClipping if is_ghost else DPOptimizer)(
        adam(bare, setting),
        noise_multiplier=setting.noise_multiplier,
        max_grad_norm=setting.max_grad_norm,
        expected_batch_size=setting.records,
    )
    batches = micro_batches(setting, bare.config.vocab_size)
    # Opacus needs a batch dimension on the positions too.
    positions = torch.arange(setting.length).expand(setting.micro_batch_size, -1)

    def backward(batch: Batch) -> None:
        losses = causal_lm(lambda **inputs: wrap(position_ids=positions, **inputs), batch)
        if is_ghost:
            DPTensorFastGradientClipping(wrap, optimizer, losses).backward()
        else:
            losses.mean().backward()

    return lambda: accumulate(batches, backward, optimizer)


def accumulate(batches: Sequence[Batch], backward: Callable[[Batch], None], optimizer: Any) -> None:
    """One logical step of Opacus over several micro-batches."""
    for number, batch in enumerate(batches, start=1):
        optimizer.signal_skip_step(do_skip=number < len(batches))
        backward(batch)
        optimizer.step()
        optimizer.zero_grad()


def opacus_model(setting: Setting, *, is_ghost: bool) -> Any:
    """Where all weights are trained, with the layers that Opacus has its fast rules for."""
    model = marked(base_model(setting), setting)
    if setting.method is MethodName.LORA:
        return model
    return untied(as_linears(model)) if is_ghost else as_linears(model)


def adam(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=setting.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
