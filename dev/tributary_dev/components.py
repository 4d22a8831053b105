"""What the embedded cluster is made of: each component is a Go module at one version.

The list is data; `go_mod` and `key` turn it into a module file to build from and a name to cache under.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

# The newest `go` line among the modules below; the doctor compares the installed Go with it.
GO_VERSION_MIN = (1, 25)

KUBERNETES_VERSION = "v1.35.4"
# Kubernetes publishes its own parts as modules of their own, with major version 0 instead of 1.
KUBERNETES_STAGING_VERSION = "v0.35.4"


@dataclass(frozen=True)
class Component:
    """Programs that are built together from one module."""

    name: str
    module: str
    version: str
    packages: tuple[str, ...]
    """Paths of the main packages below the module; "" is the module itself, which is then named `name`."""
    tags: tuple[str, ...] = ()
    stamps: tuple[tuple[str, str], ...] = ()
    """Go variables that carry the version, and what to write into them."""
    staging_version: str | None = None
    """Version of the modules that `module` requires at v0.0.0, which exist in its source tree only."""

    @property
    def programs(self) -> tuple[str, ...]:
        return tuple(PurePosixPath(package).name or self.name for package in self.packages)

    @property
    def import_paths(self) -> tuple[str, ...]:
        return tuple(f"{self.module}/{package}".rstrip("/") for package in self.packages)

    @property
    def linker_flags(self) -> str:
        """No symbol tables (half the size), and the version, without which the node calls itself v0.0.0."""
        return " ".join(["-s", "-w", *(f"-X {variable}={value}" for variable, value in self.stamps)])


def _kubernetes_stamps() -> tuple[tuple[str, str], ...]:
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    values = {"gitMajor": major, "gitMinor": minor, "gitVersion": KUBERNETES_VERSION, "gitTreeState": "clean"}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return tuple((f"{package}.{name}", value) for package in packages for name, value in values.items())


CONTAINERD = Component(
    "containerd",
    "github.com/containerd/containerd/v2",
    "v2.2.1",
    ("cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"),
    tags=("no_btrfs", "no_devmapper", "no_zfs", "no_aufs"),
    stamps=(("github.com/containerd/containerd/v2/version.Version", "v2.2.1"),),
)
KUBERNETES = Component(
    "kubernetes",
    "k8s.io/kubernetes",
    KUBERNETES_VERSION,
    (
        "cmd/kube-apiserver",
        "cmd/kube-controller-manager",
        "cmd/kube-scheduler",
        "cmd/kubelet",
        "cmd/kube-proxy",
        "cmd/kubectl",
    ),
    stamps=_kubernetes_stamps(),
    staging_version=KUBERNETES_STAGING_VERSION,
)
# `ptp` rather than `bridge`: pod traffic is routed, so Services need neither br_netfilter nor a bridge.
CNI_PLUGINS = Component(
    "cni-plugins",
    "github.com/containernetworking/plugins",
    "v1.9.1",
    ("plugins/main/ptp", "plugins/main/loopback", "plugins/ipam/host-local"),
)
ETCD = Component("etcd", "go.etcd.io/etcd/server/v3", "v3.6.7", ("",))
COREDNS = Component("coredns", "github.com/coredns/coredns", "v1.12.4", ("",))
HELM = Component("helm", "helm.sh/helm/v4", "v4.1.4", ("cmd/helm",))
VERSITYGW = Component("versitygw", "github.com/versity/versitygw", "v1.8.0", ("cmd/versitygw",))

COMPONENTS = (CONTAINERD, CNI_PLUGINS, KUBERNETES, ETCD, VERSITYGW, COREDNS, HELM)


def staged_modules(go_mod_text: str) -> tuple[str, ...]:
    """The modules that a go.mod requires at v0.0.0: its own parts, which a stranger must replace."""
    return tuple(re.findall(r"^\s*(?:require\s+)?(\S+) v0\.0\.0$", go_mod_text, re.MULTILINE))


def go_mod(component: Component, staged: Sequence[str] = ()) -> str:
    """The go.mod of a module whose only purpose is to build `component`."""
    if staged and component.staging_version is None:
        raise ValueError(f"{component.name} requires {staged[0]} at v0.0.0: give it a staging_version")
    major, minor = GO_VERSION_MIN
    lines = [
        f"module tributary.dev/build/{component.name}",
        f"go {major}.{minor}.0",
        f"require {component.module} {component.version}",
        *(f"replace {module} => {module} {component.staging_version}" for module in staged),
    ]
    return "\n".join(lines) + "\n"


def key(*components: Component) -> str:
    """What the built programs depend on: versions, flags and the architecture, in 12 hex digits."""
    facts = [platform.machine(), *(asdict(component) for component in components)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
