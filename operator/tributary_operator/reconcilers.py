"""The kinds that have a daemon."""

from __future__ import annotations

from tributary_operator.daemons import Daemons
from tributary_operator.reconciler import Reconciler, World


def reconcilers(world: World, daemons: Daemons) -> list[Reconciler]:  # noqa: ARG001 - filled in by the kinds
    return []
