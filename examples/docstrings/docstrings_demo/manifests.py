"""The committed manifests and values, and the fields that are known only at run time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from docstrings_demo.kube import Object
from docstrings_demo.owners import MANIFESTS, Owner
from tributary_api.client import ClientData
from tributary_api.shared import DatasetRef, ModelRef, StoreEndpoint

API_SERVER_PORTS = (443, 6443)


def load_yaml(path: Path) -> Object:
    loaded: Object = yaml.safe_load(path.read_text())
    return loaded


def fedround(name: str, dataset: DatasetRef, base_model: ModelRef | None) -> Object:
    """A round's manifest; `base_model` for one that does not name an earlier round."""
    manifest = load_yaml(MANIFESTS / f"{name}.yaml")
    manifest["spec"]["evaluation"]["dataset"] = dataset.to_json_object()
    if base_model:
        manifest["spec"]["baseModel"] = base_model.to_json_object()
    return manifest


def release(name: str, dataset: DatasetRef) -> Object:
    manifest = load_yaml(MANIFESTS / f"{name}.yaml")
    manifest["spec"]["gate"]["dataset"] = dataset.to_json_object()
    return manifest


def release_name(name: str) -> str:
    return str(load_yaml(MANIFESTS / f"{name}.yaml")["metadata"]["name"])


def service_url(name: str) -> str:
    """Where other pods of the cluster reach a release."""
    manifest = load_yaml(MANIFESTS / f"{name}.yaml")
    serving, namespace = manifest["spec"]["serving"], manifest["metadata"]["namespace"]
    return f"http://{serving['serviceName']}.{namespace}.svc:{serving['port']}"


def declared_data(owner: Owner) -> ClientData:
    """What the owner's values say about its data."""
    return ClientData.model_validate(load_yaml(owner.values)["client"]["spec"]["data"])


def operator_values(
    images: Mapping[str, str],
    store: StoreEndpoint,
    operator_endpoint: str,
    keys: Mapping[str, tuple[str, str]],
) -> dict[str, Any]:
    """Values of charts/tributary; `keys` holds the S3 keys of operator, aggregator and serving."""
    values = load_yaml(MANIFESTS / "operator.yaml")
    values["image"], values["workerImage"] = images["operator"], images["worker"]
    values["store"]["endpoint"] = store.endpoint or ""
    values["store"]["operatorEndpoint"] = operator_endpoint
    values["store"]["region"] = store.region
    values["store"]["credentials"] = {part: _keys(*pair) for part, pair in keys.items()}
    return values


def client_values(owner: Owner, image: str, store: StoreEndpoint, keys: tuple[str, str]) -> Object:
    """Values of charts/tributary-client. Training pods may reach the API server and the store."""
    values = load_yaml(owner.values)
    spec = values["client"]["spec"]
    spec["store"].update(store.to_json_object())
    spec["worker"]["allowedImages"] = [image]
    values["credentials"] = _keys(*keys)
    values["networkPolicy"] = {"egressPorts": sorted({*API_SERVER_PORTS, port_of(store)})}
    return values


def port_of(store: StoreEndpoint) -> int:
    address = urlsplit(store.endpoint or "https://")
    return address.port or {"http": 80, "https": 443}[address.scheme]


def _keys(access_key: str, secret_key: str) -> dict[str, str]:
    return {"accessKeyId": access_key, "secretAccessKey": secret_key}
