"""The processes of one training: where each stands, how they start, meet and end.

An Indexed Job gives every pod a number; every pod runs `processes_per_node` processes. All ranks end if one
does: within a pod this module sees to it, across pods the Job does (it tolerates no failed pod).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from tributary_api.failures import Reason
from tributary_api.tasks import RENDEZVOUS_PORT, TASK_ENV, TrainTask
from tributary_worker.failures import TERMINATION_MESSAGE_PATH_ENV, StageFailure, termination_message_path
from tributary_worker.task_input import POD_INDEX_ENV, read_task

T = TypeVar("T")

RANK_ENV = "RANK"
LOOPBACK = "127.0.0.1"

TIMEOUT_SECONDS = 900
"""For the others to appear, and for each exchange: pods start minutes apart when a node pulls the image
first."""
POLL_SECONDS = 0.2
STOP_SECONDS = 10


@dataclass(frozen=True, slots=True)
class RankLayout:
    """One process among `world_size`."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    master_host: str
    master_port: int

    @property
    def environment(self) -> dict[str, str]:
        """What torch.distributed and DeepSpeed read. DeepSpeed uses shared memory if LOCAL_SIZE is the
        world's."""
        return {
            RANK_ENV: str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_host,
            "MASTER_PORT": str(self.master_port),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> RankLayout:
        return cls(
            rank=int(environment[RANK_ENV]),
            local_rank=int(environment["LOCAL_RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_size=int(environment["LOCAL_SIZE"]),
            master_host=environment["MASTER_ADDR"],
            master_port=int(environment["MASTER_PORT"]),
        )


def pod_layouts(task: TrainTask, environment: Mapping[str, str]) -> list[RankLayout]:
    """The processes of this pod."""
    pod = int(environment.get(POD_INDEX_ENV, "0"))
    # What ranks exchange is not noised yet: they meet nowhere but in the owner's namespace.
    is_own = task.rendezvous_host.endswith(f".{task.grant.client.namespace}.svc")
    if pod >= task.nodes or (task.nodes > 1 and not is_own):
        where = f"pod {pod} of {task.nodes} with rendezvous host {task.rendezvous_host!r}"
        raise StageFailure(Reason.TASK_INVALID, f"{where}: not in namespace {task.grant.client.namespace}")
    host = task.rendezvous_host if task.nodes > 1 else LOOPBACK
    port = RENDEZVOUS_PORT if task.nodes > 1 else free_port()
    size = task.processes_per_node
    return [
        RankLayout(pod * size + local, local, task.nodes * size, size, host, port) for local in range(size)
    ]


def main(argv: Sequence[str]) -> int:
    """The entry of a training pod: train here if it has one process, else in children that run this
    command."""
    # The first process of a container ignores SIGTERM unless it says otherwise; its children never see it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _options(argv)
    if options.task is not None:
        os.environ[TASK_ENV] = options.task.read_text()
    task = read_task(TrainTask)
    if RANK_ENV in os.environ:
        return _train(task, RankLayout.from_environment(os.environ), options.root)
    layouts = pod_layouts(task, os.environ)
    if len(layouts) == 1:
        os.environ.update(layouts[0].environment)
        return _train(task, layouts[0], options.root)
    with tempfile.TemporaryDirectory() as directory:
        return _run_children(layouts, argv, Path(directory))


def _options(argv: Sequence[str]) -> argparse.Namespace:
    """`task` and `root` from the command line. A pod has neither: admission allows it no arguments, and no
    variable that could point at another key or another API server."""
    parser = argparse.ArgumentParser(prog="tributary_worker train")
    parser.add_argument("--task", type=Path, help=f"file with the task, instead of the variable {TASK_ENV}")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the mounts lie, outside a pod")
    return parser.parse_args(argv)


def _train(task: TrainTask, layout: RankLayout, root: Path) -> int:
    # Imported here, so that a process which only starts others stays small; and aside from stdout, which is
    # for progress: DeepSpeed logs there when it is imported.
    with redirect_stdout(sys.stderr):
        from tributary_worker.train import run
    return run(task, layout, root)


def _run_children(layouts: Sequence[RankLayout], argv: Sequence[str], messages: Path) -> int:
    command = [sys.executable, "-m", "tributary_worker", "train", *argv]
    children = {
        subprocess.Popen(
            command, env=os.environ | layout.environment | _message_path(messages, layout)
        ): layout
        for layout in layouts
    }
    try:
        first = _first_failure(list(children))
        if first is None:
            return 0
        message = Path(_message_path(messages, children[first])[TERMINATION_MESSAGE_PATH_ENV])
        return _pass_on(first.returncode, message)
    finally:
        _stop(list(children))


def _first_failure(children: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    """Wait until all children succeeded (None) or one did not.

    Of several that failed at once the lowest code is the cause: a signal is below 0, and a rank that only
    lost its peers ends with the code of InternalError, which is the highest.
    """
    running = list(children)
    while running:
        failed = [child for child in running if child.poll() not in (None, 0)]
        if failed:
            return min(failed, key=lambda child: int(child.returncode))
        running = [child for child in running if child.returncode is None]
        time.sleep(POLL_SECONDS)
    return None


def _pass_on(code: int, message: Path) -> int:
    """Make the child's end this process's own: its termination message, its exit code."""
    if message.exists():
        termination_message_path().write_bytes(message.read_bytes())
        return code
    died = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    hint = "; was it out of memory?" if code == -signal.SIGKILL else ""
    raise StageFailure(Reason.INTERNAL, f"a training process died {died}{hint}")


def _message_path(messages: Path, layout: RankLayout) -> dict[str, str]:
    return {TERMINATION_MESSAGE_PATH_ENV: str(messages / f"rank-{layout.rank}")}


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


@contextmanager
def process_group(layout: RankLayout) -> Iterator[None]:
    """All ranks connected, over NCCL on GPUs and gloo on CPUs.

    Raises:
        StageFailure: they did not meet in time.
    """
    import deepspeed
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    _await_name(layout)
    get_accelerator().set_device(layout.local_rank)
    try:
        # It prints when it has loaded its shared-memory kernel; stdout is for progress.
        with redirect_stdout(sys.stderr):
            deepspeed.init_distributed(
                dist_backend=get_accelerator().communication_backend_name(),
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(seconds=TIMEOUT_SECONDS),
            )
    except (dist.DistStoreError, dist.DistNetworkError, dist.DistBackendError) as error:
        raise StageFailure(
            Reason.RENDEZVOUS_TIMED_OUT,
            f"rank {layout.rank} of {layout.world_size} did not meet the others at {layout.master_host}",
        ) from error
    yield
    # Not after a failure: saying good-bye to ranks that are gone may take for ever.
    dist.destroy_process_group()


def _await_name(layout: RankLayout) -> None:
    """Wait until the name of index 0 resolves: cluster DNS knows it only when that pod is there."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            socket.getaddrinfo(layout.master_host, layout.master_port)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                message = f"{layout.master_host} does not resolve: is the pod with index 0 running?"
                raise StageFailure(Reason.RENDEZVOUS_TIMED_OUT, message) from error
        time.sleep(POLL_SECONDS)


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on all ranks; its failure too, so that no rank waits for one that gave
    up."""
    import torch.distributed as dist

    outcome: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except StageFailure as failure:
            outcome = [failure]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], StageFailure):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
