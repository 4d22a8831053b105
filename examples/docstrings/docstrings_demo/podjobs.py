"""The demo's own pods: a Job of the worker image that runs one of this package's scripts.

The scripts come by a ConfigMap. Pods are as restricted as the operator's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docstrings_demo.kube import Object
from docstrings_demo.podtasks import TASK_ENV
from tributary_api.base import ApiModel

SCRIPTS_CONFIG_MAP = "docstrings-scripts"
SCRIPTS_MOUNT = "/opt/demo"
PACKAGE = Path(__file__).parent
SCRIPTS = ("corpus.py", "load.py", "podtasks.py", "pretrain.py", "publish.py")
"""What runs in pods; none of it imports any other module of this package."""
USER_ID = 65532
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
JOB_LABEL = "batch.kubernetes.io/job-name"


@dataclass(frozen=True, slots=True)
class ScriptJob:
    """One run of `python -m docstrings_demo.<script>` with a task, in a namespace."""

    name: str
    namespace: str
    script: str
    task: ApiModel
    s3_secret: str | None = None
    """Secret with the S3 identity that the script acts under."""
    threads: int = 1
    requests: Mapping[str, str] = field(default_factory=lambda: {"cpu": "100m", "memory": "256Mi"})
    deadline_seconds: int = 1200

    def objects(self, image: str) -> list[Object]:
        """The Job and the ConfigMap that it mounts."""
        return [scripts_config_map(self.namespace), self._job(image)]

    def _job(self, image: str) -> Object:
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "backoffLimit": 0,
                "activeDeadlineSeconds": self.deadline_seconds,
                "template": {"metadata": {"labels": {"example": "docstrings"}}, "spec": self._pod(image)},
            },
        }

    def _pod(self, image: str) -> Object:
        return {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [self._container(image)],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "scripts", "configMap": {"name": SCRIPTS_CONFIG_MAP}},
            ],
        }

    def _container(self, image: str) -> Object:
        return {
            "name": self.script,
            "image": image,
            "command": ["python", "-m", f"{PACKAGE.name}.{self.script}"],
            "workingDir": SCRIPTS_MOUNT,  # puts the package on Python's path beside the image's own
            "env": self._environment(),
            "resources": {"requests": dict(self.requests)},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "tmp", "mountPath": "/tmp"},
                {"name": "scripts", "mountPath": f"{SCRIPTS_MOUNT}/{PACKAGE.name}"},
            ],
        }

    def _environment(self) -> Sequence[Mapping[str, Any]]:
        variables: list[Mapping[str, Any]] = [
            {"name": TASK_ENV, "value": self.task.canonical_json().decode()},
            {"name": "OMP_NUM_THREADS", "value": str(self.threads)},
        ]
        if self.s3_secret:
            variables += [
                {"name": key, "valueFrom": {"secretKeyRef": {"name": self.s3_secret, "key": key}}}
                for key in S3_KEYS
            ]
        return variables


def scripts_config_map(namespace: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": SCRIPTS_CONFIG_MAP, "namespace": namespace},
        "data": {name: (PACKAGE / name).read_text() for name in SCRIPTS},
    }
