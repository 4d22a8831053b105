"""The operator as its own process, under its service account, as the chart would run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from installation import BUCKET, SYSTEM, WORKER_IMAGE
from kube import Kubectl, Object
from signers import HUB_ENVIRONMENT

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0


def operator_kubeconfig(admin: Kubectl, path: Path) -> Path:
    """The admin's, with a token of the operator's service account in place of the admin's certificate."""
    config: Object = yaml.safe_load(admin.kubeconfig.read_text())
    token = admin("create", "token", "tributary-operator", "-n", SYSTEM, "--duration=4h").strip()
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path.write_text(json.dumps(config))
    return path


@dataclass
class OperatorProcess:
    kubeconfig: Path
    log: Path
    store_endpoint: str
    access_key: str
    secret_key: str
    identity: str = "operator-under-test"
    """Kept over restarts, as a container keeps that of its pod."""
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    url: str = ""
    """Where it answers to probes."""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        port = _free_port()
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "TRIBUTARY_WORKER_IMAGE": WORKER_IMAGE,
            "TRIBUTARY_BUCKET": BUCKET,
            **HUB_ENVIRONMENT,
            "TRIBUTARY_NAMESPACE": SYSTEM,
            "TRIBUTARY_IDENTITY": self.identity,
            "TRIBUTARY_STORE_ENDPOINT": self.store_endpoint,
            "TRIBUTARY_HEALTH_PORT": str(port),
            "TRIBUTARY_RESYNC_SECONDS": "20",
            "OMP_NUM_THREADS": "1",
            **self.settings,
        }
        command = [sys.executable, "-m", "tributary_operator"]
        self.process = subprocess.Popen(command, env=environment, stderr=self.log.open("ab"))
        self.url = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{self.url}/readyz", self.process, self.log)

    def stop(self) -> int:
        """Ask it to go, as the kubelet does; gives its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_SECONDS_MAX)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS_MAX)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the operator did not start: {log.read_text()[-4000:]}")
