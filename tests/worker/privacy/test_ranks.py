"""Two processes compute what one does: the clipped sum, the noise, the weights, in every ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import private_engines as engines
import pytest
import torch

from tributary_worker import distributed

CASES = [(0, 3), (1, 3), (2, 1), (2, 3), (2, 8), (3, 3)]
PROGRAM = Path(__file__).parent / "rank_program.py"


@pytest.fixture(scope="module")
def pair():
    """What each of two ranks says."""
    port = distributed.free_port()
    layouts = [distributed.RankLayout(rank, rank, 2, 2, distributed.LOOPBACK, port) for rank in range(2)]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), json.dumps(CASES)]
    ranks = [
        subprocess.Popen(command, env=os.environ | path | layout.environment, stdout=subprocess.PIPE)
        for layout in layouts
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def single(alone):
    private = engines.engine(engines.adapted_gpt2(), zero_stage=0)
    gradient = engines.received(private, engines.data_set(), 0)
    for step in range(2):
        private.train_step(step, lambda indices: engines.load(engines.data_set(), list(indices)))
    return gradient, engines.weights(private)


@pytest.mark.parametrize(("stage", "micro_batch_size"), CASES)
def test_two_ranks_are_handed_what_one_is(pair, single, stage, micro_batch_size):
    gradient, weights = single
    for said in pair:
        result = said["results"][f"{stage}/{micro_batch_size}"]
        assert torch.allclose(torch.tensor(result["gradient"]), gradient, rtol=1e-5, atol=1e-6)
        assert torch.allclose(torch.tensor(result["weights"]), weights, rtol=1e-4, atol=1e-5)
        assert result["planted"] == pytest.approx(1.0, abs=1e-3)


def test_each_element_has_one_owner_when_the_optimizer_is_partitioned(pair, single):
    numel = len(single[0])
    assert numel % 2 == 1, "an even number would need no padding"
    for stage, micro_batch_size in CASES:
        owned = [said["results"][f"{stage}/{micro_batch_size}"]["owned"] for said in pair]
        assert sum(owned) == (2 * numel if stage == 0 else numel)


def test_a_sum_that_became_a_mean_is_found(pair):
    assert all(said["averaging_is_found"] for said in pair)
