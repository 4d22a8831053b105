"""Show what takes long: a live line per step on a terminal, a line per step and a heartbeat in a plain log.

Steps may overlap in time, from several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

HEARTBEAT_SECONDS = 30.0

console = Console(stderr=True, highlight=False)


def clock(seconds: float) -> str:
    """`seconds` as people say it: `7 s`, `2 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def note(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


class _LiveSteps:
    """The one live display of this process, shown while any step runs."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def show(self, title: str) -> Iterator[None]:
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._progress.start()
        task = self._progress.add_task(title, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(task)
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._progress.stop()


@contextmanager
def _heartbeat(title: str) -> Iterator[None]:
    """Say every now and then that a step still runs, where there is no live display."""
    began, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            note(f"  {title}: {clock(time.monotonic() - began)} so far")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


_live = _LiveSteps()


@contextmanager
def step(title: str) -> Iterator[None]:
    """Tell that `title` began, goes on and ended, with the time it took; a failure is told as such."""
    began, verdict = time.monotonic(), "failed"
    try:
        with _live.show(title) if console.is_terminal else _heartbeat(title):
            yield
        verdict = "done"
    finally:
        note(f"  {title}: {verdict}, {clock(time.monotonic() - began)}")
