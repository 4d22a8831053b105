"""OCI image layouts as directories: read them, make a tiny one, stream one as an archive.

A layout stores every blob once under its digest, so images that share layers share disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
# containerd takes the image's full name from here; the tag annotation alone could hold no digest.
NAME_ANNOTATION = "io.containerd.image.name"

GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Layout:
    """A directory in the format of the OCI image layout."""

    root: Path

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.replace(":", "/")

    def document(self, digest: str) -> dict[str, Any]:
        """A manifest or a configuration."""
        parsed: dict[str, Any] = json.loads(self.blob(digest).read_text())
        return parsed

    def tags(self) -> dict[str, str]:
        """Manifest digest of each tag, oldest first."""
        index = self.root / "index.json"
        rows = json.loads(index.read_text())["manifests"] if index.exists() else []
        return {row["annotations"][TAG_ANNOTATION]: row["digest"] for row in rows}

    def keep_only(self, tags: Iterable[str]) -> None:
        """Forget all other tags and every blob that no tag needs any more."""
        index = self.root / "index.json"
        document, kept = json.loads(index.read_text()), set(tags)
        document["manifests"] = [r for r in document["manifests"] if r["annotations"][TAG_ANNOTATION] in kept]
        index.write_text(json.dumps(document))
        needed = {blob for row in document["manifests"] for blob in self._blobs_of(row["digest"])}
        for path in (self.root / "blobs" / "sha256").iterdir():
            if f"sha256:{path.name}" not in needed:
                path.unlink()

    def _blobs_of(self, manifest_digest: str) -> list[str]:
        manifest = self.document(manifest_digest)
        return [manifest_digest, manifest["config"]["digest"], *(row["digest"] for row in manifest["layers"])]

    def chain_ids(self, manifest_digest: str) -> list[str]:
        """What each layer is called once it lies unpacked on top of those before it (OCI image spec)."""
        config = self.document(self.document(manifest_digest)["config"]["digest"])
        chain: list[str] = []
        for diff_id in config["rootfs"]["diff_ids"]:
            chain.append(sha256(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
        return chain

    def add(self, content: bytes) -> str:
        """Store a blob; its digest."""
        digest = sha256(content)
        self.blob(digest).parent.mkdir(parents=True, exist_ok=True)
        self.blob(digest).write_bytes(content)
        return digest


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest, "size": size_bytes}


def add_program_image(layout: Layout, program: Path, architecture: str) -> str:
    """Make an image that holds and runs nothing but one static program; the digest of its manifest."""
    layer = _layer_with(program)
    layer_digest = layout.add(layer)
    config = {
        "architecture": GO_ARCHITECTURES[architecture],
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
    }
    config_bytes = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _descriptor(CONFIG_TYPE, layout.add(config_bytes), len(config_bytes)),
        "layers": [_descriptor(LAYER_TYPE, layer_digest, len(layer))],
    }
    return layout.add(json.dumps(manifest).encode())


def _layer_with(program: Path) -> bytes:
    """A layer with one executable file; without a time stamp, so that its digest is that of its content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar, program.open("rb") as content:
        entry = tarfile.TarInfo(program.name)
        entry.size, entry.mode = program.stat().st_size, 0o755
        tar.addfile(entry, content)
    return stream.getvalue()


def write_archive(
    layout: Layout, manifest_digest: str, names: Sequence[str], layers: Iterable[str], out: IO[bytes]
) -> None:
    """Write an image as an OCI archive that containerd stores under `names`, with only the given `layers`."""
    manifest = layout.blob(manifest_digest)
    descriptor = _descriptor(MANIFEST_TYPE, manifest_digest, manifest.stat().st_size)
    rows = [{**descriptor, "annotations": {NAME_ANNOTATION: name}} for name in names]
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": rows}
    config = layout.document(manifest_digest)["config"]["digest"]
    with tarfile.open(fileobj=out, mode="w|") as tar:
        _add_text(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}))
        _add_text(tar, "index.json", json.dumps(index))
        for digest in (manifest_digest, config, *dict.fromkeys(layers)):
            tar.add(layout.blob(digest), f"blobs/{digest.replace(':', '/')}")


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
