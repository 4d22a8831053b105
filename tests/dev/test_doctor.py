"""What is said about a machine: everything that is wrong, at once, each with a way out."""

from dataclasses import replace

import pytest

from tributary_dev.doctor import Machine as Facts
from tributary_dev.doctor import MachineError, diagnose, packages_of

GOOD = Facts(
    user_id=0,
    system="Linux",
    architecture="x86_64",
    disk_bytes_free=25 * 10**9,
    disk_bytes_needed=25 * 10**9,
    memory_bytes=8 * 10**9,
    go_version=(1, 26),
    go_toolchain="auto",
    has_apt=True,
    missing_programs=(),
    missing_controllers=(),
    has_overlay=True,
    state_path_length=18,
)

ROWS: list[tuple[dict[str, object], str]] = [
    ({"user_id": 1000}, "run as root"),
    ({"system": "Darwin"}, "CONTEXT="),
    ({"architecture": "riscv64"}, "arm64"),
    ({"disk_bytes_free": 24 * 10**9}, "TRIBUTARY_CACHE"),
    ({"memory_bytes": 4 * 10**9}, "memory"),
    ({"go_version": None}, "install Go 1.25"),
    ({"go_version": (1, 19)}, "Go 1.19 is too old"),
    ({"go_version": (1, 22), "go_toolchain": "local"}, "GOTOOLCHAIN=auto"),
    ({"missing_controllers": ("pids",)}, "pids"),
    ({"has_overlay": False}, "modprobe overlay"),
    ({"state_path_length": 90}, "shorter path"),
    ({"missing_programs": ("runc", "ip"), "has_apt": False}, "iproute2 runc"),
]


def test_a_good_machine_lacks_nothing() -> None:
    assert diagnose(GOOD) == []


@pytest.mark.parametrize(("facts", "words"), ROWS)
def test_one_lack_is_told_with_its_remedy(facts: dict[str, object], words: str) -> None:
    lacks = diagnose(replace(GOOD, **facts))  # type: ignore[arg-type]
    assert len(lacks) == 1
    assert words in str(lacks[0])
    assert lacks[0].remedy


def test_everything_is_told_at_once() -> None:
    bad = replace(GOOD, user_id=1, disk_bytes_free=0, go_version=None, missing_programs=("runc",))
    message = str(MachineError(diagnose(bad)))
    assert all(word in message for word in ("root", "GB", "Go", "runc"))


def test_packages_that_root_can_install_are_not_lacking() -> None:
    assert diagnose(replace(GOOD, missing_programs=("buildah",))) == []
    assert packages_of(("nsenter", "unshare")) == ["util-linux"]


def test_go_may_fetch_the_compiler_it_needs() -> None:
    assert diagnose(replace(GOOD, go_version=(1, 22))) == []
