"""The self-test passes on the engine as it is, and each deliberate defect makes it fail."""

from __future__ import annotations

import private_engines as engines
import pytest
import torch

from tributary_api.shared import TaskKind
from tributary_worker.objectives import causal_lm, synthetic_batch
from tributary_worker.privacy.engine import PrivateEngine
from tributary_worker.privacy.errors import PrivacyError
from tributary_worker.privacy.noise import GaussianNoise
from tributary_worker.privacy.optimizer import NoisyOptimizer
from tributary_worker.privacy.selftest import run_self_test

pytestmark = pytest.mark.usefixtures("alone")


def self_test(private, model):
    batch = synthetic_batch(
        TaskKind.CAUSAL_LM, model.config, private.micro_batch_size, engines.LENGTH, private.device
    )
    return run_self_test(private, batch)


def with_optimizer(kind):
    """An engine whose optimizer has a defect."""
    model = engines.adapted_gpt2()
    private = engines.engine(model)
    private.optimizer.__class__ = kind
    return private, model


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_engine_passes_and_nothing_has_moved(zero_stage):
    model = engines.adapted_gpt2()
    private = engines.engine(model, zero_stage=zero_stage)
    before, randomness = engines.weights(private), torch.get_rng_state()
    figures = self_test(private, model)
    assert figures.planted_record_ratio == pytest.approx(1.0, abs=1e-3)
    assert figures.noise_std_ratio == pytest.approx(1.0, abs=0.01)
    assert figures.trainable_parameters == 257 * 3 + 2 * 48 * 3
    assert torch.equal(before, engines.weights(private))
    assert torch.equal(torch.get_rng_state(), randomness)


def test_figures_repeat_themselves():
    """They come from public numbers and the key alone."""
    figures = [self_test(engines.engine(m), m) for m in (engines.adapted_gpt2(), engines.adapted_gpt2())]
    assert figures[0] == figures[1]


def test_no_clipping_is_found():
    class Unclipped(PrivateEngine):
        def clipped_sum(self, batch, weights, loss_scale=1.0, *, total=None):
            total = torch.zeros(self.trained.numel) if total is None else total
            self.trained.add_clipped(lambda: loss_scale * self.losses(batch), weights, 1e30, total)
            return total

    model = engines.adapted_gpt2()
    with pytest.raises(PrivacyError, match="planted record"):
        self_test(engines.engine(model, kind=Unclipped), model)


def test_a_model_that_mixes_the_records_of_a_batch_is_found():
    def mixed(batch):
        losses = causal_lm(model, batch)
        return losses * losses.mean()

    model = engines.adapted_gpt2()
    private = engines.engine(model)
    private.losses = mixed
    with pytest.raises(PrivacyError, match="neighbours"):
        self_test(private, model)


def test_clipping_after_the_mean_is_found():
    class ClippedMean(PrivateEngine):
        def apply(self, clipped, step):
            super().apply(clipped, step)

        def record(self, clipped, step):
            mean = clipped / self.mechanism.expected_batch_size
            limit = self.mechanism.max_grad_norm / self.mechanism.expected_batch_size
            return super().record(mean * min(1.0, limit / max(float(mean.norm()), 1e-12)), step)

    model = engines.adapted_gpt2()
    with pytest.raises(PrivacyError, match="planted record"):
        self_test(engines.engine(model, kind=ClippedMean), model)


def test_no_noise_is_found():
    class Silent(NoisyOptimizer):
        def _add_noise(self, step):
            pass

    with pytest.raises(PrivacyError, match="standard deviation"):
        self_test(*with_optimizer(Silent))


def test_noise_a_tenth_too_weak_is_found():
    model = engines.adapted_gpt2()
    private = engines.engine(model)
    private.optimizer.noise = GaussianNoise(engines.NOISE_KEY, 0.9 * private.noise_std)
    with pytest.raises(PrivacyError, match=r"0\.9\d* times the standard deviation"):
        self_test(private, model)


def test_noise_that_repeats_in_every_step_is_found():
    class Stuck(NoisyOptimizer):
        def begin(self, step):
            super().begin(0)

    with pytest.raises(PrivacyError, match="repeats"):
        self_test(*with_optimizer(Stuck))


def test_noise_that_is_added_twice_is_found():
    class Doubled(NoisyOptimizer):
        def _add_noise(self, step):
            super()._add_noise(step)
            super()._add_noise(step + 2**40)

    with pytest.raises(PrivacyError, match="standard deviation"):
        self_test(*with_optimizer(Doubled))


def test_a_self_test_that_moves_the_weights_is_found():
    class Moving(NoisyOptimizer):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1.0)

    with pytest.raises(PrivacyError, match="moved the weights"):
        self_test(*with_optimizer(Moving))


def test_a_skipped_step_is_found():
    class Skipping(NoisyOptimizer):
        def step(self, closure=None):
            pass

    with pytest.raises(PrivacyError, match="skipped a step"):
        self_test(*with_optimizer(Skipping))


def test_a_gradient_that_deepspeed_scales_is_found():
    """What its default clipping would do to the gradient, seen from the optimizer."""

    class Scaled(NoisyOptimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)
            super().step(closure)

    with pytest.raises(PrivacyError, match="planted record"):
        self_test(*with_optimizer(Scaled))
