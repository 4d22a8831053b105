"""Bring the cluster of this checkout up, find it again, repair it, take it down.

`up` is declarative: it writes what shall run and lays what is missing, so the same call starts a cluster,
reuses a healthy one and mends a half-running one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tributary_dev import build, cgroups, configs, health, images, network, node, pki
from tributary_dev.doctor import require_machine
from tributary_dev.locks import file_lock, is_held
from tributary_dev.network import Subnet
from tributary_dev.places import ClusterPlaces
from tributary_dev.programs import ProgramList
from tributary_dev.progress import note
from tributary_dev.s3 import S3_PORT, S3_REGION, S3Server, root_credentials

READY_SECONDS = 120.0
NODE_START_SECONDS = 20.0
NODE_STOP_SECONDS = 30.0
# The CNI library writes here whatever it is told; the node mounts a directory of its own over it.
CNI_CACHE = Path(node.CNI_CACHE)


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Its addresses are the same for the host and for pods."""

    place: ClusterPlaces
    subnet: Subnet
    bin: Path
    """The directory with `kubectl`, `helm` and the other programs."""
    s3: S3Server

    @property
    def kubeconfig(self) -> Path:
        return self.place.admin_kubeconfig

    @property
    def images(self) -> dict[str, str]:
        """Reference by digest of each image that was loaded into this cluster: `worker`, `operator`."""
        return images.loaded_references(self.place)

    def host_pid(self, program: str) -> int:
        """The process id of one of the cluster's programs (`kubelet`, `etcd` …) as the host counts.

        Raises LookupError when it does not run.
        """
        node_pid = _node_pid(self.place)
        for pid in Path(f"/proc/{node_pid}/task/{node_pid}/children").read_text().split():
            with suppress(FileNotFoundError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if argv[0].decode() == str(self.bin / program):
                    return int(pid)
        raise LookupError(f"{program} does not run in cluster {self.place.id}")


def prepare(names: Sequence[str] = images.IMAGE_NAMES) -> None:
    """Build the programs and the named images, both at once: one waits for the network, the other computes.

    What is built already costs no time. Raises MachineError or CommandError, as `up` does.
    """
    require_machine(build.disk_bytes_to_build() + images.disk_bytes_to_build(names))
    with ThreadPoolExecutor() as pool:
        programs, references = pool.submit(build.binaries), pool.submit(images.image_references, names)
        programs.result()
        references.result()


def up(*, fresh: bool = False, nodes: int = 1, identity: str | None = None) -> Cluster:
    """The running cluster of this checkout; starts, completes or mends it as needed.

    fresh: forget all Kubernetes and S3 objects first (not the images).
    nodes: 0 for the API server, controllers and S3 only; a later call with 1 adds the node that runs pods.
    identity: another name than this checkout's path, for a cluster beside the usual one.
    Raises MachineError, CommandError or UnhealthyError, each with what to do or what was logged.
    """
    require_machine(build.disk_bytes_to_build())
    binaries = build.binaries()
    place = ClusterPlaces.of(identity)
    with file_lock(place.lock):
        if fresh:
            _stop(place)
            _forget_objects(place)
        try:
            return _converge(place, binaries, nodes)
        except health.UnhealthyError as error:
            note(f"{error}\nStarting the cluster's processes anew")
            _stop(place)
            return _converge(place, binaries, nodes)


def down(*, keep_images: bool = False, identity: str | None = None) -> None:
    """Take a cluster and all its state away; `keep_images` spares what was loaded and the addresses."""
    _down(ClusterPlaces.of(identity), keep_images)


def down_all(*, keep_images: bool = False) -> None:
    """Take away every cluster of this checkout: the usual one and those that tests made beside it."""
    for place in ClusterPlaces.of_checkout():
        _down(place, keep_images)


def _down(place: ClusterPlaces, keep_images: bool) -> None:
    with file_lock(place.lock):
        _stop(place)
        if keep_images:
            _forget_objects(place)
        else:
            _forget_everything(place)


def find(identity: str | None = None) -> Cluster | None:
    """The cluster of this checkout if its processes run, healthy or not."""
    place = ClusterPlaces.of(identity)
    if not is_held(place.root / node.LOCK_FILE):
        return None
    return _cluster(place, network.claim_subnet(place), build.binaries())


def environment(cluster: Cluster) -> dict[str, str]:
    """What a shell needs to talk to the cluster with kubectl, helm and any S3 client."""
    return {
        "KUBECONFIG": str(cluster.kubeconfig),
        "PATH": f"{cluster.bin}:$PATH",
        "AWS_ENDPOINT_URL_S3": cluster.s3.endpoint_for_host,
        "AWS_REGION": cluster.s3.region,
        "AWS_ACCESS_KEY_ID": cluster.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key,
    }


def ensure_images(cluster: Cluster, names: Sequence[str]) -> dict[str, str]:
    """Build the named images (`worker`, `operator`) if needed and load them; their references by digest."""
    return images.load(cluster.place, cluster.bin, names)


def is_healthy(identity: str | None = None) -> bool:
    """Whether the cluster runs and every part that was started answers."""
    running = find(identity)
    return running is not None and all(check.passes() for check in _checks(running))


def status(identity: str | None = None) -> str:
    """What runs, for people: a line per program and a line per check."""
    running = find(identity)
    if running is None:
        return "No cluster of this checkout runs."
    lines = [f"cluster {running.place.id} at {running.subnet.node}, state in {running.place.root}"]
    for name, row in node.read_running(running.place.root).items():
        lines.append(f"  {name:<26} {'runs' if row['pid'] else 'is dead'}, started {row['starts']} times")
    lines += [
        f"  {check.what:<26} {'healthy' if check.passes() else 'UNHEALTHY'}" for check in _checks(running)
    ]
    return "\n".join(lines)


def _checks(running: Cluster) -> list[health.Check]:
    place, subnet = running.place, running.subnet
    checks = health.control_plane_checks(place, subnet)
    return checks + (health.node_checks(place, subnet) if _runs_pods(place) else [])


def _runs_pods(place: ClusterPlaces) -> bool:
    return any(program.name == "kubelet" for program in node.read_programs(place.root))


def _cluster(place: ClusterPlaces, subnet: Subnet, binaries: Path) -> Cluster:
    endpoint = f"http://{subnet.node}:{S3_PORT}"
    s3 = S3Server(endpoint, endpoint, S3_REGION, *root_credentials(place), binaries / "versitygw")
    return Cluster(place, subnet, binaries, s3)


def _converge(place: ClusterPlaces, binaries: Path, nodes: int) -> Cluster:
    for directory in (
        place.root,
        place.logs,
        place.etcd,
        place.s3 / "users",
        place.s3 / "buckets",
        place.s3 / "metadata",
        place.kubelet,
    ):
        directory.mkdir(parents=True, exist_ok=True)
    place.etcd.chmod(0o700)
    place.claim()
    subnet = network.claim_subnet(place)
    pki.create(place, subnet)
    cluster = _cluster(place, subnet, binaries)
    programs = _programs(cluster)
    alive = is_held(place.root / node.LOCK_FILE)
    if not alive:
        _start_node(place)
    network.connect(place, subnet, _node_pid(place))
    with_node = nodes > 0 or _runs_pods(place)
    node.write_programs(place.root, programs.control_plane() + (programs.node() if with_node else []))
    _wait(cluster, with_node)
    return cluster


def _programs(cluster: Cluster) -> ProgramList:
    files = configs.render(cluster.place, cluster.subnet, cluster.bin)
    configs.write(cluster.place, files)
    s3_env = {"ROOT_ACCESS_KEY": cluster.s3.access_key, "ROOT_SECRET_KEY": cluster.s3.secret_key}
    return ProgramList(cluster.place, cluster.subnet, cluster.bin, files, s3_env)


def _wait(cluster: Cluster, with_node: bool) -> None:
    place, subnet = cluster.place, cluster.subnet
    if with_node:
        images.load_pause(place, cluster.bin)
    health.wait_for(health.control_plane_checks(place, subnet), place.logs, READY_SECONDS)
    if with_node:
        health.wait_for(health.node_checks(place, subnet), place.logs, READY_SECONDS)


def _start_node(place: ClusterPlaces) -> None:
    """Start process 1 of a new cluster. What an earlier one left (a killed one, a reboot) goes first."""
    _clear_residue(place)
    (place.root / node.PID_FILE).unlink(missing_ok=True)
    (place.root / node.PROGRAMS_FILE).unlink(missing_ok=True)
    cgroups.create(place.cgroup)
    CNI_CACHE.mkdir(parents=True, exist_ok=True)
    namespaces = ["unshare", "--mount", "--net", "--ipc", "--pid", "--fork"]
    main = [sys.executable, "-m", node.__name__, str(place.root)]
    with (place.logs / "node.log").open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", *namespaces, *main],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )
    deadline = time.monotonic() + NODE_START_SECONDS
    while not (place.root / node.PID_FILE).exists():
        if time.monotonic() > deadline:
            raise health.UnhealthyError(f"the node did not start: see {place.logs / 'node.log'}")
        time.sleep(0.05)


def _node_pid(place: ClusterPlaces) -> int:
    return int((place.root / node.PID_FILE).read_text())


def _stop(place: ClusterPlaces) -> None:
    """Kill the node; the kernel then ends everything that lives in its namespaces."""
    if is_held(place.root / node.LOCK_FILE):
        pid = _node_pid(place)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + NODE_STOP_SECONDS
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {pid} (the node) does not die: is a disk or a mount stuck?")
            time.sleep(0.05)
    _clear_residue(place)


def _clear_residue(place: ClusterPlaces) -> None:
    cgroups.remove(place.cgroup)
    network.disconnect(place)


def _forget_everything(place: ClusterPlaces) -> None:
    if place.root.exists():
        shutil.rmtree(place.root)
    if network.forget_claims(place):  # nothing that the clusters of this machine share is used any more
        with suppress(OSError):
            CNI_CACHE.rmdir()
    place.lock.unlink(missing_ok=True)
    with suppress(OSError):
        place.root.parent.rmdir()


def _forget_objects(place: ClusterPlaces) -> None:
    for directory in (place.etcd, place.s3, place.kubelet, place.logs, place.root / "var-log"):
        shutil.rmtree(directory, ignore_errors=True)
