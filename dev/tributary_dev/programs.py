"""The programs of a cluster with their arguments: the control plane, and the node that runs pods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tributary_dev.configs import digest
from tributary_dev.network import Subnet
from tributary_dev.node import Program
from tributary_dev.pki import ADMIN, API_PORT, API_SERVER, CONTROLLER_MANAGER, KUBELET, NODE_NAME, SCHEDULER
from tributary_dev.places import ClusterPlaces
from tributary_dev.s3 import S3_PORT, S3_REGION

ETCD_URL = "http://127.0.0.1:2379"
ETCD_PEER_URL = "http://127.0.0.1:2380"
ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass(frozen=True)
class ProgramList:
    """Builds the programs of one cluster from its places, addresses, configuration files and binaries."""

    place: ClusterPlaces
    subnet: Subnet
    binaries: Path
    files: Mapping[str, str]
    s3_env: Mapping[str, str]
    """The administrator's key, given by environment so that it does not show in the list of processes."""

    def control_plane(self) -> list[Program]:
        """What a suite needs that talks to the API server and to S3 but runs no pods."""
        return [self._etcd(), self._s3(), self._api_server(), self._controller_manager()]

    def node(self) -> list[Program]:
        """What it takes to run pods, in addition."""
        return [self._containerd(), self._scheduler(), self._kubelet(), self._proxy(), self._dns()]

    def _program(
        self, name: str, *arguments: str, config: str = "", env: Mapping[str, str] | None = None
    ) -> Program:
        path = {"PATH": f"{self.binaries}:{os.defpath}:/usr/sbin:/sbin"}
        argv = (str(self.binaries / name), *arguments)
        return Program(name, argv, {**path, **(env or {})}, digest(self.files[config]) if config else "")

    def _config(self, name: str) -> str:
        return str(self.place.config / name)

    def _kubeconfig(self, name: str) -> str:
        return f"--kubeconfig={self._config(f'{name}.kubeconfig')}"

    def _etcd(self) -> Program:
        return self._program(
            "etcd",
            f"--data-dir={self.place.etcd}",
            f"--listen-client-urls={ETCD_URL}",
            f"--advertise-client-urls={ETCD_URL}",
            f"--listen-peer-urls={ETCD_PEER_URL}",
            f"--initial-advertise-peer-urls={ETCD_PEER_URL}",
            f"--initial-cluster=default={ETCD_PEER_URL}",
            "--log-level=warn",
        )

    def _s3(self) -> Program:
        s3 = self.place.s3
        address = [f"--port={self.subnet.node}:{S3_PORT}", f"--region={S3_REGION}"]
        server = ["--quiet", "--keep-alive", "--health=/health", f"--iam-dir={s3 / 'users'}"]
        # Policies lie in files of their own: as extended attributes they could have 4 KiB at most on ext4.
        disk = ["posix", f"--sidecar={s3 / 'metadata'}", str(s3 / "buckets")]
        return self._program("versitygw", *address, *server, *disk, env=self.s3_env)

    def _api_server(self) -> Program:
        pki = self.place.pki
        return self._program(
            "kube-apiserver",
            f"--etcd-servers={ETCD_URL}",
            "--bind-address=0.0.0.0",
            f"--advertise-address={self.subnet.node}",
            f"--secure-port={API_PORT}",
            f"--tls-cert-file={pki / API_SERVER.name}.crt",
            f"--tls-private-key-file={pki / API_SERVER.name}.key",
            f"--client-ca-file={pki / 'ca.crt'}",
            f"--service-account-key-file={pki / 'service-account.pub'}",
            f"--service-account-signing-key-file={pki / 'service-account.key'}",
            f"--service-account-issuer={ISSUER}",
            f"--service-cluster-ip-range={self.subnet.services}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--kubelet-client-certificate={pki / ADMIN.name}.crt",
            f"--kubelet-client-key={pki / ADMIN.name}.key",
            # A node's name is in no DNS that the API server asks, so `kubectl logs` needs the address.
            "--kubelet-preferred-address-types=InternalIP",
        )

    def _controller_manager(self) -> Program:
        return self._program(
            "kube-controller-manager",
            self._kubeconfig(CONTROLLER_MANAGER.name),
            f"--service-account-private-key-file={self.place.pki / 'service-account.key'}",
            f"--root-ca-file={self.place.pki / 'ca.crt'}",
            "--use-service-account-credentials",
            f"--cluster-cidr={self.subnet.pods}",
            "--leader-elect=false",
        )

    def _containerd(self) -> Program:
        return self._program(
            "containerd", f"--config={self._config('containerd.toml')}", config="containerd.toml"
        )

    def _scheduler(self) -> Program:
        return self._program("kube-scheduler", self._kubeconfig(SCHEDULER.name), "--leader-elect=false")

    def _kubelet(self) -> Program:
        return self._program(
            "kubelet",
            f"--config={self._config('kubelet.yaml')}",
            self._kubeconfig(KUBELET.name),
            f"--root-dir={self.place.kubelet}",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={self.subnet.node}",
            config="kubelet.yaml",
        )

    def _proxy(self) -> Program:
        return self._program("kube-proxy", f"--config={self._config('proxy.yaml')}", config="proxy.yaml")

    def _dns(self) -> Program:
        return self._program("coredns", "-conf", self._config("Corefile"), config="Corefile")
