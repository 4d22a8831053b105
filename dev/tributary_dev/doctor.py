"""What this machine lacks, said at once and all together, with what to do about each thing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tributary_dev import cgroups, places
from tributary_dev.components import GO_VERSION_MIN
from tributary_dev.oci import GO_ARCHITECTURES
from tributary_dev.progress import step
from tributary_dev.shell import run

# For the objects, logs and containers of a running cluster. What is still to be built comes on top.
DISK_BYTES_RUNNING = 4 * 10**9
MEMORY_BYTES_MIN = 6 * 10**9

# Debian package of each program that is not built from source here.
PACKAGES = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "runc": "runc",
    "iptables": "iptables",
    "ip": "iproute2",
    "openssl": "openssl",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "git": "git",
    "g++": "g++",  # outside of its image the worker compiles an operation of DeepSpeed
}
# A socket's path has at most 107 bytes; the kubelet's lie up to 46 below the directory of all states.
STATE_PATH_LENGTH_MAX = 60
SYSTEM_PATH = ("/usr/sbin", "/sbin")


@dataclass(frozen=True)
class Lack:
    """Something that is not as it must be, and the way out."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


class MachineError(RuntimeError):
    """This machine cannot run the cluster; the message lists everything that has to change."""

    def __init__(self, lacks: list[Lack]) -> None:
        super().__init__(
            "\n".join(["This machine cannot run the cluster yet:", *(f"  - {lack}" for lack in lacks)])
        )
        self.lacks = lacks


@dataclass(frozen=True)
class Machine:
    """The facts that the cluster depends on."""

    user_id: int
    system: str
    architecture: str
    disk_bytes_free: int
    disk_bytes_needed: int
    memory_bytes: int
    go_version: tuple[int, int] | None
    go_toolchain: str
    has_apt: bool
    missing_programs: tuple[str, ...]
    missing_controllers: tuple[str, ...]
    has_overlay: bool
    state_path_length: int


def examine(disk_bytes_to_build: int = 0) -> Machine:
    """The facts of this machine. `disk_bytes_to_build` is what the caller is going to build."""
    is_linux = platform.system() == "Linux"
    return Machine(
        user_id=os.geteuid(),
        system=platform.system(),
        architecture=platform.machine(),
        disk_bytes_free=min(_disk_bytes_free(places.cache_root()), _disk_bytes_free(places.state_root())),
        disk_bytes_needed=disk_bytes_to_build + DISK_BYTES_RUNNING,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        go_version=_go_version(),
        go_toolchain=_go_environment("GOTOOLCHAIN"),
        has_apt=_find("apt-get") is not None,
        missing_programs=tuple(name for name in PACKAGES if _find(name) is None),
        missing_controllers=tuple(sorted(cgroups.missing_controllers())) if is_linux else (),
        has_overlay=is_linux and "overlay" in Path("/proc/filesystems").read_text().split(),
        state_path_length=len(str(places.state_root())),
    )


def diagnose(machine: Machine) -> list[Lack]:
    """Everything that stops this machine from running a cluster, but for packages that we can install."""
    lacks = [*_platform_lacks(machine), *_room_lacks(machine), *_go_lacks(machine)]
    can_install = machine.has_apt and machine.user_id == 0
    if machine.missing_programs and not can_install:
        names = " ".join(packages_of(machine.missing_programs))
        lacks.append(Lack(f"missing: {', '.join(machine.missing_programs)}", f"install the packages {names}"))
    return lacks


def _platform_lacks(machine: Machine) -> list[Lack]:
    lacks = []
    if machine.system != "Linux" or machine.architecture not in GO_ARCHITECTURES:
        here = f"this is {machine.system} on {machine.architecture}"
        lacks.append(Lack(here, "use Linux on x86_64 or arm64, or `make demo CONTEXT=<kube context>`"))
    if machine.user_id != 0:
        lacks.append(Lack("not root", "run as root (namespaces, mounts and iptables need it)"))
    if machine.missing_controllers:
        names = ", ".join(machine.missing_controllers)
        lacks.append(Lack(f"no cgroup controllers {names}", "mount them, or run outside of this container"))
    if machine.system == "Linux" and not machine.has_overlay:
        lacks.append(Lack("the kernel has no overlay file system", "`modprobe overlay`"))
    if machine.state_path_length > STATE_PATH_LENGTH_MAX:
        longer = f"{places.STATE_VARIABLE} is longer than {STATE_PATH_LENGTH_MAX} characters"
        lacks.append(Lack(longer, "sockets below it could not be opened: choose a shorter path"))
    return lacks


def _room_lacks(machine: Machine) -> list[Lack]:
    lacks = []
    if machine.disk_bytes_free < machine.disk_bytes_needed:
        sizes = (machine.disk_bytes_free, machine.disk_bytes_needed)
        free, needed = (f"{size / 10**9:.0f} GB" for size in sizes)
        move = f"free some, or point {places.CACHE_VARIABLE} and {places.STATE_VARIABLE} at a larger disk"
        lacks.append(Lack(f"{free} of disk are free, {needed} are needed", move))
    if machine.memory_bytes < MEMORY_BYTES_MIN:
        have, needed = (f"{size / 10**9:.0f} GB" for size in (machine.memory_bytes, MEMORY_BYTES_MIN))
        lacks.append(Lack(f"{have} of memory", f"use a machine with {needed}"))
    return lacks


def _go_lacks(machine: Machine) -> list[Lack]:
    wanted = ".".join(map(str, GO_VERSION_MIN))
    if machine.go_version is None:
        return [Lack("no Go compiler", f"install Go {wanted} or newer and put it on PATH")]
    # Since 1.21 Go fetches a newer compiler by itself, unless it was told to stay local.
    fetches = machine.go_version >= (1, 21) and not machine.go_toolchain.startswith("local")
    if machine.go_version < GO_VERSION_MIN and not fetches:
        found = ".".join(map(str, machine.go_version))
        return [Lack(f"Go {found} is too old", f"install Go {wanted} or newer, or set GOTOOLCHAIN=auto")]
    return []


def require_machine(disk_bytes_to_build: int = 0) -> None:
    """Install the missing Debian packages. Raises MachineError with everything that is lacking instead."""
    machine = examine(disk_bytes_to_build)
    if lacks := diagnose(machine):
        raise MachineError(lacks)
    if machine.missing_programs:
        install(packages_of(machine.missing_programs))


def packages_of(programs: tuple[str, ...]) -> list[str]:
    return sorted({PACKAGES[name] for name in programs})


def install(packages: list[str]) -> None:
    with step(f"installing {' '.join(packages)}"):
        run(["apt-get", "update"])
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "install", "--yes", "--no-install-recommends", *packages], env=quiet)


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATH]))


def _disk_bytes_free(path: Path) -> int:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _go_environment(name: str) -> str:
    if _find("go") is None:
        return ""
    return run(["go", "env", name], cwd=Path("/")).strip()


def _go_version() -> tuple[int, int] | None:
    try:
        answer = subprocess.run(["go", "version"], capture_output=True, text=True, check=True, cwd="/").stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    found = re.search(r"go(\d+)\.(\d+)", answer)
    return (int(found[1]), int(found[2])) if found else None
