"""The private training step on DeepSpeed.

Gradients of records are clipped and summed outside DeepSpeed, in fp32. Then one `engine.backward` of
W/(qN) * sum_p <p, stop_grad(G_p)>, W ranks, makes DeepSpeed reduce exactly that sum, in whatever way its ZeRO
stage does, and the optimizer under it adds the noise. Nothing of DeepSpeed is patched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tributary_api.records import MechanismSpec
from tributary_worker.objectives import Batch
from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.layout import measure_layout, owned_elements
from tributary_worker.privacy.noise import GaussianNoise
from tributary_worker.privacy.optimizer import NoisyOptimizer
from tributary_worker.privacy.sampler import EMPTY, PoissonSampler
from tributary_worker.privacy.trained import TrainedWeights

ADAM_BETAS = (0.9, 0.99)
"""A shorter memory of squares than usual: private trainings have tens of steps, not thousands."""
SGD_MOMENTUM = 0.9
ZERO_STAGES = (0, 1, 2, 3)
SUB_GROUP_ELEMENTS = 10**15
"""ZeRO 3 takes an optimizer step for each sub-group: there must be one, for one noise."""
LAYOUT_STEP = 2**62
"""Steps from here on belong to start-up checks, so that they never use the noise of a step that is
published."""

Load = Callable[[Sequence[int]], Batch]
"""Record indices (EMPTY for none) -> their batch, on the engine's device."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    zero_stage: int
    micro_batch_size: int
    learning_rate: float
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    proximal_mu: float = 0.0
    gradient_checkpointing: bool = False


class PrivateEngine:
    """DP-SGD on the trainable parameters of a model.

    `losses(batch)` gives each record's loss (batch,) under the model. Sampling and noise come from two secret
    keys. Raises `UnsupportedError` for settings that cannot be trained privately, `PrivacyError` if DeepSpeed
    did not do what the privacy claim needs.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[Batch], Tensor],
        *,
        mechanism: MechanismSpec,
        sampling_key: bytes,
        noise_key: bytes,
        settings: EngineSettings,
    ) -> None:
        _check_settings(settings)
        # Dropout would make a retry differ from the attempt that it repeats.
        model.eval()
        self.mechanism = mechanism
        self.losses = losses
        self.micro_batch_size = settings.micro_batch_size
        self.trained = TrainedWeights(model)
        self._add_clipped = (
            self.trained.add_clipped_in_two_passes
            if enable_checkpointing(model, settings.gradient_checkpointing)
            else self.trained.add_clipped
        )
        self.sampler = PoissonSampler(mechanism, sampling_key)
        self.noise_std = mechanism.noise_multiplier * mechanism.max_grad_norm / mechanism.expected_batch_size
        self.optimizer = NoisyOptimizer(
            _inner_optimizer(self.trained.parameters, settings),
            GaussianNoise(noise_key, self.noise_std),
            settings.proximal_mu,
        )
        self._deepspeed = _deepspeed_engine(_LinearLoss(model, self.trained), self.optimizer, settings)
        check_deepspeed(self._deepspeed)
        self.device = torch.device(self._deepspeed.device)
        self.world_size = int(dist.get_world_size())
        self.rank = int(dist.get_rank())
        self.owned = self._find_layout()

    def train_step(self, step: int, load: Load) -> None:
        """One step of DP-SGD: sample, clip, sum, reduce, add noise, update."""
        total = self._zeros()
        for indices in self.sampler.micro_batches(step, self.rank, self.world_size, self.micro_batch_size):
            is_record = torch.from_numpy(indices != EMPTY).to(self.device)
            self.clipped_sum(load(indices.tolist()), is_record, total=total)
        self.apply(total, step)

    def clipped_sum(
        self, batch: Batch, weights: Tensor, loss_scale: float = 1.0, *, total: Tensor | None = None
    ) -> Tensor:
        """`total`, or zeros, plus the clipped gradients of a micro-batch, flat (numel,), fp32; `weights`
        (batch,) is 0 for empty slots."""
        total = self._zeros() if total is None else total
        self._add_clipped(
            lambda: loss_scale * self.losses(batch), weights, self.mechanism.max_grad_norm, total
        )
        return total

    def norms(self, batch: Batch) -> Tensor:
        """Norm of each record's gradient, before clipping: private, but for a batch that is not data."""
        return self.trained.norms(lambda: self.losses(batch), self.micro_batch_size)

    @contextmanager
    def gathered(self) -> Iterator[list[Tensor]]:
        """The trained weights with their full shapes, while open; all ranks open it together."""
        is_partitioned = self._deepspeed.zero_optimization_partition_weights()
        with deepspeed.zero.GatheredParameters(self.trained.parameters, enabled=is_partitioned):
            yield [p.detach() for p in self.trained.parameters]

    def apply(self, clipped: Tensor, step: int) -> None:
        """Hand this rank's clipped sum to DeepSpeed: the optimizer gets (sum over ranks) / qN, plus noise."""
        self._hand_over(clipped, self.mechanism.expected_batch_size, step)

    def record(self, clipped: Tensor, step: int) -> Tensor:
        """As `apply`, but nothing moves: the gradient that the inner optimizer on this rank would have got,
        flat."""
        return self._record(clipped, self.mechanism.expected_batch_size, step)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.trained.numel, dtype=torch.float32, device=self.device)

    def _hand_over(self, total: Tensor, divisor: int, step: int) -> None:
        """The divisor is the *expected* batch, which is public; the size of a drawn batch is not."""
        self.optimizer.begin(step)
        # DeepSpeed averages over ranks; what is wanted is the sum.
        loss = self.world_size / divisor * self._deepspeed(total)
        self._deepspeed.backward(loss)
        self._deepspeed.step()
        if self.optimizer.is_step_pending:
            raise PrivacyError(
                "DeepSpeed skipped a step: the number of noised steps would depend on the data"
            )

    def _record(self, total: Tensor, divisor: int, step: int) -> Tensor:
        with self.optimizer.recording() as recorder:
            self._hand_over(total, divisor, step)
        if recorder.received is None:
            raise PrivacyError("DeepSpeed took no optimizer step")
        return recorder.received

    def _find_layout(self) -> int:
        """Tell the optimizer which elements it owns; gives how many they are."""

        def probe(gradient: Tensor) -> Tensor:
            return self._record(gradient if self.rank == 0 else torch.zeros_like(gradient), 1, LAYOUT_STEP)

        runs = measure_layout(self.trained.numel, probe, self.device)
        self.optimizer.set_layout(runs)
        return owned_elements(runs)


