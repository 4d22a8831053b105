"""The optimizer that DeepSpeed drives: it adds the noise, once per step, to the gradients that it owns.

DeepSpeed calls `step` when the averaged fp32 gradient lies on its partition of the parameters, which is the
last point before anything is made of it: everything after `step` is post-processing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tributary_worker.privacy.errors import PrivacyError
from tributary_worker.privacy.layout import Run
from tributary_worker.privacy.noise import GaussianNoise


class RecordingOptimizer:
    """Stands in for the inner optimizer: keeps the gradient that it is handed and changes nothing."""

    def __init__(self) -> None:
        self.received: Tensor | None = None

    def step(self, parameters: Sequence[Tensor]) -> None:
        self.received = torch.cat([_gradient(p).detach().flatten() for p in parameters])


class NoisyOptimizer(torch.optim.Optimizer):
    """Adds N(0, (sigma C / qN)**2) to each element by its global offset, then lets `inner` take its step.

    It fails closed: a step that was not announced with `begin`, or before the layout is known, raises.
    """

    def __init__(self, inner: torch.optim.Optimizer, noise: GaussianNoise, proximal_mu: float = 0.0) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        if len(inner.param_groups) != 1:
            raise PrivacyError(f"one parameter group is supported, not {len(inner.param_groups)}")
        # Shared, not copied: DeepSpeed exchanges the parameters of a group for its own flat partition.
        self.param_groups = inner.param_groups
        self.state = inner.state
        self._inner = inner
        self.noise = noise
        self._proximal_mu = proximal_mu
        self._start: Tensor | None = None
        self._runs: Sequence[Run] | None = None
        self._step_to_take: int | None = None
        self._recorder: RecordingOptimizer | None = None

    def set_layout(self, runs: Sequence[Run]) -> None:
        """Where this optimizer's elements lie in the flat vector of all trained parameters."""
        self._runs = runs

    @property
    def layout(self) -> Sequence[Run]:
        """The runs that `set_layout` was given."""
        if self._runs is None:
            raise PrivacyError("the layout of the partition is not known: measure it before training")
        return self._runs

    def begin(self, step: int) -> None:
        """Announce a step, whose number selects the noise; the next `step()` uses it up."""
        self._step_to_take = step

    @property
    def is_step_pending(self) -> bool:
        """Whether the announced step was not taken: DeepSpeed skipped it."""
        return self._step_to_take is not None

    @contextmanager
    def recording(self) -> Iterator[RecordingOptimizer]:
        """While open, gradients are recorded as the inner optimizer would get them, and no parameter
        moves."""
        self._recorder = RecordingOptimizer()
        try:
            yield self._recorder
        finally:
            self._recorder = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of DP-SGD on the gradients lying on the parameters; `closure` is not supported."""
        if closure is not None or self._step_to_take is None:
            raise PrivacyError("a step was taken that was not announced: its noise would be undefined")
        step, self._step_to_take = self._step_to_take, None
        if self._recorder is None or self._runs is not None:
            self._add_noise(step)
        if self._recorder is not None:
            self._recorder.step(self._parameters())
        else:
            self._add_proximal_pull()
            self._inner.step()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _add_noise(self, step: int) -> None:
        start = 0
        for gradient in [_gradient(p).view(-1) for p in self._parameters()]:
            for run in self.layout:
                # Both count through all gradients together; no copy is made of more than a piece.
                first, last = max(run.local, start), min(run.local + run.length, start + len(gradient))
                if first < last:
                    piece = gradient[first - start : last - start]
                    noised = self.noise.add(piece.cpu().numpy(), step, run.offset + first - run.local)
                    piece.copy_(torch.from_numpy(noised))
            start += len(gradient)

    def _add_proximal_pull(self) -> None:
        """FedProx (Li et al. 2020): mu * (w - w_start), a function of noised values only, so it comes
        after."""
        if not self._proximal_mu:
            return
        weights = torch.cat([p.detach().flatten() for p in self._parameters()])
        if self._start is None:
            self._start = weights.clone()
        pull = self._proximal_mu * (weights - self._start)
        parameters = self._parameters()
        for parameter, piece in zip(parameters, pull.split([p.numel() for p in parameters]), strict=True):
            _gradient(parameter).add_(piece.view_as(parameter))


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None or parameter.grad.dtype != torch.float32:
        raise PrivacyError("the optimizer was handed no float32 gradient for a parameter that it owns")
    return parameter.grad
