"""Process 1 of a node keeps exactly the programs of its list running. Here it is an ordinary process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tributary_dev import node, places
from tributary_dev.node import Program, read_programs, read_running, write_programs

LOOP = """
import sys, time
from pathlib import Path
from tributary_dev.node import Supervisor
supervisor = Supervisor(Path(sys.argv[1]))
while True:
    supervisor.step()
    time.sleep(0.02)
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "log").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(tmp_path)], cwd=places.checkout() / "dev", start_new_session=True
    )
    yield tmp_path
    write_programs(tmp_path, [])
    eventually(lambda: not read_running(tmp_path))
    process.kill()
    process.wait()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid_of(root: Path, name: str) -> int:
    """The process id of a program once it runs."""
    eventually(lambda: bool(read_running(root).get(name, {}).get("pid")))
    pid = read_running(root)[name]["pid"]
    assert pid is not None
    return pid


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_killed_program_is_started_again(root: Path) -> None:
    write_programs(root, [Program("a", ("sleep", "600"))])
    first = pid_of(root, "a")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: (read_running(root)["a"]["starts"] or 0) > 1)
    assert pid_of(root, "a") != first
    assert read_running(root)["a"]["exit"] == -signal.SIGKILL


def test_only_the_changed_program_is_restarted(root: Path) -> None:
    write_programs(root, [Program("a", ("sleep", "600")), Program("b", ("sleep", "600"))])
    a, b = pid_of(root, "a"), pid_of(root, "b")
    write_programs(
        root, [Program("a", ("sleep", "600"), config_digest="new"), Program("b", ("sleep", "600"))]
    )
    eventually(lambda: pid_of(root, "a") != a)
    assert not is_alive(a)
    assert pid_of(root, "b") == b


def test_a_program_that_left_the_list_is_stopped(root: Path) -> None:
    write_programs(root, [Program("a", ("sleep", "600"))])
    pid = pid_of(root, "a")
    write_programs(root, [])
    eventually(lambda: not is_alive(pid))


def test_what_a_program_prints_is_in_its_log(root: Path) -> None:
    write_programs(root, [Program("a", ("sh", "-c", "echo $GREETING; sleep 600"), {"GREETING": "hello"})])
    eventually(
        lambda: (root / "log" / "a.log").exists() and (root / "log" / "a.log").read_text() == "hello\n"
    )


def test_programs_read_back_as_they_were_written(tmp_path: Path) -> None:
    programs = [Program("a", ("x", "y"), {"K": "V"}, "digest"), Program("b", ("z",))]
    write_programs(tmp_path, programs)
    assert read_programs(tmp_path) == programs
    assert (tmp_path / node.PROGRAMS_FILE).stat().st_mode & 0o077 == 0
