"""Jobs as the operator makes them, and changes that a tampered operator could try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from installation import HUB, WORKER_IMAGE
from kube import Object

from tributary_api.client import WORKER_SERVICE_ACCOUNT
from tributary_api.tasks import NOISE_KEY_PATH, TASK_ENV

Change = Callable[[Object], Any]


def secret_env(name: str, secret: str, key: str | None = None) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key or name}}}


def task(namespace: str, client: str) -> Object:
    """As much of a task as admission looks at."""
    grant = {"client": {"name": client, "namespace": namespace}}
    return {"name": TASK_ENV, "value": json.dumps({"grant": grant}, separators=(",", ":"))}


def train_job(namespace: str) -> Object:
    """A training Job as the operator makes them."""
    container = {
        "name": "train",
        "image": WORKER_IMAGE,
        "args": ["train"],
        "env": [
            task(namespace, "notes"),
            {"name": "OMP_NUM_THREADS", "value": "1"},
            secret_env("AWS_ACCESS_KEY_ID", "tributary-store"),
            secret_env("AWS_SECRET_ACCESS_KEY", "tributary-store"),
        ],
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "noise-key", "mountPath": str(Path(NOISE_KEY_PATH).parent), "readOnly": True},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": WORKER_SERVICE_ACCOUNT,
        "automountServiceAccountToken": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "noise-key", "secret": {"secretName": "tributary-noise-key", "items": [KEY_ITEM]}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "generateName": "r1-notes-",
            "namespace": namespace,
            "labels": {"tributary.dev/client": "notes", "tributary.dev/stage": "train"},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimit": 0,
            "activeDeadlineSeconds": 60,
            "ttlSecondsAfterFinished": 60,
            "template": {"metadata": {"labels": {"tributary.dev/stage": "train"}}, "spec": pod},
        },
    }


KEY_ITEM = {"key": "key", "path": "key"}


def pod(job: Object) -> Object:
    found: Object = job["spec"]["template"]["spec"]
    return found


def container(job: Object) -> Object:
    found: Object = pod(job)["containers"][0]
    return found


def volume(source: Object) -> Change:
    return lambda job: pod(job)["volumes"].append({"name": "more", **source})


def env(*variables: Object) -> Change:
    return lambda job: container(job)["env"].extend(variables)


def in_pod(**fields: object) -> Change:
    return lambda job: pod(job).update(fields)


def in_container(**fields: object) -> Change:
    return lambda job: container(job).update(fields)


def insecure(**fields: object) -> Change:
    return lambda job: container(job)["securityContext"].update(fields)


def mounted(source: Object, path: str, **fields: object) -> Change:
    """One more volume, at that path."""

    def change(job: Object) -> None:
        volume(source)(job)
        container(job)["volumeMounts"].append({"name": "more", "mountPath": path, **fields})

    return change


def noise_key(**fields: object) -> Change:
    """The mount of the noise key, with other fields."""
    return lambda job: container(job)["volumeMounts"][2].update(fields)


def labelled(client: str) -> Change:
    return lambda job: job["metadata"]["labels"].update({"tributary.dev/client": client})


def tasked(text: str) -> Change:
    return lambda job: container(job)["env"][0].update(value=text)


def training_for(client: str) -> Change:
    """The label and the task name another client."""

    def change(job: Object) -> None:
        labelled(client)(job)
        container(job)["env"][0] = task(job["metadata"]["namespace"], client)

    return change


def projected(secret: str) -> Object:
    return {"projected": {"sources": [{"secret": {"name": secret}}]}}


def hub_job(stage: str, secret: str) -> Object:
    job = train_job(HUB)
    job["metadata"]["labels"] = {"tributary.dev/stage": stage}
    pod(job)["serviceAccountName"] = "tributary-job"
    pod(job)["volumes"].pop()
    container(job)["volumeMounts"].pop()
    in_container(args=[stage])(job)
    container(job)["env"] = [{"name": TASK_ENV, "value": "{}"}, secret_env("AWS_ACCESS_KEY_ID", secret)]
    return job


SECOND = {"name": "second", "image": WORKER_IMAGE}
EXEC = {"exec": {"command": ["sh", "-c", "id"]}}

ONE_CONTAINER = "exactly one container"
ENTRY_POINT = "own entry point must run"
VARIABLES = "environment variables are limited"
VOLUMES = "volumes are limited"
MOUNTS = "never over the image's code"
MESSAGE = "the termination message is the file /dev/termination-log"
REFERENCE = "$( is not allowed in a value"
TASK = "the task must train for the FederatedClient that the label names"
OTHER_PROGRAM = "only Secrets whose name starts with tributary-"
NAMED_SECRET = "S3 keys must come from the credentialsSecret"
NOISE_KEY = "the only Secret that may be mounted is the noise key"
NODE = "the node's network, processes and ports are out of reach"
POD_CONTEXT = "the pod's security context must be restricted"
CONTEXT = "the container's security context must be restricted"
NO_HOOKS = "no lifecycle hooks and no probes"
NOT_YOURS = "are not the operator's to set"
