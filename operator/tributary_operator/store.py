"""Create-only records in the object store, read and written in threads: boto3 would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pydantic import ValidationError

from tributary_api.base import ApiModel
from tributary_operator import metrics
from tributary_store.errors import ObjectMissing
from tributary_store.objectstore import ObjectStore

M = TypeVar("M", bound=ApiModel)
P = ParamSpec("P")
R = TypeVar("R")

CACHED_RECORDS_MAX = 20_000


class RecordUnreadable(Exception):
    """An object that should be one of our records is not; the text says which."""


class Records:
    """Records never change once they exist, so each is fetched once."""

    def __init__(self, store: ObjectStore, threads: int) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store")
        self._cache: dict[str, ApiModel] = {}

    async def in_thread(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

    async def find(self, uri: str, model: type[M]) -> M | None:
        """The record, or None while there is none.

        Raises:
            StoreError: the store does not answer or refuses.
            RecordUnreadable: the object is something else.
        """
        known = self._cache.get(uri)
        if isinstance(known, model):
            return known
        metrics.STORE_REQUESTS.labels("get").inc()
        try:
            data = await self.in_thread(self.store.get, uri)
        except ObjectMissing:
            return None
        return self._remember(uri, _parsed(uri, data, model))

    async def names(self, prefix_uri: str) -> list[str]:
        """URIs of the objects below the prefix, in order."""
        metrics.STORE_REQUESTS.labels("list").inc()
        return await self.in_thread(lambda: [info.uri for info in self.store.list(prefix_uri)])

    async def put(self, uri: str, body: ApiModel) -> bool:
        """Create the record. True: by this call. False: it was there already, with the same bytes.

        Raises:
            ObjectExists: it is there with other bytes.
        """
        metrics.STORE_REQUESTS.labels("put").inc()
        created = await self.in_thread(self.store.put_new, uri, body.canonical_json(), retain=True)
        self._remember(uri, body)
        return created

    def _remember(self, uri: str, body: M) -> M:
        if len(self._cache) >= CACHED_RECORDS_MAX:
            self._cache.pop(next(iter(self._cache)))
        self._cache[uri] = body
        return body

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _parsed(uri: str, data: bytes, model: type[M]) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise RecordUnreadable(f"{uri} is no {model.__name__} ({error.error_count()} errors)") from error
