"""Images: digests by the OCI specification, and archives that leave out what is there already."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from tributary_dev.layers import Layer, measure
from tributary_dev.oci import Image, program_image, write_archive


@pytest.fixture
def image(tmp_path: Path) -> Image:
    layers = []
    for name in ("low", "high"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        layers.append(measure(tmp_path / name))
    return Image.of({"os": "linux", "history": ["x"], "config": {"User": "1"}}, layers)


def archive(image: Image, wanted: list[str]) -> dict[str, bytes]:
    """The files of the archive of `image`."""
    out = io.BytesIO()
    write_archive(image, ["localhost/x@" + image.digest], wanted, out)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: content.read() for name, content in files.items() if content is not None}


def test_every_blob_of_an_archive_lies_under_its_digest(image: Image) -> None:
    files = archive(image, [layer.digest for layer in image.layers])
    blobs = {name: content for name, content in files.items() if name.startswith("blobs/")}
    assert len(blobs) == 4
    for name, content in blobs.items():
        assert name == f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"


def test_the_manifest_describes_the_blobs(image: Image) -> None:
    files = archive(image, [layer.digest for layer in image.layers])
    row = json.loads(files["index.json"])["manifests"][0]
    assert row["digest"] == image.digest
    assert row["annotations"] == {"io.containerd.image.name": "localhost/x@" + image.digest}
    manifest = json.loads(files[f"blobs/{image.digest.replace(':', '/')}"])
    for described in (manifest["config"], *manifest["layers"]):
        assert len(files[f"blobs/{described['digest'].replace(':', '/')}"]) == described["size"]


def test_an_archive_has_the_layers_that_are_asked_for(image: Image) -> None:
    low, high = image.layers
    files = archive(image, [high.digest])
    assert f"blobs/{high.digest.replace(':', '/')}" in files
    assert f"blobs/{low.digest.replace(':', '/')}" not in files


def test_the_configuration_names_our_layers_and_keeps_the_settings(image: Image) -> None:
    config = json.loads(image.config)
    assert config["config"] == {"User": "1"}
    assert config["rootfs"]["diff_ids"] == [layer.digest for layer in image.layers]
    assert "history" not in config


def test_chain_ids_follow_the_image_specification() -> None:
    a, b, c = (f"sha256:{letter * 64}" for letter in "abc")
    image = Image.of({}, [Layer(digest, 1, Path("/")) for digest in (a, b, c)])
    second = "sha256:" + hashlib.sha256(f"{a} {b}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {c}".encode()).hexdigest()
    assert image.chain_ids() == [a, second, third]


def test_the_image_of_a_program_depends_on_its_bytes_only(tmp_path: Path) -> None:
    digests = []
    for name, content in (("one", b"x"), ("two", b"x"), ("three", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pause").write_bytes(content)
        digests.append(program_image(tmp_path / name, "pause", "x86_64").digest)
    assert digests[0] == digests[1] != digests[2]
