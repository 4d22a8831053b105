"""The configuration files of a cluster's programs, as data; `write` puts them on disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from tributary_dev.network import Subnet
from tributary_dev.pki import ADMIN, NODE_NAME, PROXY
from tributary_dev.places import ClusterPlaces

PAUSE_IMAGE = "localhost/tributary-pause:dev"
DNS_HEALTH_PORT = 8080
CLUSTER_DOMAIN = "cluster.local"
PODS_MAX = 250

Json = str | int | bool | list["Json"] | dict[str, "Json"]


def render(place: ClusterPlaces, subnet: Subnet, binaries: Path) -> dict[str, str]:
    """Every configuration file by name, the name being relative to the cluster's config directory."""
    return {
        "containerd.toml": toml(containerd(place, binaries)),
        "cni/10-pods.conflist": json.dumps(cni(place, subnet), indent=1),
        "kubelet.yaml": yaml.safe_dump(kubelet(place, subnet)),
        "proxy.yaml": yaml.safe_dump(proxy(place, subnet)),
        "Corefile": corefile(place, subnet),
        "resolv.conf": f"nameserver {subnet.node}\n",
    }


def write(place: ClusterPlaces, files: Mapping[str, str]) -> None:
    """Write what changed and touch nothing else: kube-proxy ends itself when its file is written."""
    for name, text in files.items():
        path = place.config / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def toml(document: Mapping[str, object], prefix: str = "") -> str:
    """TOML text of nested mappings. Strings without control characters, numbers and lists are as in JSON."""
    lines, tables = [], []
    for key, value in document.items():
        name = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, Mapping):
            path = f"{prefix}{name}"
            tables.append(f"[{path}]\n{toml(value, f'{path}.')}")
        else:
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines + tables)


def containerd(place: ClusterPlaces, binaries: Path) -> dict[str, Json]:
    return {
        "version": 3,
        "root": str(place.containerd / "root"),
        "state": "/run/containerd",
        "temp": str(place.containerd / "temp"),
        # Both would create directories outside this cluster's root, and nothing here uses them.
        "disabled_plugins": ["io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"],
        "grpc": {"address": str(place.containerd_socket)},
        "plugins": {
            "io.containerd.cri.v1.images": {
                # A layer is kept unpacked only: the worker's image alone has 6 GB of them.
                "discard_unpacked_layers": True,
                "pinned_images": {"sandbox": PAUSE_IMAGE},
            },
            "io.containerd.cri.v1.runtime": {
                # Without CAP_SYS_RESOURCE (a container, some CI) pods could not start otherwise.
                "restrict_oom_score_adj": True,
                "cni": {"bin_dirs": [str(binaries)], "conf_dir": str(place.config / "cni")},
            },
        },
    }


def cni(place: ClusterPlaces, subnet: Subnet) -> dict[str, Json]:
    """Routed pods: each has a cable of its own to the node, and no way out of the cluster."""
    addresses: Json = {
        "type": "host-local",
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": str(subnet.pods)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "1.0.0",
        "name": f"tributary-{place.id}",
        "plugins": [{"type": "ptp", "ipam": addresses}],
    }


def kubelet(place: ClusterPlaces, subnet: Subnet) -> dict[str, Json]:
    never = ("nodefs.available", "nodefs.inodesFree", "imagefs.available", "imagefs.inodesFree")
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(place.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": place.cgroup,
        "clusterDNS": [str(subnet.node)],
        "clusterDomain": CLUSTER_DOMAIN,
        "containerRuntimeEndpoint": f"unix://{place.containerd_socket}",
        # The developer's disk may be nearly full for reasons of its own; the doctor looks at it instead.
        "evictionHard": {"memory.available": "100Mi", **dict.fromkeys(never, "0%")},
        "failCgroupV1": False,
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "maxPods": PODS_MAX,
        "podLogsDir": "/var/log/pods",
        "resolvConf": str(place.config / "resolv.conf"),
        "volumePluginDir": str(place.kubelet / "volume-plugins"),
    }


def proxy(place: ClusterPlaces, subnet: Subnet) -> dict[str, Json]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(place.config / f"{PROXY.name}.kubeconfig")},
        "clusterCIDR": str(subnet.pods),
        # Connection tracking limits belong to the host; a network namespace may not change them.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
        "hostnameOverride": NODE_NAME,
        "mode": "iptables",
    }


def corefile(place: ClusterPlaces, subnet: Subnet) -> str:
    """Names of the cluster, and a prompt NXDOMAIN for everything else: pods have no internet."""
    kubeconfig = place.config / f"{ADMIN.name}.kubeconfig"
    return f"""\
{CLUSTER_DOMAIN}:53 in-addr.arpa:53 {{
    bind {subnet.node}
    errors
    health {subnet.node}:{DNS_HEALTH_PORT}
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{
        kubeconfig {kubeconfig}
    }}
}}
.:53 {{
    bind {subnet.node}
    errors
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
