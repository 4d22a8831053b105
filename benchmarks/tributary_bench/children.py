"""A program as a child process: how long it took, and how much memory it held at most.

Between this process and the measured one stands a small one, which is this file run by itself: the kernel
counts the memory that the starting process ever held as its child's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OUT_OF_MEMORY_CODE = 70
"""With this a child of ours ends when its memory limit was met."""
OUT_OF_MEMORY_CODES = (OUT_OF_MEMORY_CODE, -signal.SIGKILL)
"""The kernel kills what the machine has no memory for, although its limit allows it."""
KIB_PER_MIB = 1024
SHOWN_CHARACTERS = 3000


@dataclass(frozen=True)
class Measured:
    """One run of a child: wall-clock seconds, peak of the resident memory in MiB, exit code."""

    seconds: float
    peak_rss_mib: float
    code: int


def run_measured(argv: Sequence[str | Path], env: Mapping[str, str], log: Path) -> Measured:
    """Run a program to its end, its output in `log`."""
    command = [sys.executable, "-S", __file__, str(log), *map(str, argv)]
    done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, check=True)
    return Measured(**json.loads(done.stdout))


def must_succeed(done: Measured, what: str, log: Path) -> Measured:
    """Leave with the end of the child's output if it failed."""
    if done.code != 0:
        shown = log.read_text(errors="replace")[-SHOWN_CHARACTERS:]
        sys.exit(f"{what} ended with code {done.code}:\n{shown}")
    return done


def _run(log: str, argv: Sequence[str]) -> Measured:
    with Path(log).open("wb") as output:
        began = time.perf_counter()
        child = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    return Measured(seconds, usage.ru_maxrss / KIB_PER_MIB, child.returncode)


if __name__ == "__main__":
    print(json.dumps(asdict(_run(sys.argv[1], sys.argv[2:]))))
