"""OCI images: a manifest and a configuration of ours over layers that are packed when they are sent."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tributary_dev.layers import Layer, measure, write_layer

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
# containerd takes the image's full name from here; the specified annotation for tags could hold no digest.
NAME_ANNOTATION = "io.containerd.image.name"

GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Image:
    """An image: its configuration (JSON text) and its layers, the lowest first."""

    config: str
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], layers: Sequence[Layer]) -> Image:
        """An image with the settings of an OCI configuration, but with these layers."""
        kept = {key: value for key, value in settings.items() if key not in ("history", "rootfs")}
        diff_ids = [layer.digest for layer in layers]
        config = {**kept, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        return cls(json.dumps(config, sort_keys=True), tuple(layers))

    @property
    def manifest(self) -> str:
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _descriptor(CONFIG_TYPE, sha256(self.config.encode()), len(self.config.encode())),
            "layers": [_descriptor(LAYER_TYPE, layer.digest, layer.size_bytes) for layer in self.layers],
        }
        return json.dumps(document, sort_keys=True)

    @property
    def digest(self) -> str:
        """What references pin: the digest of the manifest."""
        return sha256(self.manifest.encode())

    def chain_ids(self) -> list[str]:
        """What each layer is called once it lies unpacked on top of those before it (OCI image spec)."""
        chain: list[str] = []
        for layer in self.layers:
            below = f"{chain[-1]} {layer.digest}".encode() if chain else b""
            chain.append(sha256(below) if below else layer.digest)
        return chain


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest, "size": size_bytes}


def program_image(directory: Path, program: str, architecture: str) -> Image:
    """An image that holds `directory` and runs the static `program` in it, as nobody."""
    for path in (directory, *directory.iterdir()):
        os.utime(path, (0, 0))  # the digest shall be that of the content
    settings = {
        "architecture": GO_ARCHITECTURES[architecture],
        "os": "linux",
        "config": {"Entrypoint": [f"/{program}"], "User": "65535:65535"},
    }
    return Image.of(settings, [measure(directory)])


def write_archive(image: Image, names: Sequence[str], wanted: Collection[str], out: IO[bytes]) -> None:
    """Write an OCI archive that containerd stores under `names`, with the layers of the `wanted` digests."""
    manifest = _descriptor(MANIFEST_TYPE, image.digest, len(image.manifest.encode()))
    rows = [{**manifest, "annotations": {NAME_ANNOTATION: name}} for name in names]
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": rows}
    _write_text(out, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}))
    _write_text(out, "index.json", json.dumps(index))
    for text in (image.manifest, image.config):
        _write_text(out, _blob_name(sha256(text.encode())), text)
    for layer in {layer.digest: layer for layer in image.layers if layer.digest in wanted}.values():
        out.write(_header(_blob_name(layer.digest), layer.size_bytes))
        write_layer(layer.directory, out)
        out.write(_padding(layer.size_bytes))
    out.write(bytes(2 * tarfile.BLOCKSIZE))


def _blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _write_text(out: IO[bytes], name: str, text: str) -> None:
    content = text.encode()
    out.write(_header(name, len(content)) + content + _padding(len(content)))


def _header(name: str, size_bytes: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % tarfile.BLOCKSIZE)
