from __future__ import annotations

import pytest
from memory_store import MemoryStore
from s3_servers import s3_server

from tributary_api.shared import StoreEndpoint
from tributary_store.objectstore import ObjectStore


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("plain")
        server.create_bucket("locked", object_lock=True)
        yield server


@pytest.fixture(
    params=[
        pytest.param("memory", id="memory"),
        pytest.param("plain", id="s3", marks=pytest.mark.cluster),
        pytest.param("locked", id="s3-object-lock", marks=pytest.mark.cluster),
    ]
)
def objects(request, tmp_path):
    """(store, a URI prefix of this test's own) for the double and for the real store."""
    prefix = f"{request.node.name.partition('[')[0].replace('_', '-')}/{tmp_path.name}"
    if request.param == "memory":
        return MemoryStore(), f"s3://memory/{prefix}"
    server = request.getfixturevalue("s3")
    endpoint = StoreEndpoint(endpoint=server.endpoint_for_host, region=server.region)
    store = ObjectStore.open(endpoint, server.access_key, server.secret_key)
    return store, f"s3://{request.param}/{prefix}"
