"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

GIB = 1024**3


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def machine(*distributions: str) -> dict[str, str | int | float]:
    """Processors, memory and versions, as JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(meminfo("MemTotal") / GIB, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in distributions},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
