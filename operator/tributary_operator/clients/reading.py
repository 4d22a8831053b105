"""FederatedClients as the API server keeps them. One that an older version let in may not be valid now."""

from __future__ import annotations

from collections.abc import Iterable

import structlog
from pydantic import ValidationError

from tributary_api.client import FederatedClient
from tributary_operator.api import JsonObject

log = structlog.get_logger()


def readable(items: Iterable[JsonObject]) -> list[FederatedClient]:
    """The valid ones. Another says itself, by its own daemon, what is wrong with it."""
    found = [parsed(item) for item in items]
    return [client for client in found if isinstance(client, FederatedClient)]


def parsed(item: JsonObject) -> FederatedClient | ValidationError:
    """The client, or what is wrong with it."""
    try:
        return FederatedClient.model_validate(item)
    except ValidationError as error:
        about = item["metadata"]
        log.warning("client skipped", client=f"{about['namespace']}/{about['name']}", error=str(error))
        return error
