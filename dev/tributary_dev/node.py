"""The node: process 1 of a PID namespace in which one cluster lives. Started by `cluster.py`, nobody else.

The namespaces (processes, mounts, network) are what makes a cluster leave nothing behind: when process 1
dies, for whatever reason, the kernel kills every process of the cluster, pods too, and drops its mounts,
its network and its iptables rules. Two clusters cannot see each other.

It reads `programs.json` (written by `cluster.py`), keeps exactly those programs running, and tells in
`running.json` what it did. Standard library only: nothing of the host's network is reachable in here.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROGRAMS_FILE = "programs.json"
RUNNING_FILE = "running.json"
PID_FILE = "node.pid"
LOCK_FILE = "node.lock"

POLL_SECONDS = 0.2
RESTART_AFTER_SECONDS = 1.0
STOP_SECONDS = 5.0
CNI_CACHE = "/var/lib/cni"
LOG_BYTES_MAX = 64 * 1024 * 1024

# The kubelet sets these for the whole machine and fails if it cannot. It gets files of its own instead.
KERNEL_TUNABLES = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}


@dataclass(frozen=True)
class Program:
    """One program that shall run. Any change of it, also of `config_digest`, restarts the program."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    config_digest: str = ""


def write_programs(root: Path, programs: list[Program]) -> None:
    text = json.dumps([asdict(program) for program in programs])
    _replace(root / PROGRAMS_FILE, text)


def read_programs(root: Path) -> list[Program]:
    try:
        rows = json.loads((root / PROGRAMS_FILE).read_text())
    except FileNotFoundError:
        return []
    return [Program(**{**row, "argv": tuple(row["argv"])}) for row in rows]


def read_running(root: Path) -> dict[str, dict[str, int | None]]:
    """What process 1 last told: by program its process id inside the node, its starts and last exit code."""
    try:
        rows: dict[str, dict[str, int | None]] = json.loads((root / RUNNING_FILE).read_text())
    except FileNotFoundError:
        return {}
    return rows


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    staging = path.with_suffix(".new")
    staging.touch(mode=0o600)
    staging.write_text(text)
    staging.rename(path)


@dataclass
class Running:
    """A program that was started, and how often it had to be."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    starts: int = 0
    exit_code: int | None = None

    def summary(self) -> dict[str, int | None]:
        pid = self.process.pid if self.process else None
        return {"pid": pid, "starts": self.starts, "exit": self.exit_code}


class Supervisor:
    """Keeps the programs of `programs.json` running."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: dict[str, Running] = {}
        self._told = ""

    def step(self) -> None:
        self._reap()
        wanted = {program.name: program for program in read_programs(self.root)}
        for name in list(self.running):
            if wanted.get(name) != self.running[name].program:
                self._stop(self.running.pop(name))
        for program in wanted.values():
            self._start_if_needed(self.running.setdefault(program.name, Running(program)))
        self._tell()

    def _reap(self) -> None:
        """Collect every dead process; as process 1 we inherit the orphans of all pods."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._note_exit(pid, os.waitstatus_to_exitcode(status))

    def _note_exit(self, pid: int, code: int) -> None:
        for entry in self.running.values():
            if entry.process is not None and entry.process.pid == pid:
                entry.process.returncode = code
                entry.process, entry.exit_code = None, code

    def _start_if_needed(self, entry: Running) -> None:
        if entry.process is not None or time.monotonic() - entry.started_at < RESTART_AFTER_SECONDS:
            return
        log = self.root / "log" / f"{entry.program.name}.log"
        if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
            log.rename(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            entry.process = subprocess.Popen(
                entry.program.argv,
                env={**os.environ, **entry.program.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        entry.started_at = time.monotonic()
        entry.starts += 1

    def _stop(self, entry: Running) -> None:
        process = entry.process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _tell(self) -> None:
        rows = {
            name: {
                "pid": entry.process and entry.process.pid,
                "starts": entry.starts,
                "exit": entry.exit_code,
            }
            for name, entry in sorted(self.running.items())
        }
        text = json.dumps(rows)
        if text != self._told:
            _replace(self.root / RUNNING_FILE, text)
            self._told = text


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _prepare_mounts(root: Path) -> None:
    """Give the cluster its own /proc, /run and logs, so that it writes nothing outside its root."""
    _mount("--make-rshared", "/")
    _mount("-t", "proc", "proc", "/proc")
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for private, public in (("var-log", "/var/log"), ("var-lib-cni", CNI_CACHE)):
        (root / private).mkdir(exist_ok=True)
        _mount("--bind", str(root / private), public)
    for name, value in KERNEL_TUNABLES.items():
        shadow = Path("/run/tunables") / name
        shadow.parent.mkdir(parents=True, exist_ok=True)
        shadow.write_text(f"{value}\n")
        with suppress(subprocess.CalledProcessError):  # a kernel built without keyrings has no root_maxkeys
            _mount("--bind", str(shadow), f"/proc/sys/{name}")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")


def main(root: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    lock = (root / LOCK_FILE).open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    # The old /proc still belongs to the host here, so this is the number by which the host knows us.
    host_pid = os.readlink("/proc/self")
    _prepare_mounts(root)
    # Renamed into place: whoever waits for the file must never find it empty.
    unfinished = root / f"{PID_FILE}.new"
    unfinished.write_text(host_pid)
    unfinished.replace(root / PID_FILE)
    supervisor = Supervisor(root)
    while True:
        supervisor.step()
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
