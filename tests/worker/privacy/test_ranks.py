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

CASES = [
    *(("lora", stage, micro) for stage, micro in [(0, 3), (1, 3), (2, 1), (2, 3), (2, 8), (3, 3)]),
    *(("full", stage, 3) for stage in range(4)),
]
MATRIX = [(method, stage, micro) for method in engines.MODELS for stage in range(4) for micro in (1, 3, 8)]
"""Method, ZeRO stage, micro-batch size."""
PROGRAM = Path(__file__).parent / "rank_program.py"


def on_two_ranks(cases):
    """What each of two ranks says."""
    port = distributed.free_port()
    layouts = [distributed.RankLayout(rank, rank, 2, 2, distributed.LOOPBACK, port) for rank in range(2)]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), json.dumps(cases)]
    ranks = [
        subprocess.Popen(command, env=os.environ | path | layout.environment, stdout=subprocess.PIPE)
        for layout in layouts
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def pair():
    return on_two_ranks(CASES)


@pytest.fixture(scope="module")
def single(alone):
    """(gradient, weights) of one rank, by method."""
    return {
        method: on_one_rank(engines.engine(make(), zero_stage=0)) for method, make in engines.MODELS.items()
    }


def on_one_rank(private):
    gradient = engines.received(private, engines.data_set(), 0)
    for step in range(2):
        private.train_step(step, lambda indices: engines.load(engines.data_set(), list(indices)))
    return gradient, engines.weights(private)


def check(result, single):
    gradient, weights = single
    assert torch.allclose(torch.tensor(result["gradient"]), gradient, rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.tensor(result["weights"]), weights, rtol=1e-4, atol=1e-5)
    assert result["planted"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_are_handed_what_one_is(pair, single, case):
    for said in pair:
        check(said["results"][CASES.index(case)], single[case[0]])


@pytest.mark.privacy_matrix
def test_two_ranks_are_handed_what_one_is_whatever_the_stage_and_micro_batch(single):
    for said in on_two_ranks(MATRIX):
        for case, result in zip(MATRIX, said["results"], strict=True):
            check(result, single[case[0]])


def test_each_element_has_one_owner_when_the_optimizer_is_partitioned(pair, single):
    assert len(single["lora"][0]) % 2 == 1, "an even number would need no padding"
    for i, (method, stage, _) in enumerate(CASES):
        numel = len(single[method][0])
        owned = [said["results"][i]["owned"] for said in pair]
        assert sum(owned) == (2 * numel if stage == 0 else numel)


def test_a_sum_that_became_a_mean_is_found(pair):
    assert all(said["averaging_is_found"] for said in pair)
