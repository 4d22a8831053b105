"""Run another program and say what it said when it fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 25


class CommandError(RuntimeError):
    """A program ended with an error; the message carries the end of what it printed."""


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout_seconds: float | None = None,
) -> str:
    """Standard output of `argv`. `env` is added to this process's environment.

    Raises CommandError when the program fails, is missing or takes too long.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError as error:
        raise CommandError(f"{words[0]} is not installed: `python -m tributary_dev doctor`") from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"`{' '.join(words[:4])}` took longer than {timeout_seconds} s") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-TAIL_LINES:])
        raise CommandError(f"`{' '.join(words[:6])}` failed with {done.returncode}:\n{tail}")
    return done.stdout


def succeeds(argv: Sequence[str | Path], *, timeout_seconds: float | None = None) -> bool:
    try:
        run(argv, timeout_seconds=timeout_seconds)
    except CommandError:
        return False
    return True
