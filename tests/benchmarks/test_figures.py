"""What the benchmarks measure and how they reckon, without running one."""

import json
import subprocess
import sys

import pytest

from tributary_bench import children
from tributary_bench.aggregation.cases import ALL, CASES, LARGE, MEDIUM, SMALL, chosen
from tributary_bench.report import merged
from tributary_bench.training.__main__ import Figures, ratios
from tributary_bench.training.setting import ArmName, padding_ratio


def test_the_models_have_the_sizes_of_gpt2():
    # The published numbers of parameters of GPT-2 and GPT-2 medium.
    assert (SMALL.parameters, MEDIUM.parameters) == (124_439_808, 354_823_168)
    assert 5.0e9 < 4 * LARGE.parameters < 5.1e9


def test_all_stands_for_every_case_of_the_table_and_an_unknown_one_is_named():
    cases = chosen("all")
    assert cases == [case for name in ALL for case in CASES[name]]
    assert chosen("5gb, 124m") == [*CASES["5gb"], *CASES["124m"]]
    assert [case.clients for case in chosen("5gb-12")] == [12]
    for unknown in ("6gb", "5gb-5", ""):
        with pytest.raises(ValueError, match=unknown or "choose"):
            chosen(unknown)


def test_new_rows_replace_those_of_the_same_case():
    old = [{"clients": 4, "seconds": 1.0}, {"clients": 8, "seconds": 2.0}]
    new = [{"clients": 16, "seconds": 9.0}, {"clients": 4, "seconds": 3.0}]
    assert merged(old, new, ("clients",)) == [new[1], old[1], new[0]]


def test_ratios_are_against_the_better_of_opacus_in_each_respect():
    figures = {
        ArmName.PLAIN: Figures(2.0, 2.0, 100.0),
        ArmName.OURS: Figures(3.0, 3.0, 150.0),
        ArmName.OPACUS_HOOKS: Figures(4.0, 4.0, 300.0),
        ArmName.OPACUS_GHOST: Figures(6.0, 6.0, 120.0),
    }
    found = ratios(figures)
    assert (found["time_ratio"], found["memory_ratio"]) == (1.5, 1.5)
    assert (found["opacus_time_ratio"], found["opacus_memory_ratio"]) == (0.75, 1.25)


def test_padding_is_the_slots_of_the_cap_over_the_expected_batch():
    # N = 10 000, qN = 128: cap = ceil(128 + 5 * sqrt(128 * 0.9872)) = 185, in micro-batches of 8: 192 slots.
    assert padding_ratio(8) == 192 / 128


def test_the_peak_memory_is_the_childs_and_not_that_of_whoever_started_it(tmp_path):
    """This process grows far beyond the child before it starts it."""
    program = (
        "import sys; from pathlib import Path; from tributary_bench.children import run_measured;"
        "big = bytearray(300 << 20); big[::4096] = b'x' * len(big[::4096]);"
        "child = 'x = bytearray(64 << 20); x[::4096] = bytes(16384)';"
        "done = run_measured([sys.executable, '-S', '-c', child], {}, Path(sys.argv[1]));"
        "print(done.code, done.peak_rss_mib)"
    )
    argv = [sys.executable, "-c", program, str(tmp_path / "log")]
    source = str(children.__file__).removesuffix("tributary_bench/children.py")
    done = subprocess.run(argv, env={"PYTHONPATH": source}, capture_output=True, text=True, check=True)
    code, peak_mib = json.loads("[" + done.stdout.strip().replace(" ", ",") + "]")
    assert code == 0
    assert 64 < peak_mib < 150
