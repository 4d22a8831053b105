"""`make bench-aggregate`: every case's arms in turn, a table, and out/bench/aggregate.json."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from s3_servers import s3_server

from tributary_api.aggregation import DeltaEncoding
from tributary_bench.aggregation.arms import (
    Bench,
    bare_store,
    flower_fedavg,
    ours,
)
from tributary_bench.aggregation.cases import ALL, CASES, Case, ModelShape, chosen
from tributary_bench.aggregation.raw import OBJECT_BYTES_MAX
from tributary_bench.aggregation.rounds import prepared
from tributary_bench.children import OUT_OF_MEMORY_CODES, Measured
from tributary_bench.machine import GIB, machine
from tributary_bench.report import merged, print_table, progress, ratio, read_json, write_json
from tributary_dev.s3 import S3Server

DISK_SPARED_BYTES = 15 * GIB
BYTES_PER_PARAMETER = 4
NAME = "aggregate"
MIB_PER_GIB = 1024

Arm = Callable[[Bench], Measured]


@dataclass(slots=True)
class Result:
    """All runs of a case, by arm."""

    case: Case
    runs: dict[str, list[Measured]] = field(default_factory=dict)

    def add(self, arm: str, run: Measured) -> None:
        self.runs.setdefault(arm, []).append(run)

    def seconds(self, arm: str) -> float:
        return median(run.seconds for run in self.runs[arm])

    def peak(self, arm: str) -> float:
        """The highest of all runs, in MiB."""
        return max(run.peak_rss_mib for run in self.runs[arm])


def main(argv: Sequence[str]) -> None:
    options = _options(argv)
    cases = chosen(options.cases)
    if options.repeats:
        cases = [replace(case, repeats=options.repeats) for case in cases]
    results = []
    for result in measured(cases):
        results.append(result)
        # After each: a run of all cases takes long, and may be stopped.
        write_json(NAME, report(results))
    print_plain([result for result in results if result.case.is_plain])
    print_others([result for result in results if not result.case.is_plain])


def report(results: Sequence[Result]) -> dict[str, Any]:
    """These results and, of the cases that were not measured now, those of the run before."""
    plain = [plain_record(result) for result in results if result.case.is_plain]
    others = [other_record(result) for result in results if not result.case.is_plain]
    earlier = read_json(NAME)
    return {
        "cases": merged(earlier.get("cases", []), plain, ("parameters", "clients")),
        "strategies": merged(
            earlier.get("strategies", []), others, ("parameters", "clients", "strategy", "encoding")
        ),
        "machine": machine("boto3", "numpy"),
    }


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-aggregate")
    parser.add_argument(
        "--cases", default="all", help=f"all ({', '.join(ALL)}) or some of {', '.join(CASES)}"
    )
    parser.add_argument("--repeats", type=int, help="turns of the arms, instead of 1 to 3 by size")
    return parser.parse_args(argv)


def measured(cases: Sequence[Case]) -> Iterator[Result]:
    """The cases' results, model by model."""
    with scratch_directory() as directory, s3_server(directory) as server:
        for model, group in groupby(cases, key=lambda case: case.model):
            require_disk(model, directory)
            progress.print(f"preparing {model.name}: {model.parameters / 1e6:.0f} M parameters")
            yield from of_model(server, model, list(group), directory)


def of_model(server: S3Server, model: ModelShape, cases: Sequence[Case], directory: Path) -> Iterator[Result]:
    encodings = {DeltaEncoding.FLOAT32, *(case.encoding for case in cases)}
    with prepared(server, model, encodings, directory) as ready:
        for case in cases:
            yield of_case(Bench(case, ready, directory / "buckets", directory / "child.log"))


def of_case(bench: Bench) -> Result:
    """The arms take turns: what else this machine does meets all of them alike."""
    result = Result(bench.case)
    for _ in range(bench.case.repeats):
        for name, arm in arms_of(bench.case).items():
            run = bench.run(arm)
            result.add(name, run)
            progress.print(f"  {bench.case.label}: {name} {run.seconds:.1f} s, {run.peak_rss_mib:.0f} MiB")
    return result


