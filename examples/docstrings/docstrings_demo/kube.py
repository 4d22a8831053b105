"""The cluster as the demo's user sees it: kubectl and helm change it, plain reads watch it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from kubernetes import config
from urllib3.exceptions import HTTPError

from docstrings_demo.problems import DemoError
from tributary_api.base import GROUP, VERSION

Object = dict[str, Any]

FIELD_MANAGER = "docstrings-demo"
REQUEST_TIMEOUT_SECONDS = 30
HELM_TIMEOUT = "3m"
GROUPS = {
    "pods": "/api/v1",
    "events": "/api/v1",
    "services": "/api/v1",
    "jobs": "/apis/batch/v1",
    "deployments": "/apis/apps/v1",
}
"""API of each kind that is read; all others are our own."""


@dataclass
class Kube:
    """One cluster, by kubeconfig and context."""

    kubeconfig: Path | None
    context: str | None
    bin: Path | None
    """Directory of kubectl and helm; None for those on PATH."""
    _client: Any = field(init=False)

    def __post_init__(self) -> None:
        path = str(self.kubeconfig) if self.kubeconfig else None
        try:
            self._client = config.new_client_from_config(path, self.context)  # type: ignore[no-untyped-call]
        except config.ConfigException as error:
            raise DemoError(
                f"No context {self.context}: {error} `kubectl config get-contexts` lists those that there are"
            ) from error

    def items(self, plural: str, namespace: str | None = None, labels: str = "") -> list[Object]:
        """Objects of a kind, as plain JSON."""
        return list(self._read_json(collection(plural, namespace), labelSelector=labels)["items"])

    def get(self, plural: str, namespace: str, name: str) -> Object | None:
        found = self._read(f"{collection(plural, namespace)}/{name}", ok=(200, 404))
        decoded: Object = json.loads(found)
        return None if decoded.get("kind") == "Status" else decoded

    def log(self, namespace: str, pod: str, tail_lines: int = 200) -> list[str]:
        """The last lines that a pod has written; none if it has not started."""
        path = f"{collection('pods', namespace)}/{pod}/log"
        # 400: the container has not started yet. 404: the pod has gone meanwhile.
        text = self._read(path, ok=(200, 400, 404), tailLines=str(tail_lines))
        lines = text.decode(errors="replace").splitlines()
        return [] if lines and '"kind":"Status"' in lines[0] else lines

    def apply(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Server-side apply; DemoError with kubectl's words if the API server refuses."""
        text = "\n---\n".join(as_json(item) for item in objects)
        self._run(
            "kubectl", ["apply", "--server-side", f"--field-manager={FIELD_MANAGER}", "-f", "-"], stdin=text
        )

    def install(self, release: str, chart: Path, namespace: str, values: Mapping[str, Any]) -> None:
        """Install or upgrade a chart, and wait until what it made is ready."""
        arguments = ["upgrade", "--install", release, str(chart), "--namespace", namespace]
        waiting = ["--create-namespace", "--wait", "--timeout", HELM_TIMEOUT, "--values", "-"]
        self._run("helm", arguments + waiting, stdin=as_json(values))

    def kubectl(self, *arguments: str) -> str:
        return self._run("kubectl", arguments)

    def _run(self, program: str, arguments: Sequence[str], stdin: str = "") -> str:
        path = str(self.bin / program) if self.bin else program
        flags = [f"--kube-context={self.context}" if program == "helm" else f"--context={self.context}"]
        environment = dict(os.environ)
        if self.kubeconfig:
            environment["KUBECONFIG"] = str(self.kubeconfig)
        try:
            done = subprocess.run(
                [path, *(flags if self.context else []), *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
        except FileNotFoundError as error:
            raise DemoError(f"{program} is not installed: put it on PATH") from error
        if done.returncode:
            raise DemoError(f"{program} {' '.join(arguments[:3])} failed:\n{done.stderr.strip()}")
        return done.stdout

    def _read_json(self, path: str, **query: str) -> Object:
        decoded: Object = json.loads(self._read(path, ok=(200,), **query))
        return decoded

    def _read(self, path: str, ok: tuple[int, ...], **query: str) -> bytes:
        wanted = {name: value for name, value in query.items() if value}
        full = f"{path}?{urlencode(wanted)}" if wanted else path
        request = self._client.param_serialize("GET", full, auth_settings=["BearerToken"])
        try:
            answer = self._client.call_api(*request, _request_timeout=REQUEST_TIMEOUT_SECONDS)
            body: bytes = answer.read()
        except HTTPError as error:
            raise DemoError(f"the API server does not answer: {error}") from error
        if answer.status not in ok:
            raise DemoError(f"GET {path}: {answer.status} {body.decode(errors='replace')[:500]}")
        return body


def as_json(item: Mapping[str, Any]) -> str:
    """For kubectl and helm. PyYAML would write the string "1e-5" bare, which YAML 1.2 reads as a number."""
    return json.dumps(dict(item), default=_timestamp)


def _timestamp(value: datetime) -> str:
    """A date that YAML has read as such, in the API's spelling."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def collection(plural: str, namespace: str | None) -> str:
    """URL path of all objects of a kind, in one namespace or in all."""
    base = GROUPS.get(plural, f"/apis/{GROUP}/{VERSION}")
    return f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"
