"""The cgroup that a cluster's pods lie in, on cgroup v1 (one tree per controller) and v2 (one tree)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CONTROLLERS_NEEDED = frozenset({"cpu", "cpuset", "memory", "pids"})
REMOVAL_SECONDS = 20.0
CPU_WEIGHTS = (("cpu.shares", 1024, 262144), ("cpu.weight", 100, 10000))
"""Of cgroup v1 and v2: the file, the weight of one process, the highest that is allowed."""


def is_unified() -> bool:
    return (CGROUP_ROOT / "cgroup.controllers").exists()


def hierarchies() -> list[Path]:
    """Every mounted tree: on v2 there is one, on v1 one per controller, each mounted by name."""
    if is_unified():
        return [CGROUP_ROOT]
    return [path for path in sorted(CGROUP_ROOT.iterdir()) if path.is_dir() and not path.is_symlink()]


def missing_controllers() -> set[str]:
    """The controllers that the kubelet needs and this machine does not offer."""
    if is_unified():
        return set(CONTROLLERS_NEEDED - set((CGROUP_ROOT / "cgroup.controllers").read_text().split()))
    return {name for name in CONTROLLERS_NEEDED if not (CGROUP_ROOT / name).is_dir()}


def create(cgroup: str) -> None:
    """Create `cgroup` in every tree; on v2 also hand the controllers down to it."""
    if is_unified():
        _enable_controllers(CGROUP_ROOT)
    for tree in hierarchies():
        directory = tree / cgroup.lstrip("/")
        directory.mkdir(exist_ok=True)
        _weigh(directory)


def _weigh(directory: Path) -> None:
    """Let all pods together weigh as much as one process on each core, where `directory` shares out CPU time.

    By default they would weigh as much as a single process, so that one busy test starves a whole cluster.
    """
    cores = os.cpu_count() or 1
    for name, default, highest in CPU_WEIGHTS:
        if (directory / name).exists():
            (directory / name).write_text(str(min(default * cores, highest)))


def _enable_controllers(directory: Path) -> None:
    wanted = " ".join(f"+{name}" for name in (directory / "cgroup.controllers").read_text().split())
    control = directory / "cgroup.subtree_control"
    try:
        control.write_text(wanted)
    except OSError:
        # Inside a container the root holds processes, and then v2 hands nothing down: move them to a leaf.
        leaf = directory / "init"
        leaf.mkdir(exist_ok=True)
        for pid in (directory / "cgroup.procs").read_text().split():
            with suppress(OSError):  # a kernel thread, or gone meanwhile
                (leaf / "cgroup.procs").write_text(pid)
        control.write_text(wanted)


def remove(cgroup: str) -> None:
    """Remove `cgroup` and everything below it. Its processes must have been killed, but may still be dying.

    Raises TimeoutError when some process does not go away.
    """
    deadline = time.monotonic() + REMOVAL_SECONDS
    while left := list(_directories(cgroup)):
        for directory in left:
            with suppress(OSError):
                directory.rmdir()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{left[0]} still has processes in it: `cat {left[0]}/cgroup.procs`")
        if any(directory.exists() for directory in left):
            time.sleep(0.05)


def _directories(cgroup: str) -> Iterator[Path]:
    """`cgroup` and everything below it in all trees, children before parents."""
    for tree in hierarchies():
        for path, _, _ in os.walk(tree / cgroup.lstrip("/"), topdown=False):
            yield Path(path)
