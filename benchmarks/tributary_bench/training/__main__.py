"""`make bench-dp`: time and memory of a private step against two others, a table, and out/bench/dp.json."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tributary_bench.children import SHOWN_CHARACTERS
from tributary_bench.machine import machine
from tributary_bench.report import print_table, progress, read_json, write_json
from tributary_bench.training.setting import ARMS, ArmName, MethodName, Setting, padding_ratio

CHILD = "tributary_bench.training.child"
VERSIONED = ("torch", "deepspeed", "transformers", "opacus")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of an arm: medians over the timed steps, and peak memory above that of the imported libraries."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


class Arm:
    """A running child."""

    def __init__(self, name: ArmName, setting: Setting, threads: int, log: Path) -> None:
        self._log = log
        self.name = name
        argv = [sys.executable, "-m", CHILD, json.dumps(asdict(setting)), name, str(threads)]
        self._child = subprocess.Popen(
            argv,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
        )

    def wait_until_ready(self) -> None:
        self._answer()

    def step(self) -> Mapping[str, float]:
        assert self._child.stdin
        self._child.stdin.write("step\n")
        self._child.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self._child.kill()
        self._child.wait()

    def _answer(self) -> Any:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            sys.exit(f"{self.name} died:\n{self._log.read_text(errors='replace')[-SHOWN_CHARACTERS:]}")
        return json.loads(line)


def main(argv: Sequence[str]) -> None:
    options = _options(argv)
    report: dict[str, Any] = {}
    for method in options.methods:
        setting = Setting(method, micro_batches=options.micro_batches, layers=options.layers)
        figures = measured(setting, options.steps, options.threads)
        report[method] = ratios(figures) | {"arms": {name: asdict(f) for name, f in figures.items()}}
        report[method] |= {"setting": asdict(setting), "threads": options.threads}
        print_method(setting, figures, report[method])
    path = write_json("dp", read_json("dp") | report | {"machine": machine(*VERSIONED)})
    progress.print(f"written to {path}")


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-dp")
    parser.add_argument("--methods", nargs="+", type=MethodName, default=list(MethodName))
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm, after one to warm up")
    parser.add_argument("--micro-batches", type=int, default=4, help="of 8 records, in each step")
    parser.add_argument("--layers", type=int, default=Setting.layers, help="fewer for a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def measured(setting: Setting, steps: int, threads: int) -> dict[ArmName, Figures]:
    """The arms take turns, step by step: what else this machine does meets all of them alike."""
    with running(setting, threads) as arms:
        for arm in arms:
            progress.print(f"  {setting.method}, {arm.name}: warmed up in {arm.step()['seconds']:.1f} s")
        taken: dict[ArmName, list[Mapping[str, float]]] = {arm.name: [] for arm in arms}
        for number in range(steps):
            for arm in arms:
                taken[arm.name].append(arm.step())
                progress.print(
                    f"  {setting.method}, {arm.name}, {number}: {taken[arm.name][-1]['seconds']:.1f} s"
                )
    return {name: summarised(runs) for name, runs in taken.items()}


@contextmanager
def running(setting: Setting, threads: int) -> Iterator[list[Arm]]:
    """All arms of a method, each in its process, waiting."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as ends:
        arms = []
        for name in ARMS[setting.method]:
            arms.append(Arm(name, setting, threads, Path(directory) / name))
            ends.callback(arms[-1].end)
        for arm in arms:
            arm.wait_until_ready()
        yield arms


def summarised(runs: Sequence[Mapping[str, float]]) -> Figures:
    return Figures(
        seconds=round(median(run["seconds"] for run in runs), 3),
        cpu_seconds=round(median(run["cpu_seconds"] for run in runs), 3),
        peak_mib=round(max(run["peak_mib"] for run in runs), 1),
    )


def ratios(figures: Mapping[ArmName, Figures]) -> dict[str, float]:
    """Ours over the plain training, and over the faster and the smaller of Opacus's ways."""
    ours, plain = figures[ArmName.OURS], figures[ArmName.PLAIN]
    opacus = [figures[name] for name in figures if name not in (ArmName.OURS, ArmName.PLAIN)]
    return {
        "time_ratio": round(ours.seconds / plain.seconds, 3),
        "memory_ratio": round(ours.peak_mib / plain.peak_mib, 3),
        "opacus_time_ratio": round(ours.seconds / min(f.seconds for f in opacus), 3),
        "opacus_memory_ratio": round(ours.peak_mib / min(f.peak_mib for f in opacus), 3),
        "padding_ratio": round(padding_ratio(Setting.micro_batch_size), 3),
    }


def print_method(setting: Setting, figures: Mapping[ArmName, Figures], report: Mapping[str, Any]) -> None:
    plain = figures[ArmName.PLAIN]
    rows = [
        (
            name,
            f"{f.seconds:.2f} s",
            f"{f.seconds / plain.seconds:.2f}",
            f"{f.cpu_seconds / plain.cpu_seconds:.2f}",
            f"{f.peak_mib:.0f} MiB",
            f"{f.peak_mib / plain.peak_mib:.2f}",
        )
        for name, f in figures.items()
    ]
    title = f"{setting.method}: a step of {setting.records} records of {setting.length} tokens"
    print_table(title, ("", "time", "over plain", "CPU over plain", "peak memory", "over plain"), rows)
    progress.print(
        f"ours over Opacus: time {report['opacus_time_ratio']}, memory {report['opacus_memory_ratio']}; "
        f"padding of a Poisson batch: {report['padding_ratio']}"
    )


if __name__ == "__main__":
    # So that files and children go when it is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main(sys.argv[1:])
