"""One of several ranks: runs checks on engines and says what each found. `privacy_proofs.ranks` starts it."""

from __future__ import annotations

import json
import os
import sys

import torch
from privacy_proofs.ranks import CASES, Case

from tributary_worker import distributed
from tributary_worker.privacy.errors import PrivacyError


def outcome(case: Case) -> str:
    """What the check has against the engine; empty for nothing. The same on all ranks, by what checks
    compare."""
    try:
        case.check(case.make)
    except (AssertionError, PrivacyError) as found:
        return f"{type(found).__name__}: {found}"
    return ""


def main() -> None:
    torch.set_num_threads(1)
    with distributed.process_group(distributed.RankLayout.from_environment(os.environ)):
        found = {name: outcome(CASES[name]) for name in CASES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # As in a pod: the interpreter's shutdown may meet threads of the process group.
    os._exit(0)
