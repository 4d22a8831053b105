"""What a write that arrives late can do: nothing that was not meant when it arrives."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio.client import ApiClient, Configuration, V1ObjectMeta, V1OwnerReference, V1Service
from round_worlds import T0

from tributary_operator.api import Api, Conflict, Deposed, JsonObject
from tributary_operator.cluster import Cluster
from tributary_operator.decision import Delete, Event, JsonPatch
from tributary_operator.kinds import JOB, ROUND, SERVICE
from tributary_operator.reconciler import target

RAW = {
    "kind": ROUND.kind,
    "metadata": {"namespace": "hub", "name": "r", "uid": "u", "resourceVersion": "7"},
    "status": {},
}


class Recorder(Api):
    """Notes what would be sent; creating anything finds it there already."""

    sent: list[tuple[str, str, Any]]

    async def request(self, verb: str, path: str, *, body: Any = None, **_: Any) -> JsonObject:
        self.sent.append((verb, path, body))
        if verb == "POST":
            raise Conflict("exists already")
        return dict(RAW)


@pytest.fixture
async def api() -> Any:
    client = ApiClient(Configuration())
    made = Recorder(client, 1)
    made.sent = []
    yield made
    await client.close()


def a_service(*owners: V1OwnerReference) -> V1Service:
    metadata = V1ObjectMeta(name="s", namespace="a", owner_references=list(owners) or None)
    return V1Service(api_version=SERVICE.api_version, kind=SERVICE.kind, metadata=metadata)


async def test_a_child_that_exists_is_not_changed(api: Recorder) -> None:
    await Cluster(api).apply(a_service())
    assert [verb for verb, *_ in api.sent] == ["POST"]


async def test_only_an_owner_is_given_to_a_service_that_exists(api: Recorder) -> None:
    owner = V1OwnerReference(api_version="batch/v1", kind="Job", name="j", uid="u")
    await Cluster(api).apply(a_service(owner))
    (_, (verb, _, change)) = api.sent
    assert (verb, list(change), list(change["metadata"])) == ("PATCH", ["metadata"], ["ownerReferences"])


async def test_what_rests_on_a_picture_names_it(api: Recorder) -> None:
    """Version, UID or `test`: each makes the API server refuse a write whose picture is old."""
    cluster = Cluster(api)
    await cluster.patch_status(RAW, ROUND, {"runKey": "k"})
    await cluster.set_finalizers(RAW, ROUND, ["f"])
    await cluster.delete(Delete(JOB, "a", "j", "the-uid"))
    bodies = [body for *_, body in api.sent]
    assert [body["metadata"]["resourceVersion"] for body in bodies[:2]] == ["7", "7"]
    assert bodies[2]["preconditions"] == {"uid": "the-uid"}


async def test_nothing_is_sent_without_the_lease() -> None:
    def refuse() -> None:
        raise Deposed("no lease")

    client = ApiClient(Configuration(host="http://127.0.0.1:9"))
    cluster = Cluster(Api(client, 1).fenced(refuse))
    about = target(ROUND, RAW)
    patch = JsonPatch(SERVICE, "a", "s", ({"op": "test", "path": "/x", "value": 1},))
    for write in (
        cluster.apply(a_service()),
        cluster.json_patch(patch),
        cluster.patch_status(RAW, ROUND, {"runKey": "k"}),
        cluster.set_finalizers(RAW, ROUND, []),
        cluster.delete(Delete(JOB, "a", "j", "u")),
        cluster.emit(about, Event("R", "m"), T0),
    ):
        with pytest.raises(Deposed):
            await write
    await client.close()
