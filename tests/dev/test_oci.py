"""OCI layouts: small images made by us, archives that leave out what is there, blobs that nobody needs."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tributary_dev.oci import TAG_ANNOTATION, Layout, add_program_image, write_archive


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "pause"
    path.write_bytes(b"\x7fELF program")
    return path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def test_a_program_image_holds_the_program(layout: Layout, program: Path) -> None:
    manifest = layout.document(add_program_image(layout, program, "x86_64"))
    layer = layout.blob(manifest["layers"][0]["digest"])
    with tarfile.open(layer) as tar:
        content = tar.extractfile("pause")
        assert content is not None
        assert content.read() == program.read_bytes()
        assert tar.getmember("pause").mode == 0o755
    assert layout.document(manifest["config"]["digest"])["config"]["Entrypoint"] == ["/pause"]


def test_the_same_program_gives_the_same_digest(layout: Layout, program: Path) -> None:
    first = add_program_image(layout, program, "x86_64")
    program.touch()
    assert add_program_image(layout, program, "x86_64") == first


def test_every_blob_lies_under_its_digest(layout: Layout, program: Path) -> None:
    add_program_image(layout, program, "aarch64")
    for blob in (layout.root / "blobs" / "sha256").iterdir():
        assert blob.name == hashlib.sha256(blob.read_bytes()).hexdigest()


def test_chain_ids_follow_the_image_specification(layout: Layout) -> None:
    layers = ["sha256:" + letter * 64 for letter in "abc"]
    config = layout.add(json.dumps({"rootfs": {"diff_ids": layers}}).encode())
    manifest = layout.add(json.dumps({"config": {"digest": config}}).encode())
    second = "sha256:" + hashlib.sha256(f"{layers[0]} {layers[1]}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {layers[2]}".encode()).hexdigest()
    assert layout.chain_ids(manifest) == [layers[0], second, third]


@pytest.mark.parametrize("with_layer", [True, False])
def test_an_archive_has_the_layers_that_are_asked_for(
    layout: Layout, program: Path, with_layer: bool
) -> None:
    digest = add_program_image(layout, program, "x86_64")
    layer = layout.document(digest)["layers"][0]["digest"]
    stream = io.BytesIO()
    write_archive(layout, digest, ["localhost/x@" + digest], [layer] if with_layer else [], stream)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        members = tar.getnames()
        index = tar.extractfile("index.json")
        assert index is not None
        row = json.load(index)["manifests"][0]
    assert (f"blobs/{layer.replace(':', '/')}" in members) is with_layer
    assert f"blobs/{digest.replace(':', '/')}" in members
    assert row["annotations"] == {"io.containerd.image.name": "localhost/x@" + digest}


def _tag(layout: Layout, tags: dict[str, str]) -> None:
    rows = [{"digest": digest, "annotations": {TAG_ANNOTATION: tag}} for tag, digest in tags.items()]
    (layout.root / "index.json").write_text(json.dumps({"manifests": rows}))


def test_forgetting_a_tag_removes_what_only_it_needed(layout: Layout, tmp_path: Path) -> None:
    digests = {}
    for name in ("old", "new"):
        path = tmp_path / name
        path.write_text(name)
        digests[name] = add_program_image(layout, path, "x86_64")
    _tag(layout, digests)
    layout.keep_only(["new"])
    assert layout.tags() == {"new": digests["new"]}
    left = {f"sha256:{blob.name}" for blob in (layout.root / "blobs" / "sha256").iterdir()}
    manifest = layout.document(digests["new"])
    assert left == {digests["new"], manifest["config"]["digest"], manifest["layers"][0]["digest"]}
