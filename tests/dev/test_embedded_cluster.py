"""The embedded cluster is a real one: pods run, reach Services, S3 and the API server. It leaves no trace."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tributary_dev import cgroups, cluster
from tributary_dev.cluster import Cluster
from tributary_dev.configs import PAUSE_IMAGE
from tributary_dev.network import SUBNETS
from tributary_dev.node import read_running
from tributary_dev.places import ClusterPlaces
from tributary_dev.shell import run

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

WAIT = "--timeout=120s"

PROBE = """
import json, os, socket, ssl, time, urllib.request
def get(url, **options):
    with urllib.request.urlopen(url, timeout=10, **options) as answer:
        return answer.read().decode()
def until_it_answers(url):
    for _ in range(60):
        try:
            return get(url)
        except OSError:
            time.sleep(0.5)
    return get(url)
folder = "/var/run/secrets/kubernetes.io/serviceaccount/"
token = open(folder + "token").read()
review = urllib.request.Request(
    "https://kubernetes.default.svc/apis/authentication.k8s.io/v1/selfsubjectreviews",
    data=b'{"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}',
    headers={"Authorization": "Bearer " + token, "Content-Type": "application/json"},
)
try:
    socket.getaddrinfo("somewhere.example", 80)
    outside = "resolves"
except socket.gaierror:
    outside = "unknown"
print(json.dumps({
    "service": until_it_answers("http://web/hostname"),
    "long_name": socket.gethostbyname("web." + os.environ["NAMESPACE"] + ".svc.cluster.local"),
    "s3": get(os.environ["S3"] + "/health"),
    "user": json.loads(get(review, context=ssl.create_default_context(cafile=folder + "ca.crt")))
        ["status"]["userInfo"]["username"],
    "outside": outside,
    "uid": os.getuid(),
}))
"""

SERVE = "hostname > /tmp/hostname && exec python -m http.server --directory /tmp 8080"


def kubectl(running: Cluster, *arguments: str, stdin: str | None = None) -> str:
    return run([running.bin / "kubectl", "--kubeconfig", running.kubeconfig, *arguments], stdin=stdin)


def apply(running: Cluster, namespace: str, *documents: dict[str, Any]) -> None:
    for document in documents:
        kubectl(running, "apply", "--namespace", namespace, "-f", "-", stdin=json.dumps(document))


def pod(
    name: str, image: str, command: list[str], env: dict[str, str], labels: dict[str, str]
) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "command": command,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "securityContext": {"readOnlyRootFilesystem": True, "runAsNonRoot": True},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {"restartPolicy": "Never", "containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


@pytest.fixture
def running() -> Cluster:
    return cluster.up()


@pytest.fixture
def namespace(running: Cluster) -> Iterator[str]:
    name = f"smoke-{uuid4().hex[:8]}"
    kubectl(running, "create", "namespace", name)
    yield name
    kubectl(running, "delete", "namespace", name, "--wait=false")


def test_pods_reach_services_s3_and_the_api_server(running: Cluster, namespace: str) -> None:
    image = cluster.ensure_images(running, ["operator"])["operator"]
    port = {"port": 80, "targetPort": 8080}
    web = {"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [port]}}
    env = {"S3": running.s3.endpoint_for_pods, "NAMESPACE": namespace}
    apply(
        running,
        namespace,
        {"apiVersion": "v1", "kind": "Service", **web},
        pod("web", image, ["sh", "-c", SERVE], {}, {"app": "web"}),
        pod("probe", image, ["python", "-c", PROBE], env, {}),
    )
    done = "--for=jsonpath={.status.phase}=Succeeded"
    kubectl(running, "wait", "--namespace", namespace, "pod/probe", done, WAIT)
    seen = json.loads(kubectl(running, "logs", "--namespace", namespace, "probe"))
    service = kubectl(
        running, "get", "service", "web", "--namespace", namespace, "-o=jsonpath={.spec.clusterIP}"
    )
    assert seen["service"] == "web\n"
    assert seen["long_name"] == service
    assert seen["user"] == f"system:serviceaccount:{namespace}:default"
    assert seen["outside"] == "unknown"
    assert seen["uid"] == 65532
    with urllib.request.urlopen(f"http://{service}/hostname", timeout=10) as answer:
        assert answer.read() == b"web\n", "the host reaches Services too"


def test_up_finds_the_running_cluster(running: Cluster) -> None:
    before = read_running(running.place.root)
    assert cluster.up() == running
    time.sleep(2)
    assert read_running(running.place.root) == before, "nothing was started again"
    assert cluster.is_healthy()


def traces_of(place: ClusterPlaces) -> list[str]:
    """Everything on this machine that still tells of a cluster."""
    traces = [str(path) for path in (place.root, place.lock) if path.exists()]
    for tree in cgroups.hierarchies():
        traces += [str(path) for path in tree.rglob(f"*{place.id}*")]
    for listing in (["ip", "link"], ["ip", "route", "show", "table", "all"], ["mount"], ["iptables-save"]):
        traces += [line for line in run(listing).splitlines() if place.id in line]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.id.encode() in process.read_bytes():
                traces.append(f"process {process}")
        except OSError:
            continue
    return traces


@pytest.fixture
def other() -> Iterator[str]:
    """The name of a cluster beside the usual one."""
    identity = f"test {uuid4()}"
    yield identity
    cluster.down(identity=identity)


def start_pod(running: Cluster) -> None:
    sleeper = pod("sleeper", PAUSE_IMAGE, ["/pause"], {}, {})
    sleeper["spec"]["restartPolicy"] = "Always"
    apply(running, "default", sleeper)
    kubectl(running, "wait", "pod/sleeper", "--for=condition=Ready", WAIT)


def test_a_cluster_is_mended_and_goes_without_trace(other: str) -> None:
    place = ClusterPlaces.of(other)
    running = cluster.up(identity=other)
    assert running.subnet.network in SUBNETS
    start_pod(running)

    for program in ("containerd", "etcd", "kubelet"):
        os.kill(running.host_pid(program), signal.SIGKILL)
    assert cluster.up(identity=other).subnet == running.subnet
    kubectl(running, "get", "pod/sleeper")

    run(["ip", "link", "delete", place.interface])
    cluster.up(identity=other)

    node_pid = int((place.root / "node.pid").read_text())
    os.kill(node_pid, signal.SIGKILL)
    cluster.up(identity=other)
    kubectl(running, "wait", "pod/sleeper", "--for=condition=Ready", WAIT)

    cluster.up(fresh=True, identity=other)
    left = kubectl(running, "get", "pods", "--output=name")
    assert left == ""
    assert PAUSE_IMAGE in run(
        [running.bin / "ctr", "-a", place.containerd_socket, "-n", "k8s.io", "images", "ls", "-q"]
    )

    os.kill(running.host_pid("kubelet"), signal.SIGKILL)
    cluster.down(identity=other)
    assert traces_of(place) == []


def test_the_control_plane_comes_up_alone_and_is_completed(other: str) -> None:
    running = cluster.up(nodes=0, identity=other)
    with pytest.raises(LookupError):
        running.host_pid("kubelet")
    cluster.up(identity=other)
    running.host_pid("kubelet")
    before = running.host_pid("kube-apiserver")
    cluster.up(nodes=0, identity=other)
    assert running.host_pid("kube-apiserver") == before
    running.host_pid("kubelet")
    assert subprocess.run(["ip", "link", "show", running.place.interface], check=False).returncode == 0
