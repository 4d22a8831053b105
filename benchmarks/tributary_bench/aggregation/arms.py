"""The arms of a case, each a process: the aggregator as its pod runs it, Flower, the bare store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from aggregation_worlds import LAYOUT

from tributary_api.records import AggregateManifest
from tributary_api.tasks import TASK_ENV
from tributary_bench.aggregation import flower, raw
from tributary_bench.aggregation.cases import Case
from tributary_bench.aggregation.rounds import Round, cleaned, examples_of, key_of
from tributary_bench.children import OUT_OF_MEMORY_CODES, Measured, must_succeed, run_measured
from tributary_bench.machine import GIB, meminfo
from tributary_worker.store_access import ACCESS_KEY, SECRET_KEY

FLOWER_PYTHON = Path(".venv-flower/bin/python")
FLOWER_PROGRAM = Path(flower.__file__)
FLOWER_MEMORY_BYTES_MAX = 16 * GIB
SPARED_BYTES = 4 * GIB
"""Left to the rest of the machine: a child that takes it all would measure the disk."""
READ_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Bench:
    """A case and everything that its arms need."""

    case: Case
    round: Round
    buckets: Path
    """Where the server keeps its buckets on this disk."""
    log: Path

    @property
    def credentials(self) -> dict[str, str]:
        server = self.round.server
        return {ACCESS_KEY: server.access_key, SECRET_KEY: server.secret_key}

    @property
    def delta_keys(self) -> list[str]:
        return [key_of(delta.uri) for delta in self.round.delivered(self.case)]

    def plain(self) -> Bench:
        """The same with FedAvg of fp32 deltas."""
        return replace(self, case=Case(self.case.model, self.case.clients))

    def run(self, arm: Callable[[Bench], Measured]) -> Measured:
        """One run of an arm, from objects that lie in the page cache; what it wrote is deleted."""
        with cleaned(self.round.server):
            self._warm()
            return arm(self)

    def _warm(self) -> None:
        uris = {self.round.base_weights_uri, *(delta.uri for delta in self.round.delivered(self.case))}
        buffer = bytearray(READ_BYTES)
        for uri in sorted(uris):
            with (self.buckets / LAYOUT.bucket / key_of(uri)).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def ours(bench: Bench) -> Measured:
    """`python -m tributary_worker aggregate`."""
    case, task = bench.case, bench.round.task(bench.case)
    bench.round.publish_manifests(case)
    env = bench.credentials | {TASK_ENV: task.model_dump_json(by_alias=True, exclude_none=True)}
    done = run_measured([sys.executable, "-m", "tributary_worker", "aggregate"], env, bench.log)
    must_succeed(done, f"our aggregator ({case.label})", bench.log)
    manifest = AggregateManifest.model_validate_json(bench.round.store.get(task.manifest_uri))
    if len(manifest.included) != case.clients:
        sys.exit(
            f"our aggregator took {len(manifest.included)} of {case.clients} deltas: {manifest.excluded}"
        )
    return done


def bare_store(bench: Bench) -> Measured:
    traffic = raw.Traffic(
        endpoint=bench.round.server.endpoint_for_host,
        region=bench.round.server.region,
        bucket=LAYOUT.bucket,
        base=key_of(bench.round.base_weights_uri),
        deltas=bench.delta_keys,
        size=bench.round.delivered(bench.case)[0].file.size,
        target="raw/",
    )
    env = bench.credentials | traffic.environment()
    done = run_measured([sys.executable, raw.__file__], env, bench.log)
    return must_succeed(done, "the bare transfer", bench.log)


def flower_fedavg(bench: Bench) -> Measured:
    task = flower.FlowerTask(
        endpoint=bench.round.server.endpoint_for_host,
        region=bench.round.server.region,
        bucket=LAYOUT.bucket,
        deltas=bench.delta_keys,
        examples=[examples_of(n) for n in range(bench.case.clients)],
        target="flower/model.safetensors",
        memory_bytes_max=flower_memory_bytes_max(),
    )
    env = bench.credentials | task.environment()
    done = run_measured([FLOWER_PYTHON, FLOWER_PROGRAM], env, bench.log)
    return done if done.code in OUT_OF_MEMORY_CODES else must_succeed(done, "Flower", bench.log)


def flower_memory_bytes_max() -> int:
    """16 GiB, or what the machine can give without swapping others out."""
    return min(FLOWER_MEMORY_BYTES_MAX, meminfo("MemAvailable") - SPARED_BYTES)
