"""Where things are: this checkout, the cache shared by all checkouts, and the state of this one's cluster."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "TRIBUTARY_CACHE"
STATE_VARIABLE = "TRIBUTARY_STATE"
OWNER_FILE = "checkout"
STATE_DEFAULT = Path("/var/lib/tributary")


def checkout() -> Path:
    """The root of the working tree that this module lies in."""
    return Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "tributary").absolute()


def state_root() -> Path:
    return Path(os.environ.get(STATE_VARIABLE) or STATE_DEFAULT).absolute()


def cluster_id(identity: str) -> str:
    """Eight hex digits: short enough for an interface name, long enough for the checkouts of one machine."""
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ClusterPlaces:
    """Every path of one cluster. All lie below `root`, so that removing `root` forgets the cluster."""

    id: str
    root: Path

    @classmethod
    def of(cls, identity: str | None = None) -> ClusterPlaces:
        """The places of the cluster called `identity`, by default of this checkout."""
        name = cluster_id(identity or str(checkout()))
        return cls(name, state_root() / name)

    @classmethod
    def of_checkout(cls) -> list[ClusterPlaces]:
        """The places of every cluster that was made from this checkout, whatever its identity."""
        owners = state_root().glob(f"*/{OWNER_FILE}")
        roots = sorted(path.parent for path in owners if path.read_text() == str(checkout()))
        return [cls(root.name, root) for root in roots]

    def claim(self) -> None:
        """Write down which checkout this cluster is of."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / OWNER_FILE).write_text(str(checkout()))

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def s3(self) -> Path:
        return self.root / "s3"

    @property
    def kubelet(self) -> Path:
        return self.root / "kubelet"

    @property
    def containerd(self) -> Path:
        return self.root / "containerd"

    @property
    def containerd_socket(self) -> Path:
        return self.root / "containerd.sock"

    @property
    def admin_kubeconfig(self) -> Path:
        return self.config / "admin.kubeconfig"

    @property
    def lock(self) -> Path:
        """Held by whoever changes this cluster. Beside `root`, because `down` removes `root`."""
        return self.root.with_name(f"{self.id}.lock")

    @property
    def cgroup(self) -> str:
        """The cgroup that all pods of this cluster lie in."""
        return f"/tributary-{self.id}"

    @property
    def interface(self) -> str:
        """The host's end of the cable to the node; an interface name has at most 15 characters."""
        return f"trib-{self.id}"
