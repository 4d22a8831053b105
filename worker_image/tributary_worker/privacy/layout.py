"""Where each element of the trained weights ends up under ZeRO, found by measuring.

The noise of an element is keyed by its place in the flat vector of all trained parameters, but an optimizer
under ZeRO sees a padded partition of it. Instead of reading DeepSpeed's private tables (they change between
versions, and a wrong offset would silently repeat noise), the addresses themselves are sent through DeepSpeed
as gradients: whatever arrives at the optimizer says where it came from. This holds for any stage, padding,
bucketing and order of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from tributary_worker.privacy.errors import PrivacyError

DIGIT_BASE = 4096
"""Addresses are sent digit by digit. Small whole numbers survive float32, and even division by the world
size."""

DIGIT_TOLERANCE = 0.1
PADDING = 0
"""An element that receives address 0 is padding: addresses start at 1."""


@dataclass(frozen=True, slots=True)
class Run:
    """`length` consecutive elements: from `local` in the optimizer's flat view, from `offset` in the whole
    vector."""

    local: int
    offset: int
    length: int


Probe = Callable[[Tensor], Tensor]
"""Hands a flat gradient (numel,) to DeepSpeed, which averages it over ranks, and gives what the inner
optimizer got."""


def measure_layout(numel: int, probe: Probe, device: torch.device) -> list[Run]:
    """The runs of elements that this rank's optimizer owns. Every element must have the same number of
    owners, >= 1."""
    addresses: Tensor | None = None
    for position in range(_digits(numel)):
        digits = _round(probe(_digit_gradient(numel, position, device))).mul_(DIGIT_BASE**position)
        addresses = digits if addresses is None else addresses.add_(digits)
    if addresses is None or bool((addresses < 0).any() or (addresses > numel).any()):
        raise PrivacyError("DeepSpeed handed the optimizer a gradient that no trained parameter has")
    runs = _runs(addresses)
    _check_ownership(runs, numel, device)
    return runs


def _digits(numel: int) -> int:
    count = 1
    while DIGIT_BASE**count <= numel:
        count += 1
    return count


def _digit_gradient(numel: int, position: int, device: torch.device) -> Tensor:
    """Digit `position` of each element's address."""
    addresses = torch.arange(1, numel + 1, dtype=torch.int64, device=device)
    addresses.div_(DIGIT_BASE**position, rounding_mode="floor")
    return addresses.remainder_(DIGIT_BASE).to(torch.float32)


def _round(received: Tensor) -> Tensor:
    received = received.cpu()
    whole = received.round()
    if not bool((received.sub_(whole).abs_() < DIGIT_TOLERANCE).all()):
        raise PrivacyError(
            "DeepSpeed changed the gradient on its way to the optimizer (scaled, clipped or rounded)"
        )
    return whole.to(torch.int64)


def _check_ownership(runs: Sequence[Run], numel: int, device: torch.device) -> None:
    owners = torch.zeros(numel, dtype=torch.int32, device=device)
    for run in runs:
        owners[run.offset : run.offset + run.length] += 1
    if dist.is_initialized():
        dist.all_reduce(owners)
    fewest, most = int(owners.min()), int(owners.max())
    if fewest < 1 or fewest != most:
        raise PrivacyError(
            f"each trained element needs equally many owners, found between {fewest} and {most}"
        )


def _runs(addresses: Tensor) -> list[Run]:
    """Maximal runs in which place and address go up together."""
    shifts = addresses - torch.arange(len(addresses))
    shifts[addresses == PADDING] = torch.iinfo(torch.int64).max
    breaks = torch.nonzero(shifts[1:] != shifts[:-1]).flatten() + 1
    bounds = [0, *breaks.tolist(), len(addresses)]
    return [
        Run(a, int(addresses[a]) - 1, b - a) for a, b in pairwise(bounds) if a < b and addresses[a] != PADDING
    ]


def owned_elements(runs: Sequence[Run]) -> int:
    return sum(run.length for run in runs)