class _LinearLoss(nn.Module):
    """The model as DeepSpeed sees it: a loss whose gradient is whatever it is given."""

    def __init__(self, model: nn.Module, trained: TrainedWeights) -> None:
        super().__init__()
        self.model = model
        self._trained = trained
        for parameter in trained.parameters:
            # ZeRO 3 gathers a module's own weights for its forward, and those that it is told of.
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, gradient: Tensor) -> Tensor:
        pairs = zip(self._trained.parameters, self._trained.views(gradient), strict=True)
        return torch.stack([(p * g).sum() for p, g in pairs]).sum()


def _check_settings(settings: EngineSettings) -> None:
    if settings.zero_stage not in ZERO_STAGES:
        raise UnsupportedError(f"DeepSpeed has no zeroStage {settings.zero_stage}: set it to 0, 1, 2 or 3")


def enable_checkpointing(model: Any, is_wanted: bool) -> bool:
    """Switch gradient checkpointing on or off; gives `is_wanted`.

    The blocks alone are set to training, which they ask for; what is in them is not, for its dropout.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if is_wanted and not blocks:
        raise UnsupportedError("the model cannot checkpoint: set training.gradientCheckpointing to false")
    if is_wanted:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for block in blocks:
        block.training = is_wanted
    return is_wanted


def _inner_optimizer(parameters: Sequence[nn.Parameter], settings: EngineSettings) -> torch.optim.Optimizer:
    # No weight decay: on a delta it would pull the model back to the base, which is what proximalMu is for.
    if settings.optimizer == "SGD":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=SGD_MOMENTUM)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)


def _deepspeed_engine(model: nn.Module, optimizer: NoisyOptimizer, settings: EngineSettings) -> Any:
    # Its progress lines and norms are private values before noise.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": False,
            "sub_group_size": SUB_GROUP_ELEMENTS,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def check_deepspeed(engine: Any) -> None:
    """What DeepSpeed runs with, not what it was asked for: its default for clipping is 1.0."""
    if engine.gradient_clipping() != 0.0:
        raise PrivacyError(f"DeepSpeed clips the gradient at {engine.gradient_clipping()}: it must not")
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        raise PrivacyError(
            "DeepSpeed trains in low precision: trained weights, sums and noise must be float32"
        )
    if engine.communication_data_type != torch.float32:
        raise PrivacyError(f"DeepSpeed reduces gradients in {engine.communication_data_type}, not in float32")
    if engine.gradient_accumulation_steps() != 1:
        raise PrivacyError("DeepSpeed accumulates gradients: a step would not be one optimizer step")
