"""Checks on two ranks: what only goes wrong where there are several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import private_engines as engines
from privacy_proofs import engine_checks, engine_defects

from tributary_worker import distributed
from tributary_worker.privacy.noise import GaussianNoise

RANKS = 2
SECONDS_MAX = 500


@dataclass(frozen=True)
class Case:
    make: Callable[..., Any]
    check: Callable[[Any], object]


BOOK, NOISE = engine_checks.check_step_by_the_book, engine_checks.check_noise_at_the_optimizer
HONEST = {
    "step_by_the_book": Case(engines.engine, BOOK),
    "noise_at_the_optimizer": Case(engines.engine, NOISE),
}
DEFECTIVE = {
    "sigma over the root of the number of ranks": Case(
        engine_defects.with_noise(GaussianNoise, engine_defects.share_of_a_rank), NOISE
    ),
    "noise keyed by the place in a rank's own part": Case(engine_defects.keyed_by_local_place, NOISE),
    "mean over ranks instead of their sum": Case(engine_defects.of_kind(engine_defects.MeanOverRanks), BOOK),
}
CASES = HONEST | DEFECTIVE


def found_on_ranks() -> list[dict[str, str]]:
    """What each rank found in each case."""
    port = distributed.free_port()
    layouts = [distributed.RankLayout(r, r, RANKS, RANKS, distributed.LOOPBACK, port) for r in range(RANKS)]
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "privacy_proofs.rank_program"]
    ranks = [
        subprocess.Popen(command, env=inherited | layout.environment, stdout=subprocess.PIPE)
        for layout in layouts
    ]
    outputs = [rank.communicate(timeout=SECONDS_MAX)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS
    return [json.loads(output.splitlines()[-1]) for output in outputs]
