"""Generations under way: a few at a time in threads of their own, a bounded number waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tributary_worker.compression.loading import LoadedModel
from tributary_worker.serving.generation import Piece, Sampling, generate

_Item = Piece | Exception | None
"""What a thread hands over: a piece, what went wrong, or the end."""


class BusyError(Exception):
    """As many generations as allowed are open."""


class Generations:
    """Runs generations beside the event loop: `parallel` at a time, `open_max` with those that wait."""

    def __init__(self, loaded: LoadedModel, *, parallel: int, open_max: int) -> None:
        self._loaded = loaded
        self._open_max = open_max
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="generation")
        self.open = 0

    def start(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The pieces of a completion; closing their generator ends the computation. Raises BusyError at once.

        Must be called on the event loop. The place is free when the computation has ended, taken or not.
        """
        if self.open >= self._open_max:
            raise BusyError
        loop, items, cancelled = asyncio.get_running_loop(), asyncio.Queue[_Item](), threading.Event()

        def hand_over(item: _Item) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        self.open += 1
        work = loop.run_in_executor(self._pool, self._work, prompt, sampling, cancelled.is_set, hand_over)
        work.add_done_callback(self._ended)
        return _taken(items, cancelled)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        is_cancelled: Callable[[], bool],
        hand_over: Callable[[_Item], None],
    ) -> None:
        try:
            if not is_cancelled():
                for piece in generate(self._loaded, prompt, sampling, is_cancelled):
                    hand_over(piece)
        except Exception as error:  # it belongs to the request, which is waiting on the event loop
            hand_over(error)
        hand_over(None)

    def _ended(self, _work: object) -> None:
        self.open -= 1


async def _taken(items: asyncio.Queue[_Item], cancelled: threading.Event) -> AsyncGenerator[Piece, None]:
    try:
        while (item := await items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        cancelled.set()
