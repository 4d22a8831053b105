"""kubectl and helm as tests use them: as the cluster's admin, or in somebody else's name."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHARTS = ROOT / "charts"
PINNED = "@sha256:" + "0" * 64

Object = dict[str, Any]


class Refused(Exception):
    """The command failed; the text is what it said."""


def eventually(check: Callable[[], bool], *, timeout_seconds: float = 30.0) -> None:
    """Wait until the check holds: policies and roles take effect a moment after they are written."""
    deadline = time.monotonic() + timeout_seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s"
        time.sleep(0.1)


def run(command: list[str], *, stdin: str | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        input=stdin,
        env=env or os.environ.copy(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode != 0:
        raise Refused(done.stderr + done.stdout)
    return done.stdout


@dataclass(frozen=True)
class Kubectl:
    program: Path
    kubeconfig: Path
    user: str | None = None
    """Impersonated, if given."""

    def impersonate(self, user: str) -> Kubectl:
        return Kubectl(self.program, self.kubeconfig, user)

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        who = [f"--as={self.user}"] if self.user else []
        return run([str(self.program), f"--kubeconfig={self.kubeconfig}", *who, *arguments], stdin=stdin)

    def create(self, manifest: Object, *flags: str) -> Object:
        created: Object = json.loads(self("create", "-f-", "-ojson", *flags, stdin=json.dumps(manifest)))
        return created

    def is_refused(self, manifest: Object, because: str) -> bool:
        """Whether creating it would be refused for that reason."""
        try:
            self.create(manifest, "--dry-run=server")
        except Refused as refused:
            return because in str(refused)
        return False

    def apply(self, *manifests: Object) -> None:
        """By server-side apply, as this project's owner of everything in the test cluster."""
        listing = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self("apply", "--server-side", "--force-conflicts", "-f-", stdin=json.dumps(listing))

    def get(self, *arguments: str) -> Object:
        found: Object = json.loads(self("get", "-ojson", *arguments))
        return found

    def namespace(self, name: str, labels: dict[str, str] | None = None) -> str:
        self.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}}
        )
        return name
