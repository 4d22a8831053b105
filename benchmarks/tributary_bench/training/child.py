"""One arm in a process of its own: a step for each line on stdin, its figures as a line of JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from tributary_bench.training.setting import ArmName, MethodName, Setting

KIB_PER_MIB = 1024
READY = "ready"


def main(setting_json: str, arm_name: str, threads: str) -> None:
    given = json.loads(setting_json)
    setting = Setting(**given | {"method": MethodName(given["method"])})
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # Libraries print where they like.
    with redirect_stdout(sys.stderr):
        import torch

        from tributary_bench.training.arms import arm

        torch.set_num_threads(int(threads))
        imported_mib = memory_mib("VmRSS")
        with arm(ArmName(arm_name), setting) as step:
            answers.write(json.dumps(READY) + "\n")
            for _ in sys.stdin:
                began, cpu_began = time.perf_counter(), time.process_time()
                step()
                figures = {
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - cpu_began,
                    "peak_mib": memory_mib("VmHWM") - imported_mib,
                }
                answers.write(json.dumps(figures) + "\n")
    # Without the farewell of the process group, which may wait.
    answers.flush()
    os._exit(0)


def memory_mib(name: str) -> float:
    """VmRSS (resident now) or VmHWM (at most so far) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / KIB_PER_MIB


if __name__ == "__main__":
    main(*sys.argv[1:])
