"""Build container images with buildah from the Containerfiles that `docker build` would use.

No registry is needed: the base image is made by debootstrap, and the result is read from buildah's storage.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tributary_dev.shell import run, succeeds

DEBIAN_SUITE = "bookworm"
# What the public Python image has as well: the interpreter with its headers, and certificates.
BASE_PACKAGES = ("ca-certificates", "libpython3.11-dev", "python3.11", "python3-pip", "python3-venv")
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
# Where a secret of a build appears; never over a file of the image, which buildah would then remove.
CA_BUNDLE_IN_IMAGE = "/run/secrets/ca"
UV_CACHE_IN_IMAGE = "/var/cache/uv"


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own, apart from what else it builds on this machine."""

    root: Path

    def run(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
        self.root.mkdir(parents=True, exist_ok=True)
        storage: list[str | Path] = [
            "--root",
            self.root,
            "--runroot",
            f"/run/tributary-buildah-{self.root.stat().st_ino}",
        ]
        # In a mount namespace of its own, what it mounts is gone with it, even when it is killed.
        return run(["unshare", "--mount", "buildah", *storage, *arguments], env=env)

    def names(self) -> list[str]:
        """Every tagged image as `name:tag`."""
        rows = self.run("images", "--format", "{{.Name}}:{{.Tag}}").split()
        return [row for row in rows if "<none>" not in row]

    def remove(self, names: Sequence[str]) -> None:
        """Remove images and the layers that nothing refers to any more."""
        for name in names:
            self.run("rmi", "--force", name)
        self.run("rmi", "--prune", "--force")

    def clear(self) -> None:
        """Remove what builds that were cut off left: each of their stages may hold gigabytes."""
        self.run("rm", "--all")

    def settings(self, name: str) -> dict[str, Any]:
        """The OCI configuration of an image."""
        inspected: dict[str, Any] = json.loads(self.run("inspect", "--type", "image", name))["OCIv1"]
        return inspected

    def layer_directories(self, name: str) -> list[Path]:
        """Where the layers of an image lie unpacked, the lowest first (format of containers/storage)."""
        images = json.loads((self.root / "overlay-images" / "images.json").read_text())
        layers = json.loads((self.root / "overlay-layers" / "layers.json").read_text())
        parents = {layer["id"]: layer.get("parent", "") for layer in layers}
        layer = next(image["layer"] for image in images if name in image.get("names", ()))
        chain = []
        while layer:
            chain.append(self.root / "overlay" / layer / "diff")
            layer = parents[layer]
        return chain[::-1]

    def make_base(self, name: str) -> None:
        """Make a Debian with Python, from packages."""
        with tempfile.TemporaryDirectory(prefix="tributary-base-", dir=self.root.parent) as directory:
            root = Path(directory) / "root"
            include = f"--include={','.join(BASE_PACKAGES)}"
            run(["debootstrap", "--variant=minbase", include, DEBIAN_SUITE, root])
            _make_like_public_image(root)
            container = self.run("from", "scratch").strip()
            self.run("add", "--quiet", container, root, "/")
            self.run("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
            self.run("commit", "--quiet", "--rm", container, name)

    def build(self, name: str, containerfile: Path, context: Path, base: str, target: str = "") -> None:
        """Build `containerfile`, or its stage `target`, and call the result `name`."""
        with _settings() as settings:
            flags = ["--layers", "--isolation", "chroot", "--network", "host", "--format", "oci"]
            flags += ["--pull-never", "--build-arg", f"BASE={base}", *settings.flags()]
            flags += ["--target", target] if target else []
            self.run("build", *flags, "--tag", name, "--file", containerfile, context)


def _make_like_public_image(root: Path) -> None:
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    for listing in (root / "var/lib/apt/lists").glob("*_*"):
        listing.unlink()


@dataclass(frozen=True)
class HostSettings:
    """How this machine reaches package indexes, as files that are mounted while an image is built."""

    environment: Path
    """Shell lines that the Containerfiles read."""
    ca_bundle: Path | None
    uv_cache: Path | None

    def flags(self) -> list[str]:
        flags = ["--secret", f"id=settings,src={self.environment}"]
        if self.ca_bundle is not None:
            flags += ["--secret", f"id=ca,src={self.ca_bundle}"]
        if self.uv_cache is not None:
            flags += ["--volume", f"{self.uv_cache}:{UV_CACHE_IN_IMAGE}", "--build-arg", "UV_NO_CACHE=false"]
        return flags


@contextmanager
def _settings() -> Iterator[HostSettings]:
    with tempfile.TemporaryDirectory(prefix="tributary-settings-") as name:
        path, bundle = Path(name) / "settings", _ca_bundle()
        index, extra = _index_urls()
        path.write_text(shell_settings(index, extra, has_bundle=bundle is not None))
        yield HostSettings(path, bundle, _uv_cache())


def shell_settings(index_url: str, extra_index_url: str, *, has_bundle: bool) -> str:
    """Shell lines that tell pip and uv which indexes and certificates to use; nothing for what is not set."""
    bundle = CA_BUNDLE_IN_IMAGE if has_bundle else ""
    variables = {
        "PIP_INDEX_URL": index_url,
        "UV_DEFAULT_INDEX": index_url,
        "PIP_EXTRA_INDEX_URL": extra_index_url,
        "UV_EXTRA_INDEX_URL": extra_index_url,
        "PIP_CERT": bundle,
        "SSL_CERT_FILE": bundle,
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items() if value)


def _index_urls() -> tuple[str, str]:
    """The package index of this machine and further ones (separated by blanks); empty: the tools' default."""
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or _pip_setting("index-url")
    return index, os.environ.get("UV_EXTRA_INDEX_URL") or _pip_setting("extra-index-url")


def _pip_setting(name: str) -> str:
    """A setting of pip from its environment variable or from one of its files."""
    if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
        return value
    command = ["python3", "-m", "pip", "config", "get", f"global.{name}"]
    return run(command).strip() if succeeds(command) else ""


def _ca_bundle() -> Path | None:
    candidates = (os.environ.get("SSL_CERT_FILE"), os.environ.get("PIP_CERT"), *CA_BUNDLES)
    return next((Path(name) for name in candidates if name and Path(name).is_file()), None)


def _uv_cache() -> Path | None:
    """The cache of this machine's uv: it has the wheels already when the tests' environments were made."""
    path = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    return path if path.is_dir() else None
