from __future__ import annotations

from functools import cache

import deepspeed
import private_engines as engines
import pytest
import torch

from tributary_worker.objectives import causal_lm
from tributary_worker.privacy import engine as engine_module
from tributary_worker.privacy.errors import PrivacyError
from tributary_worker.privacy.noise import GaussianNoise

pytestmark = pytest.mark.usefixtures("alone")

STAGES = (0, 1, 2, 3)


@cache
def reference(method, step):
    """The noised gradient of a step by the book: one record at a time, and no DeepSpeed anywhere."""
    private = engines.engine(engines.MODELS[method](), zero_stage=0)
    model = engines.MODELS[method]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(private.trained.numel, dtype=torch.float64)
    for index in private.sampler.records(step):
        loss = causal_lm(model, engines.load(engines.data_set(), [index])).sum()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
        total += flat * min(1.0, engines.MECHANISM.max_grad_norm / float(flat.norm()))
    std = engines.MECHANISM.noise_multiplier * engines.MECHANISM.max_grad_norm / engines.BATCH
    noise = GaussianNoise(engines.NOISE_KEY, std).draw(step, 0, private.trained.numel)
    return total / engines.BATCH + torch.from_numpy(noise)


def check_step(method, **settings):
    private = engines.engine(engines.MODELS[method](), **settings)
    for step in (0, 1):
        found = engines.received(private, engines.data_set(), step)
        assert torch.allclose(found.double(), reference(method, step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("method", engines.MODELS)
def test_the_optimizer_gets_the_clipped_mean_plus_noise_in_every_stage(method, zero_stage):
    check_step(method, zero_stage=zero_stage, micro_batch_size=3)


@pytest.mark.privacy_matrix
@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("method", engines.MODELS)
@pytest.mark.parametrize("micro_batch_size", [1, 8])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_same_for_any_micro_batch_with_and_without_checkpointing(
    method, zero_stage, micro_batch_size, gradient_checkpointing
):
    check_step(
        method,
        zero_stage=zero_stage,
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=gradient_checkpointing,
    )


@pytest.mark.parametrize("method", engines.MODELS)
def test_checkpointing_changes_no_gradient(method):
    check_step(method, zero_stage=2, gradient_checkpointing=True)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_training_is_the_same_in_every_stage_and_repeats_itself(zero_stage):
    def trained(stage):
        private = engines.engine(engines.adapted_gpt2(), zero_stage=stage)
        for step in range(3):
            private.train_step(step, lambda indices: engines.load(engines.data_set(), list(indices)))
        return engines.weights(private)

    weights = trained(zero_stage)
    assert torch.equal(weights, trained(zero_stage))
    assert torch.allclose(weights, trained(0), atol=1e-5)
    assert float(weights.abs().max()) > 0.01


def test_trained_a_is_covered_too():
    data = engines.data_set()
    private = engines.engine(engines.adapted_llama(freeze_a=False), zero_stage=1)
    assert private.trained.numel == sum(p.numel() for p in private.trained.parameters)
    assert {name.rsplit(".", 2)[1] for name in private.trained.names} == {"lora_A", "lora_B"}
    assert engines.received(private, data, 0).shape == (private.trained.numel,)


def test_one_record_moves_the_gradient_by_no_more_than_c_over_qn():
    data, other = engines.data_set(), engines.data_set()
    private = engines.engine(engines.adapted_gpt2())
    record = int(private.sampler.records(0)[0])
    other[record] = torch.randint(1, 257, (engines.LENGTH,))
    moved = engines.received(private, data, 0) - engines.received(private, other, 0)
    # Another record in its place: at most 2C. The same noise cancels.
    limit = 2 * engines.MECHANISM.max_grad_norm / engines.BATCH
    assert 0 < float(moved.norm()) <= limit * (1 + 1e-4)


def test_the_pull_of_fedprox_is_towards_the_start():
    free = engines.engine(engines.adapted_gpt2(), optimizer="SGD")
    held = engines.engine(engines.adapted_gpt2(), optimizer="SGD", proximal_mu=10.0)
    for private in (free, held):
        for step in range(3):
            private.train_step(step, lambda indices: engines.load(engines.data_set(), list(indices)))
    distances = [float(engines.weights(private).norm()) for private in (free, held)]
    assert 0 < distances[1] < distances[0]


def test_a_deepspeed_that_clips_by_default_is_refused():
    model = torch.nn.Linear(2, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    running, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config
    )
    with pytest.raises(PrivacyError, match=r"clips the gradient at 1\.0"):
        engine_module.check_deepspeed(running)


def test_no_step_without_its_number():
    private = engines.engine(engines.adapted_gpt2(), zero_stage=0)
    with pytest.raises(PrivacyError, match="not announced"):
        private.optimizer.step()


def test_the_noise_of_start_up_checks_is_never_that_of_a_training_step():
    assert engine_module.LAYOUT_STEP > 10**6 * 10**6
