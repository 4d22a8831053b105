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
    addresses = torch.zeros(0, dtype=torch.int64)
    for position in range(_digits(numel)):
        received = _round(probe(_digit_gradient(numel, position, device)))
        addresses = received * DIGIT_BASE**position + (addresses if position else 0)
    if bool((addresses < 0).any() or (addresses > numel).any()):
        raise PrivacyError("DeepSpeed handed the optimizer a gradient that no trained parameter has")
    _check_ownership(addresses, numel, device)
    return _runs(addresses)


def _digits(numel: int) -> int:
    count = 1
    while DIGIT_BASE**count <= numel:
        count += 1
    return count


def _digit_gradient(numel: int, position: int, device: torch.device) -> Tensor:
    """Digit `position` of each element's address. All ranks send it, so the average is the digit itself."""
    addresses = torch.arange(1, numel + 1, dtype=torch.int64, device=device)
    return (addresses // DIGIT_BASE**position % DIGIT_BASE).to(torch.float32)


def _round(received: Tensor) -> Tensor:
    received = received.to("cpu", torch.float64)
    whole = received.round()
    if not bool(((received - whole).abs() < DIGIT_TOLERANCE).all()):
        raise PrivacyError(
            "DeepSpeed changed the gradient on its way to the optimizer (scaled, clipped or rounded)"
        )
    return whole.to(torch.int64)


def _check_ownership(addresses: Tensor, numel: int, device: torch.device) -> None:
    owners = torch.bincount(addresses, minlength=numel + 1)[1:].to(torch.int32).to(device)
    if dist.is_initialized():
        dist.all_reduce(owners)
    fewest, most = int(owners.min()), int(owners.max())
    if fewest < 1 or fewest != most:
        raise PrivacyError(
            f"each trained element needs equally many owners, found between {fewest} and {most}"
        )


def _runs(addresses: Tensor) -> list[Run]:
    owned = torch.nonzero(addresses != PADDING).flatten()
    if not len(owned):
        return []
    offsets = addresses[owned] - 1
    breaks = torch.nonzero((owned.diff() != 1) | (offsets.diff() != 1)).flatten() + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), breaks])
    stops = torch.cat([breaks, torch.tensor([len(owned)])])
    return [Run(int(owned[a]), int(offsets[a]), int(b - a)) for a, b in zip(starts, stops, strict=True)]


def owned_elements(runs: Sequence[Run]) -> int:
    return sum(run.length for run in runs)
