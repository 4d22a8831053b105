from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

# The operator's environment has no torch; it collects these tests when it looks for others.
collect_ignore_glob = [] if find_spec("torch") else ["*"]


SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session", autouse=True)
def no_shared_memory_left():
    """DeepSpeed leaves 66 MiB behind for every rank. A pod's go with it; here nobody else removes them."""
    before = set(SHARED_MEMORY.glob("deepspeed_*"))
    yield
    in_use = "".join(_mapped_files(process) for process in Path("/proc").glob("[0-9]*"))
    for buffer in set(SHARED_MEMORY.glob("deepspeed_*")) - before:
        if str(buffer) not in in_use:
            buffer.unlink(missing_ok=True)


def _mapped_files(process: Path) -> str:
    with suppress(OSError):  # gone meanwhile, or not ours
        return (process / "maps").read_text()
    return ""


@pytest.fixture(scope="session")
def alone():
    """A process group of this process only, as in a training with one pod and one process."""
    import torch

    from tributary_worker import distributed

    torch.set_num_threads(1)
    port = distributed.free_port()
    layout = distributed.RankLayout(0, 0, 1, 1, distributed.LOOPBACK, port)
    os.environ.update(layout.environment)
    with distributed.process_group(layout):
        yield
    for name in layout.environment:
        del os.environ[name]
