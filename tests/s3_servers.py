"""A real S3 server (versitygw) on this machine, for tests of identities, policies and conditional writes."""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tributary_dev.build import component_directory
from tributary_dev.components import VERSITYGW
from tributary_dev.s3 import S3_REGION, S3Server

START_SECONDS_MAX = 20.0


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """A server of its own, on a free port, with its data under `directory`; gone afterwards."""
    program = component_directory(VERSITYGW) / "versitygw"
    buckets, users, sidecar = (directory / name for name in ("buckets", "users", "sidecar"))
    for path in (buckets, users, sidecar):
        path.mkdir()
    endpoint = f"http://127.0.0.1:{_free_port()}"
    root = ("root", secrets.token_hex(20))
    server = ["--port", endpoint.removeprefix("http://"), "--region", S3_REGION, "--quiet"]
    server += ["--health", "/health", "--iam-dir", str(users)]
    process = subprocess.Popen(
        [program, *server, "posix", "--sidecar", str(sidecar), str(buckets)],
        env={"ROOT_ACCESS_KEY": root[0], "ROOT_SECRET_KEY": root[1]},
        stdout=subprocess.DEVNULL,
        stderr=(directory / "log").open("wb"),
    )
    try:
        _wait_for(f"{endpoint}/health", process, directory / "log")
        yield S3Server(endpoint, endpoint, S3_REGION, *root, program)
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the S3 server did not start: {log.read_text()}")
