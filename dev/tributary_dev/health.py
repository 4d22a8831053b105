"""Whether the parts of a cluster answer, and what to show when one does not."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from tributary_dev.configs import DNS_HEALTH_PORT
from tributary_dev.network import Subnet
from tributary_dev.pki import ADMIN, API_PORT, NODE_NAME
from tributary_dev.places import ClusterPlaces
from tributary_dev.s3 import S3_PORT

PROXY_HEALTH_PORT = 10256
REQUEST_SECONDS = 5.0
LOG_TAIL_LINES = 12


class UnhealthyError(RuntimeError):
    """A part of the cluster did not come up in time; the message ends with its log."""


@dataclass(frozen=True)
class Check:
    """One question to a running cluster."""

    what: str
    program: str
    """Whose log explains a `False`."""
    passes: Callable[[], bool]


def control_plane_checks(place: ClusterPlaces, subnet: Subnet) -> list[Check]:
    return [
        Check("S3 server", "versitygw", lambda: _answers(subnet.node, S3_PORT, "/health")),
        Check("API server", "kube-apiserver", lambda: _api(place, subnet, "/readyz") is not None),
        Check(
            "controllers",
            "kube-controller-manager",
            lambda: _api(place, subnet, "/api/v1/namespaces/default/serviceaccounts/default") is not None,
        ),
    ]


def node_checks(place: ClusterPlaces, subnet: Subnet) -> list[Check]:
    return [
        Check("node", "kubelet", lambda: _is_node_ready(place, subnet)),
        Check("Services", "kube-proxy", lambda: _answers(subnet.node, PROXY_HEALTH_PORT, "/healthz")),
        Check("DNS", "coredns", lambda: _answers(subnet.node, DNS_HEALTH_PORT, "/health")),
    ]


def wait_for(checks: Sequence[Check], logs: Path, timeout_seconds: float) -> None:
    """Wait until every check passes. Raises UnhealthyError for the first that does not in time."""
    deadline = time.monotonic() + timeout_seconds
    for check in checks:
        while not check.passes():
            if time.monotonic() > deadline:
                tail = _tail(logs / f"{check.program}.log")
                raise UnhealthyError(f"{check.what}: not ready after {timeout_seconds:.0f} s.\n{tail}")
            time.sleep(0.2)


def _tail(log: Path) -> str:
    if not log.exists():
        return f"{log} was never written: the program was not started"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"The end of {log}:", *lines])


def _answers(address: IPv4Address, port: int, path: str) -> bool:
    return _get(http.client.HTTPConnection(str(address), port, timeout=REQUEST_SECONDS), path) is not None


def _api(place: ClusterPlaces, subnet: Subnet, path: str) -> bytes | None:
    context = ssl.create_default_context(cafile=place.pki / "ca.crt")
    context.load_cert_chain(place.pki / f"{ADMIN.name}.crt", place.pki / f"{ADMIN.name}.key")
    node = str(subnet.node)
    return _get(http.client.HTTPSConnection(node, API_PORT, timeout=REQUEST_SECONDS, context=context), path)


def _get(connection: http.client.HTTPConnection, path: str) -> bytes | None:
    """The body of a successful answer. No proxy of the environment is asked, unlike with urllib."""
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except OSError:
        return None
    finally:
        connection.close()
    return body if answer.status == http.client.OK else None


def _is_node_ready(place: ClusterPlaces, subnet: Subnet) -> bool:
    body = _api(place, subnet, f"/api/v1/nodes/{NODE_NAME}")
    if body is None:
        return False
    conditions = json.loads(body)["status"].get("conditions", [])
    return any(row["type"] == "Ready" and row["status"] == "True" for row in conditions)
