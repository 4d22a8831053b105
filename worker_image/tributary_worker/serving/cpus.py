"""How many CPUs this container may use; libraries see all those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """The CPUs that the scheduler gives this process, at least 1: its affinity, and its cgroup's quota."""
    cpus = float(len(os.sched_getaffinity(0)))
    return max(1, int(min(cpus, _quota(cgroup) or cpus)))


def _quota(cgroup: Path) -> float | None:
    """CPU time per time that the cgroup allows; None if it sets no limit."""
    try:
        quota, period = _limits(cgroup)
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def _limits(cgroup: Path) -> tuple[str, str]:
    """Quota and period in microseconds, of cgroup v2 or v1; without a limit the quota is "max" or -1."""
    unified = cgroup / "cpu.max"
    if unified.exists():
        quota, period = unified.read_text().split()
        return quota, period
    return (cgroup / "cpu/cpu.cfs_quota_us").read_text(), (cgroup / "cpu/cpu.cfs_period_us").read_text()