def arms_of(case: Case) -> dict[str, Arm]:
    """Plain cases against other programs; a strategy or encoding against plain FedAvg, in the same turns."""
    if case.is_plain:
        return {"ours": ours, "flower": flower_fedavg, "raw": bare_store}
    return {"ours": ours, "fedavg": lambda bench: ours(bench.plain())}


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Removed in any case: it grows to several times the largest model."""
    directory = Path(tempfile.mkdtemp(prefix="tributary-bench-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def require_disk(model: ModelShape, directory: Path) -> None:
    """Base, deltas and result, and a shard of it that is put together from its parts."""
    model_bytes = BYTES_PER_PARAMETER * model.parameters
    shard_bytes = min(model_bytes, OBJECT_BYTES_MAX)
    needed = model_bytes * (2 + model.distinct_deltas) + shard_bytes + DISK_SPARED_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        sys.exit(
            f"{model.name} needs {needed / GIB:.0f} GiB free at {directory}, there are {free / GIB:.0f}: "
            "free some, set TMPDIR, or choose smaller CASES"
        )


def plain_record(result: Result) -> dict[str, Any]:
    flower = result.runs["flower"]
    is_out_of_memory = any(run.code in OUT_OF_MEMORY_CODES for run in flower)
    outcome = f"out of memory at {max(run.peak_rss_mib for run in flower) / MIB_PER_GIB:.1f} GiB"
    return {
        "clients": result.case.clients,
        "parameters": result.case.model.parameters,
        "seconds": round(result.seconds("ours"), 2),
        "peak_rss_mib": round(result.peak("ours")),
        "flower_seconds": None if is_out_of_memory else round(result.seconds("flower"), 2),
        "flower_peak_rss_mib": round(result.peak("flower")),
        "flower_outcome": outcome if is_out_of_memory else "ok",
        "raw_seconds": round(result.seconds("raw"), 2),
    }


def other_record(result: Result) -> dict[str, Any]:
    return {
        "clients": result.case.clients,
        "parameters": result.case.model.parameters,
        "strategy": result.case.strategy,
        "encoding": result.case.encoding,
        "seconds": round(result.seconds("ours"), 2),
        "peak_rss_mib": round(result.peak("ours")),
        "fedavg_seconds": round(result.seconds("fedavg"), 2),
    }


def print_plain(results: Sequence[Result]) -> None:
    columns = ("FedAvg", "ours", "MiB", "Flower", "MiB", "raw", "Flower/ours", "ours/raw")
    rows = []
    for result in results:
        record = plain_record(result)
        flower_seconds = record["flower_seconds"]
        rows.append(
            (
                f"{result.case.clients} × {result.case.model.name}",
                f"{record['seconds']:.1f} s",
                f"{record['peak_rss_mib']}",
                f"{flower_seconds:.1f} s" if flower_seconds else record["flower_outcome"],
                f"{record['flower_peak_rss_mib']}",
                f"{record['raw_seconds']:.1f} s",
                ratio(flower_seconds, record["seconds"]) if flower_seconds else "-",
                ratio(record["seconds"], record["raw_seconds"]),
            )
        )
    if rows:
        print_table("From deltas in S3 to the new model in S3", columns, rows)


def print_others(results: Sequence[Result]) -> None:
    columns = ("strategy, encoding", "ours", "MiB", "FedAvg of fp32", "ratio")
    rows = [
        (
            result.case.label,
            f"{result.seconds('ours'):.1f} s",
            f"{result.peak('ours'):.0f}",
            f"{result.seconds('fedavg'):.1f} s",
            ratio(result.seconds("ours"), result.seconds("fedavg")),
        )
        for result in results
    ]
    if rows:
        print_table("Against FedAvg of fp32 deltas", columns, rows)


if __name__ == "__main__":
    # So that files and children go when it is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
