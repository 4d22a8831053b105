"""Show what takes long: a live line on a terminal, a line per step and a heartbeat in a plain log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

HEARTBEAT_SECONDS = 30.0

console = Console(stderr=True, highlight=False)


def clock(seconds: float) -> str:
    """`seconds` as people say it: `7 s`, `2 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def note(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Tell that `title` began, goes on and ended, with the time it took; a failure is told as such."""
    began = time.monotonic()
    ended = threading.Event()
    ticker = threading.Thread(target=_tick, args=(title, began, ended), daemon=True)
    ticker.start()
    verdict = "failed"
    try:
        yield
        verdict = "done"
    finally:
        ended.set()
        ticker.join()
        note(f"  {title}: {verdict}, {clock(time.monotonic() - began)}")


def _tick(title: str, began: float, ended: threading.Event) -> None:
    if console.is_terminal:
        with console.status(title) as status:
            while not ended.wait(1.0):
                status.update(f"{title} · {clock(time.monotonic() - began)}")
        return
    while not ended.wait(HEARTBEAT_SECONDS):
        note(f"  {title}: {clock(time.monotonic() - began)} so far")
