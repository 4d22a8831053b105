"""`python -m tributary_worker STAGE ...`: the one entry point of the worker's image.

A stage is imported only when it is asked for, so that `aggregate` never loads torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from tributary_worker.failures import run_stage

STAGES = ("train", "aggregate", "evaluate", "compress", "gate", "serve")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
