"""How far a pod is: a line in its log every few seconds, and a mark in the store at every tenth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tributary_api.records import ProgressMark
from tributary_store.errors import ObjectExists
from tributary_worker.task_input import PROGRESS_INTERVAL_SECONDS

PERCENT_OF_MARK = 10
"""At most ten small objects of a pod: nobody may delete them."""
BYTES_OF_MB = 1e6


class Progress:
    """Counts bytes that were read, from several threads."""

    def __init__(self, log: Any, mark: Callable[[int, ProgressMark], None]) -> None:
        """`mark(percent, mark)` writes a mark down."""
        self._log, self._mark, self._total = log, mark, 1
        self._lock = threading.Lock()
        self._began = self._logged = time.monotonic()
        self._done = self._marked = 0

    @property
    def bytes_done(self) -> int:
        return self._done

    def count(self, read_bytes: int) -> None:
        with self._lock:
            self._done += read_bytes
            if time.monotonic() - self._logged >= PROGRESS_INTERVAL_SECONDS:
                self._logged = time.monotonic()
                self._log.info(
                    "progress", percent=self._percent, mb_per_second=self._per_second / BYTES_OF_MB
                )

    def expect(self, total_bytes: int) -> None:
        """What this pod has to read."""
        self._total = max(1, total_bytes)

    def write_mark(self) -> None:
        """Write down the tenth that was reached, if it is a new one. Called by the thread that may wait."""
        percent = self._percent - self._percent % PERCENT_OF_MARK
        if percent <= self._marked:
            return
        self._marked = percent
        mark = ProgressMark(
            bytes_done=self._done, bytes_total=self._total, bytes_per_second=int(self._per_second)
        )
        try:
            self._mark(percent, mark)
        except ObjectExists:
            self._log.info("an earlier attempt came as far", percent=percent)

    @property
    def _percent(self) -> int:
        return min(100, 100 * self._done // self._total)

    @property
    def _per_second(self) -> float:
        return self._done / max(1e-3, time.monotonic() - self._began)
