"""The trained weights of a model, and the clipped sum of their gradients over records."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tributary_worker.privacy.clipping import add_clipped, factors_of
from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.parts import Dense, OuterSum, Part, squared_norms
from tributary_worker.privacy.taps import run_tapped, tapped_layers

Losses = Callable[[], Tensor]
"""Gives each record's loss, (batch,)."""


class TrainedWeights:
    """All trainable parameters of a model in a fixed order: the flat vector that clipping and noise speak of.

    Shapes are those of now: ZeRO 3 takes them from the parameters later.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise PrivacyError("the model has no trainable parameters")
        low = [name for name, p in named if p.dtype != torch.float32]
        if low:
            raise PrivacyError(f"trained weights must be float32, and {low[0]} is not")
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.shapes = [p.shape for p in self.parameters]
        self.numel = sum(shape.numel() for shape in self.shapes)
        self._layers = tapped_layers(model, self.parameters)
        uses = [index for layer in self._layers for index, _ in layer.rules]
        self._tied = {index for index in uses if uses.count(index) > 1}

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat vector (numel,) with the parameters' shapes."""
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    @torch.no_grad()
    def norms(self, losses: Losses, batch_size: int) -> Tensor:
        """Norm of each record's gradient, (batch,), float64. Nothing is kept but the norms."""
        squares = _SquareSum(self._tied)
        run_tapped(self._layers, losses, batch_size, squares.take)
        return squares.total().sqrt()

    @torch.no_grad()
    def add_clipped(self, losses: Losses, weights: Tensor, max_grad_norm: float, total: Tensor) -> None:
        """total += sum over records of weight * min(1, C / norm) * gradient; flat (numel,), fp32.

        `weights` (batch,) is 1 for a record and 0 for an empty slot. One backward pass: what the taps saw is
        kept until the norms are known (book-keeping).
        """
        add_clipped(self._parts(losses, len(weights)), max_grad_norm, weights, self.views(total))

    @torch.no_grad()
    def add_clipped_in_two_passes(
        self, losses: Losses, weights: Tensor, max_grad_norm: float, total: Tensor
    ) -> None:
        """The same with two passes, which keep nothing between them: the first for the norms, the second for
        the sum (Li et al. 2022). For gradient checkpointing, whose memory book-keeping would take again."""
        factors = factors_of(self.norms(losses, len(weights)), max_grad_norm, weights)
        views = self.views(total)
        run_tapped(self._layers, losses, len(weights), lambda index, part: part.add_to(views[index], factors))

    def _parts(self, losses: Losses, batch_size: int) -> list[list[Part]]:
        gradients: list[list[Part]] = [[] for _ in self.parameters]
        run_tapped(
            self._layers, losses, batch_size, lambda index, part: gradients[index].append(_smaller(part))
        )
        return gradients


class _SquareSum:
    """Squared norms, summed up as the parts come by. Those of tied weights wait for each other."""

    def __init__(self, tied: set[int]) -> None:
        self._waiting: dict[int, list[Part]] = {index: [] for index in tied}
        self._squares: dict[int, Tensor] = {}

    def take(self, index: int, part: Part) -> None:
        if index in self._waiting:
            self._waiting[index].append(part)
        elif index in self._squares:
            raise UnsupportedError("a layer is used twice in one pass, which is not covered: freeze it")
        else:
            self._squares[index] = squared_norms([_smaller(part)])

    def total(self) -> Tensor:
        tied = [squared_norms(parts) for parts in self._waiting.values()]
        return torch.stack([*self._squares.values(), *tied]).sum(0)


def _smaller(part: Part) -> Part:
    """The form of a part that takes less memory until the norms are known."""
    return Dense(part.dense()) if isinstance(part, OuterSum) and part.is_smaller_dense else part
