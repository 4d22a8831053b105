"""`python -m tributary_worker STAGE ...`: the one entry point of the worker's image.

A stage is imported only when it is asked for, so that `aggregate` never loads torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from tributary_worker.failures import run_stage

STAGES = ("train", "audit", "aggregate", "evaluate", "compress", "gate", "serve")
ENTRIES = {stage: f"tributary_worker.{stage}" for stage in STAGES} | {
    # A training pod may have several processes: this starts them, and each runs tributary_worker.train.
    "train": "tributary_worker.distributed",
}

PRIVATE_STAGES = frozenset({"train"})
"""Stages that see a client's text: nothing an unforeseen error says may leave them."""

USAGE_EXIT_CODE = 2


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in STAGES:
        print(f"usage: python -m tributary_worker {{{','.join(STAGES)}}} [options]", file=sys.stderr)
        return USAGE_EXIT_CODE
    stage, *rest = argv
    return run_stage(
        lambda args: import_module(ENTRIES[stage]).main(args),
        rest,
        is_private=stage in PRIVATE_STAGES,
    )


def _end(code: int) -> NoReturn:
    """End this process without the interpreter's shutdown.

    After a failure a process group's threads still run, and the C++ runtime may abort the process for it:
    the operator would see a signal where the contract has an exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        _end(main(sys.argv[1:]))
    except SystemExit as asked:  # SIGTERM, or a wrong option
        _end(asked.code if isinstance(asked.code, int) else 0)
