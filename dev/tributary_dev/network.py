"""One /16 per cluster: the cable between host and node, the pods and the Services.

The host reaches pods and Services by routes over that cable, so each cluster of a machine needs a range of
its own. It is claimed for as long as the cluster's state exists, which keeps addresses stable.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tributary_dev.locks import file_lock
from tributary_dev.places import ClusterPlaces
from tributary_dev.shell import run, succeeds

SUBNET_FILE = "subnet"
# Sixty-four ranges in the upper part of 10/8, where neither home routers nor cloud defaults usually are.
SUBNETS = tuple(IPv4Network(f"10.{second}.0.0/16") for second in range(160, 224))


class NoSubnetError(RuntimeError):
    """Every range is taken by another cluster or by a route of this machine."""


@dataclass(frozen=True)
class Subnet:
    """The addresses of one cluster, all of them inside `network` (a /16)."""

    network: IPv4Network

    @property
    def cable(self) -> IPv4Network:
        return IPv4Network((self.network.network_address, 30))

    @property
    def host(self) -> IPv4Address:
        return self.cable[1]

    @property
    def node(self) -> IPv4Address:
        """The node's address: of the API server, the S3 server and the cluster's DNS server."""
        return self.cable[2]

    @property
    def pods(self) -> IPv4Network:
        return list(self.network.subnets(new_prefix=18))[1]

    @property
    def services(self) -> IPv4Network:
        return list(self.network.subnets(new_prefix=18))[2]

    @property
    def kubernetes_service(self) -> IPv4Address:
        """The API server takes the first Service address for itself."""
        return self.services[1]


def free_subnet(taken: Iterable[IPv4Network]) -> Subnet:
    """The first range that overlaps none of `taken`."""
    occupied = list(taken)
    for network in SUBNETS:
        if not any(network.overlaps(other) for other in occupied):
            return Subnet(network)
    raise NoSubnetError(
        f"none of {SUBNETS[0]} … {SUBNETS[-1]} is free on this machine: take down clusters that you no "
        "longer need with `python -m tributary_dev down` in their checkouts"
    )


def claim_subnet(place: ClusterPlaces) -> Subnet:
    """The range of this cluster: the one it has, or a free one that is then its own."""
    own = place.root / SUBNET_FILE
    with file_lock(_claims_lock(place)):
        if own.exists():
            return Subnet(IPv4Network(own.read_text()))
        claimed = [IPv4Network(file.read_text()) for file in place.root.parent.glob(f"*/{SUBNET_FILE}")]
        subnet = free_subnet([*claimed, *_host_routes()])
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(str(subnet.network))
    return subnet


def forget_claims(place: ClusterPlaces) -> bool:
    """Whether no cluster of this machine claims a range any more; then the lock file goes too."""
    with file_lock(_claims_lock(place)):
        unused = not any(place.root.parent.glob(f"*/{SUBNET_FILE}"))
        if unused:
            _claims_lock(place).unlink()
    return unused


def _claims_lock(place: ClusterPlaces) -> Path:
    return place.root.with_name("subnets.lock")


def _host_routes() -> list[IPv4Network]:
    rows = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]) or "[]")
    named = [str(row.get("dst", "default")) for row in rows]
    return [ipaddress.IPv4Network(name, strict=False) for name in named if name[0].isdigit()]


def connect(place: ClusterPlaces, subnet: Subnet, node_pid: int) -> None:
    """Lay the cable from the host into the node's namespace, and route the cluster's ranges over it."""
    inside = ["nsenter", f"--net=/proc/{node_pid}/ns/net", "ip"]
    cable, end = place.interface, "eth0"
    if not succeeds(["ip", "link", "show", cable]):
        run(["ip", "link", "add", cable, "type", "veth", "peer", "name", end, "netns", str(node_pid)])
    run(["ip", "addr", "replace", f"{subnet.host}/{subnet.cable.prefixlen}", "dev", cable])
    run(["ip", "link", "set", cable, "up"])
    run([*inside, "link", "set", "lo", "up"])
    run([*inside, "addr", "replace", f"{subnet.node}/{subnet.cable.prefixlen}", "dev", end])
    run([*inside, "link", "set", end, "up"])
    for network in (subnet.pods, subnet.services):
        run(["ip", "route", "replace", str(network), "via", str(subnet.node), "dev", cable])


def disconnect(place: ClusterPlaces) -> None:
    """Pull the cable; the kernel drops its routes. It is gone already when the node's namespace is."""
    succeeds(["ip", "link", "delete", place.interface])
