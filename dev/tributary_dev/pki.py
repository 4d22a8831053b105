"""Certificates and kubeconfigs of a cluster: one authority, one key pair per part of Kubernetes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from tributary_dev.network import Subnet
from tributary_dev.places import ClusterPlaces
from tributary_dev.shell import run

API_PORT = 6443
NODE_NAME = "node"
DAYS = "3650"

Words = list[str | Path]


@dataclass(frozen=True)
class Identity:
    """Who a client certificate says it is: a user and the group that RBAC knows it by."""

    name: str
    user: str
    group: str = ""

    @property
    def subject(self) -> str:
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"


ADMIN = Identity("admin", "admin", "system:masters")
CONTROLLER_MANAGER = Identity("controller-manager", "system:kube-controller-manager")
SCHEDULER = Identity("scheduler", "system:kube-scheduler")
KUBELET = Identity("kubelet", f"system:node:{NODE_NAME}", "system:nodes")
PROXY = Identity("proxy", "system:kube-proxy")
IDENTITIES = (ADMIN, CONTROLLER_MANAGER, SCHEDULER, KUBELET, PROXY)
API_SERVER = Identity("apiserver", "kube-apiserver")


def create(place: ClusterPlaces, subnet: Subnet) -> None:
    """Create what is missing. The authority's key is written last, so a cut-off run is done again."""
    if (place.pki / "complete").exists():
        return
    place.pki.mkdir(parents=True, exist_ok=True)
    place.config.mkdir(parents=True, exist_ok=True)
    _authority(place.pki)
    _service_account_key(place.pki)
    _certificate(place.pki, API_SERVER, _server_names(subnet))
    for identity in IDENTITIES:
        _certificate(place.pki, identity, "extendedKeyUsage=clientAuth")
        path = place.config / f"{identity.name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(kubeconfig(place, subnet, identity)))
    (place.pki / "complete").touch()


def kubeconfig(place: ClusterPlaces, subnet: Subnet, identity: Identity) -> dict[str, object]:
    """A kubeconfig; the same for host and node, because both reach the API server at the node's address."""
    pki, name = place.pki, f"tributary-{place.id}"
    cluster = {
        "server": f"https://{subnet.node}:{API_PORT}",
        "certificate-authority": str(pki / "ca.crt"),
    }
    user = {
        "client-certificate": str(pki / f"{identity.name}.crt"),
        "client-key": str(pki / f"{identity.name}.key"),
    }
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    }


def _server_names(subnet: Subnet) -> str:
    kubernetes = ("kubernetes", "kubernetes.default", "kubernetes.default.svc")
    domains = (*kubernetes, f"{kubernetes[-1]}.cluster.local")
    names = [f"DNS:{domain}" for domain in (*domains, "localhost")]
    names += [f"IP:{address}" for address in ("127.0.0.1", subnet.kubernetes_service, subnet.node)]
    return f"subjectAltName={','.join(names)}"


def _key(path: Path) -> None:
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path])
    path.chmod(0o600)


def _authority(pki: Path) -> None:
    _key(pki / "ca.key")
    request: Words = ["openssl", "req", "-x509", "-new", "-key", pki / "ca.key", "-subj", "/CN=tributary-dev"]
    run([*request, "-days", DAYS, "-out", pki / "ca.crt"])


def _service_account_key(pki: Path) -> None:
    _key(pki / "service-account.key")
    run(["openssl", "ec", "-in", pki / "service-account.key", "-pubout", "-out", pki / "service-account.pub"])


def _certificate(pki: Path, identity: Identity, extension: str) -> None:
    key, request, extensions = (pki / f"{identity.name}.{end}" for end in ("key", "csr", "ext"))
    _key(key)
    extensions.write_text(extension + "\n")
    run(["openssl", "req", "-new", "-key", key, "-subj", identity.subject, "-out", request])
    authority: Words = ["-CA", pki / "ca.crt", "-CAkey", pki / "ca.key", "-CAcreateserial"]
    signed: Words = ["-days", DAYS, "-extfile", extensions, "-out", pki / f"{identity.name}.crt"]
    run(["openssl", "x509", "-req", "-in", request, *authority, *signed])
