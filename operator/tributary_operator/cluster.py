"""Reads and writes of Kubernetes objects: children that are created once, status, events."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tributary_operator import names
from tributary_operator.api import (
    JSON_PATCH,
    MERGE_PATCH,
    Api,
    Conflict,
    Invalid,
    JsonObject,
    Missing,
)
from tributary_operator.decision import Delete, Event, JsonPatch, Manifest
from tributary_operator.kinds import BY_NAME, EVENT, JOB, SERVICE, Kind

LIST_LIMIT = 500
"""Objects of one page: large lists would hold up etcd and us."""


@dataclass(frozen=True, slots=True)
class Target:
    """One object of ours, as the operator addresses it."""

    kind: Kind
    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return names.owner(self.kind.kind, self.namespace, self.name)


class Cluster:
    def __init__(self, api: Api) -> None:
        self.api = api

    async def get(self, kind: Kind, namespace: str, name: str) -> JsonObject | None:
        try:
            return await self.api.request("GET", kind.path(namespace, name))
        except Missing:
            return None

    async def namespace_labels(self, namespace: str) -> dict[str, str]:
        """Labels of a namespace; allowed by the role that its owner has bound there."""
        found = await self.api.request("GET", f"/api/v1/namespaces/{namespace}")
        labels: dict[str, str] = found["metadata"].get("labels", {})
        return labels

    async def find(
        self, kind: Kind, namespace: str | None, labels: Mapping[str, str]
    ) -> tuple[list[JsonObject], str]:
        """Objects with these labels, and the resourceVersion to watch from. No namespace: of all."""
        query: dict[str, str | int] = {"labelSelector": selector(labels), "limit": LIST_LIMIT}
        items: list[JsonObject] = []
        while True:
            page = await self.api.request("GET", kind.path(namespace), query=query)
            items += page["items"]
            following = page["metadata"].get("continue")
            if not following:
                return items, page["metadata"]["resourceVersion"]
            query["continue"] = following

    async def apply(self, manifest: Manifest) -> None:
        """Create it, once: a write that arrives late must not undo what was switched since.

        A Service may exist before the Job that shall own it; then it is given that owner, and nothing else.
        """
        body = self.api.plain(manifest)
        kind, metadata = BY_NAME[body["kind"]], body["metadata"]
        created = await self._create(kind.path(metadata["namespace"]), body)
        owners = metadata.get("ownerReferences")
        if not created and kind == SERVICE and owners and owners[0]["kind"] == JOB.kind:
            path = kind.path(metadata["namespace"], metadata["name"])
            change = {"metadata": {"ownerReferences": owners}}
            query = {"fieldManager": names.FIELD_MANAGER}
            await self.api.request("PATCH", path, query=query, body=change, content_type=MERGE_PATCH)

    async def _create(self, path: str, body: JsonObject) -> bool:
        """Whether this call has created it. Its name holds all that makes it different from others."""
        try:
            await self.api.request("POST", path, query={"fieldManager": names.FIELD_MANAGER}, body=body)
        except Conflict:
            return False
        return True

    async def json_patch(self, patch: JsonPatch) -> None:
        """Raises Conflict when a `test` does not hold."""
        path = patch.kind.path(patch.namespace, patch.name)
        query = {"fieldManager": names.FIELD_MANAGER}
        body = list(patch.operations)
        try:
            await self.api.request("PATCH", path, query=query, body=body, content_type=JSON_PATCH)
        except Invalid as error:  # the API server answers 422 to a failed test
            raise Conflict(
                f"{patch.kind.kind} {patch.namespace}/{patch.name} has changed: {error}"
            ) from error

    async def delete(self, child: Delete) -> None:
        """Foreground, so that the object stays visible until its pods are gone."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": child.uid},
            "propagationPolicy": "Foreground",
        }
        try:
            await self.api.request("DELETE", child.kind.path(child.namespace, child.name), body=body)
        except (Missing, Conflict):
            return  # gone, or a namesake with another UID: not the one that was meant

    async def patch_status(self, raw: JsonObject, kind: Kind, status: JsonObject) -> JsonObject:
        """The object with the new status; only what differs is sent.

        Raises:
            Conflict: the object is not the one that `status` was computed from.
        """
        difference = merge_patch(raw.get("status", {}), status)
        if not difference:
            return raw
        metadata = raw["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": difference}
        path = kind.path(metadata["namespace"], metadata["name"], "status")
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self.api.request("PATCH", path, query=query, body=body, content_type=MERGE_PATCH)

    async def set_finalizers(self, raw: JsonObject, kind: Kind, finalizers: list[str]) -> JsonObject:
        """The object with these finalizers. Raises Conflict when it has changed since."""
        metadata = raw["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": finalizers}}
        path = kind.path(metadata["namespace"], metadata["name"])
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self.api.request("PATCH", path, query=query, body=body, content_type=MERGE_PATCH)

    async def emit(self, target: Target, event: Event, now: datetime) -> None:
        """An event about the object. Its name follows from content and second, so it is not repeated."""
        content = f"{target.uid}{event.reason}{event.message}{now:%Y%m%d%H%M%S}"
        suffix = hashlib.sha256(content.encode()).hexdigest()[:16]
        body: dict[str, Any] = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": f"{target.name}.{suffix}", "namespace": target.namespace},
            "eventTime": f"{now:%Y-%m-%dT%H:%M:%S.%f}Z",
            "reportingController": names.REPORTER,
            "reportingInstance": names.FIELD_MANAGER,
            "action": "Reconcile",
            "type": event.type,
            "reason": event.reason,
            "note": event.message[:1000],
            "regarding": {
                "apiVersion": target.kind.api_version,
                "kind": target.kind.kind,
                "namespace": target.namespace,
                "name": target.name,
                "uid": target.uid,
            },
        }
        await self._create(EVENT.path(target.namespace), body)


def selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def merge_patch(old: JsonObject, new: JsonObject) -> JsonObject:
    """The JSON merge patch (RFC 7386) that turns `old` into `new`; empty when they are equal."""
    patch: JsonObject = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            nested = merge_patch(before, value)
            if nested:
                patch[key] = nested
        elif key not in old or before != value:
            patch[key] = value
    return patch
