"""The kinds that have a daemon."""

from __future__ import annotations

from tributary_operator.clients.reconciler import ClientReconciler
from tributary_operator.daemons import Daemons
from tributary_operator.kinds import CLIENT
from tributary_operator.reconciler import Reconciler, World
from tributary_operator.releases.reconciler import ReleaseReconciler
from tributary_operator.rounds.reconciler import RoundReconciler


def reconcilers(world: World, daemons: Daemons) -> list[Reconciler]:
    return [
        ClientReconciler(world, lambda: daemons.all(CLIENT)),
        RoundReconciler(world),
        ReleaseReconciler(world),
    ]
