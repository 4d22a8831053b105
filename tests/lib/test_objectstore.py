"""One suite for the double and for the real store: what the rest of Tributary may rely on."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from losing_proxy import losing_proxy
from s3_servers import s3_server

from tributary_api.records import CHUNK_BYTES
from tributary_api.shared import StoreEndpoint
from tributary_store.digests import digest_of_bytes
from tributary_store.errors import (
    AccessDenied,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
)
from tributary_store.objectstore import ObjectStore


@pytest.mark.parametrize("retain", [False, True])
def test_an_object_is_created_once_and_never_changed(objects, retain):
    store, prefix = objects
    uri = f"{prefix}-{retain}/a.json"
    assert store.put_new(uri, b"first", retain=retain) is True
    assert store.put_new(uri, b"first", retain=retain) is False
    with pytest.raises(ObjectExists, match=r"a\.json"):
        store.put_new(uri, b"second", retain=retain)
    assert store.get(uri) == b"first"


def test_of_many_writers_one_creates_the_object(objects):
    store, prefix = objects

    def write(i):
        try:
            return store.put_new(f"{prefix}/n.json", f"writer {i}".encode(), retain=True)
        except ObjectExists:
            return None

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(write, range(16)))
    assert outcomes.count(True) == 1
    assert outcomes.count(None) == 15
    assert store.get(f"{prefix}/n.json") == f"writer {outcomes.index(True)}".encode()


def test_what_is_not_there_is_missing(objects):
    store, prefix = objects
    assert store.head(f"{prefix}/none") is None
    assert [*store.list(f"{prefix}/none")] == []
    for read in (lambda: store.get(f"{prefix}/none"), lambda: store.get_range(f"{prefix}/none", 0, 1)):
        with pytest.raises(ObjectMissing, match="none"):
            read()


def test_a_range_is_exact_or_an_error(objects):
    store, prefix = objects
    store.put_new(f"{prefix}/a", b"0123456789")
    assert store.get_range(f"{prefix}/a", 3, 4) == b"3456"
    assert store.get_range(f"{prefix}/a", 3, 0) == b""
    assert store.head(f"{prefix}/a").size == 10
    for start, length in ((8, 3), (10, 1), (50, 1)):
        with pytest.raises(ObjectDamaged):
            store.get_range(f"{prefix}/a", start, length)


def test_a_listing_has_the_prefix_in_the_order_of_the_keys(objects):
    store, prefix = objects
    for name in ("b/2", "a/1", "b/10", "bb/1"):
        store.put_new(f"{prefix}/{name}", name.encode())
    listed = [*store.list(f"{prefix}/b/")]
    assert [info.uri for info in listed] == [f"{prefix}/b/10", f"{prefix}/b/2"]
    assert [info.size for info in listed] == [4, 3]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 5])
def test_a_file_comes_back_as_it_went(objects, tmp_path, size):
    store, prefix = objects
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    digest = store.upload_new(f"{prefix}/file", source)
    assert digest == digest_of_bytes(source.read_bytes(), "source")
    assert store.upload_new(f"{prefix}/file", source) == digest
    store.download(f"{prefix}/file", target, digest)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("size", [100, CHUNK_BYTES + 100])
def test_a_file_is_never_overwritten(objects, tmp_path, size):
    store, prefix = objects
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(os.urandom(size))
    second.write_bytes(os.urandom(size))
    digest = store.upload_new(f"{prefix}/file", first)
    with pytest.raises(ObjectExists):
        store.upload_new(f"{prefix}/file", second)
    store.download(f"{prefix}/file", tmp_path / "read", digest)
    assert (tmp_path / "read").read_bytes() == first.read_bytes()


def test_of_uploads_at_the_same_time_one_creates_the_object(objects, tmp_path):
    """Each has seen that there is nothing; only the end of the upload can tell."""
    store, prefix = objects
    paths = [tmp_path / str(i) for i in range(2)]
    for path in paths:
        path.write_bytes(os.urandom(CHUNK_BYTES + 100))
    start = threading.Barrier(2)

    def upload(path):
        start.wait()
        try:
            return store.upload_new(f"{prefix}/file", path)
        except ObjectExists:
            return None

    with ThreadPoolExecutor(2) as pool:
        (digest,) = [digest for digest in pool.map(upload, paths) if digest]
    assert digest_of_bytes(store.get(f"{prefix}/file"), digest.path) == digest


def test_a_wrong_byte_is_found_and_leaves_no_file(objects, tmp_path):
    store, prefix = objects
    data = os.urandom(CHUNK_BYTES + 100)
    wrong = data[:-1] + bytes([data[-1] ^ 1])
    (tmp_path / "wrong").write_bytes(wrong)
    store.upload_new(f"{prefix}/file", tmp_path / "wrong")
    whole = digest_of_bytes(data, "file")
    for expected, message in (
        (whole, f"bytes {CHUNK_BYTES} to {CHUNK_BYTES + 100}"),
        (whole.model_copy(update={"chunks": whole.chunks[:1]}), "not one digest for each"),
        (digest_of_bytes(data[:-1], "file"), "expected"),
    ):
        with pytest.raises(ObjectDamaged, match=message):
            store.download(f"{prefix}/file", tmp_path / "target", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [5],
        [CHUNK_BYTES],
        [CHUNK_BYTES, 1],
        [1, CHUNK_BYTES, 3 * CHUNK_BYTES, 7],
        [CHUNK_BYTES - 1, 1, 1],
    ],
    ids=str,
)
def test_an_object_may_be_written_while_it_is_made(objects, pieces):
    """However it is cut, the object and its digest are those of the whole."""
    store, prefix = objects
    data = os.urandom(sum(pieces))
    upload, start = store.begin(f"{prefix}/stream"), 0
    for size in pieces:
        buffer = bytearray(data[start : start + size])
        upload.write(memoryview(buffer))
        buffer[:] = bytes(size)  # the writer's buffer is its own again
        start += size
    assert store.head(f"{prefix}/stream") is None
    assert upload.finish("stream") == digest_of_bytes(data, "stream")
    assert store.get(f"{prefix}/stream") == data


@pytest.mark.parametrize("size", [100, CHUNK_BYTES + 100])
def test_the_same_object_may_be_made_twice_and_no_other(objects, size):
    store, prefix = objects
    data = os.urandom(size)

    def write(content):
        upload = store.begin(f"{prefix}/stream")
        upload.write(content)
        return upload.finish("stream")

    assert write(data) == write(data)
    with pytest.raises(ObjectExists):
        write(data[:-1] + bytes([data[-1] ^ 1]))
    assert store.get(f"{prefix}/stream") == data
    assert store.discard_unfinished(f"{prefix}/stream") == 0


def test_what_a_killed_writer_left_is_removed(objects):
    store, prefix = objects
    for name in ("stream", "stream", "stream-of-another"):
        store.begin(f"{prefix}/{name}").write(os.urandom(2 * CHUNK_BYTES + 1))
    assert store.discard_unfinished(f"{prefix}/stream") == 2
    assert store.discard_unfinished(f"{prefix}/stream") == 0
    assert store.discard_unfinished(f"{prefix}/stream-of-another") == 1


def test_an_aborted_object_does_not_exist(objects):
    store, prefix = objects
    upload = store.begin(f"{prefix}/stream")
    upload.write(os.urandom(CHUNK_BYTES + 1))
    upload.abort()
    assert store.head(f"{prefix}/stream") is None
    assert store.discard_unfinished(f"{prefix}/stream") == 0


@pytest.mark.parametrize("uri", ["https://bucket/key", "s3://", "bucket/key"])
def test_what_is_no_uri_is_refused(objects, uri):
    store, _ = objects
    with pytest.raises(StoreError, match="s3://bucket/key"):
        store.get(uri)


# From here on: what only a server can do.


@pytest.mark.cluster
def test_the_text_of_an_error_says_what_to_change(s3):
    endpoint = StoreEndpoint(endpoint=s3.endpoint_for_host)
    store = ObjectStore.open(endpoint, s3.access_key, s3.secret_key)
    with pytest.raises(ObjectMissing, match=r"no-such-bucket.*create it, or correct the URI"):
        store.get("s3://no-such-bucket/x")
    s3.create_user("stranger", "stranger-secret")
    stranger = ObjectStore.open(endpoint, "stranger", "stranger-secret")
    with pytest.raises(AccessDenied, match=r"s3://plain/x.*identity stranger.*bucket policy"):
        stranger.put_new("s3://plain/x", b"")
    with pytest.raises(AccessDenied, match=r"refuses the credentials of identity stranger"):
        ObjectStore.open(endpoint, "stranger", "wrong").get("s3://plain/x")


@pytest.mark.cluster
def test_nobody_not_even_the_administrator_changes_a_retained_object(s3):
    endpoint = StoreEndpoint(endpoint=s3.endpoint_for_host)
    ObjectStore.open(endpoint, s3.access_key, s3.secret_key).put_new(
        "s3://locked/entry", b"entry", retain=True
    )
    root = s3.client()
    for change in (
        lambda: root.put_object(Bucket="locked", Key="entry", Body=b"forged"),
        lambda: root.delete_object(Bucket="locked", Key="entry"),
        lambda: root.delete_object(Bucket="locked", Key="entry", BypassGovernanceRetention=True),
        lambda: root.copy_object(Bucket="locked", Key="entry", CopySource="locked/other"),
    ):
        with pytest.raises(root.exceptions.ClientError):
            change()
    assert root.get_object(Bucket="locked", Key="entry")["Body"].read() == b"entry"


@pytest.mark.cluster
def test_a_store_that_goes_away_is_unreachable_and_not_missing(tmp_path):
    with s3_server(tmp_path) as server:
        server.create_bucket("bucket")
        store = ObjectStore.open(
            StoreEndpoint(endpoint=server.endpoint_for_host), server.access_key, server.secret_key
        )
        assert store.put_new("s3://bucket/a", b"a")
    for act in (
        lambda: store.get("s3://bucket/a"),
        lambda: store.head("s3://bucket/a"),
        lambda: store.put_new("s3://bucket/b", b"b"),
        lambda: [*store.list("s3://bucket/")],
    ):
        with pytest.raises(StoreUnreachable, match=r"no answer from http://127.0.0.1"):
            act()


@pytest.mark.cluster
@pytest.mark.parametrize("lost", [1, 100], ids=["once", "always"])
def test_a_write_whose_answer_is_lost_has_happened(s3, tmp_path, lost):
    """Once: the repeated request meets its own object. Always: all attempts go unanswered."""
    for name, size in (("small", 100), ("large", CHUNK_BYTES + 100)):
        (tmp_path / name).write_bytes(os.urandom(size))
        with losing_proxy(s3.endpoint_for_host, "PUT" if name == "small" else "POST", lost) as endpoint:
            store = ObjectStore.open(StoreEndpoint(endpoint=endpoint), s3.access_key, s3.secret_key)
            uri = f"s3://plain/lost/{lost}/{name}"
            if name == "large" and lost > 1:
                # The upload cannot even be begun: nothing may exist afterwards.
                with pytest.raises(StoreUnreachable):
                    store.upload_new(uri, tmp_path / name)
                assert store.head(uri) is None
            else:
                store.upload_new(uri, tmp_path / name)
                assert store.get(uri) == (tmp_path / name).read_bytes()
