"""Kopf calls in here. Nothing else imports Kopf.

Kopf watches our kinds and hands each event to the object's daemon. Its own daemons and handlers are not used:
they would put a finalizer on a tenant's FederatedClient, and forget the clean-up of an object that was
deleted while the operator was away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from tributary_operator.daemons import Daemons
from tributary_operator.kinds import OURS, Kind


def registry(
    daemons: Daemons, watch_timeout_seconds: int, started: Callable[[], None]
) -> kopf.OperatorRegistry:
    """The table of contents: log-in, settings, and one event handler per kind.

    `started` is called once Kopf has set itself up, signal handlers included, before it watches anything.
    """
    table = kopf.OperatorRegistry()

    @kopf.on.login(registry=table)
    def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.startup(registry=table)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False  # events are ours alone: on transitions, nothing else
        settings.scanning.disabled = True  # watching CRDs would need rights that we do not want
        settings.watching.server_timeout = watch_timeout_seconds
        settings.peering.standalone = True
        started()

    for kind in OURS:
        _follow(table, kind, daemons)
    return table


def _follow(table: kopf.OperatorRegistry, kind: Kind, daemons: Daemons) -> None:
    group, version = kind.api_version.split("/")

    @kopf.on.event(group, version, kind.plural, registry=table, id=kind.plural)
    async def seen(event: kopf.RawEvent, **_: Any) -> None:
        # A list's items lack kind and apiVersion.
        raw = {**event["object"], "kind": kind.kind, "apiVersion": kind.api_version}
        daemons.seen(event["type"], raw)
