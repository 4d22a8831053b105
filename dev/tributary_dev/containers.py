"""Build container images with buildah from the Containerfiles that `docker build` would use.

No registry is needed: the base image is made by debootstrap, and the result goes into an OCI layout.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tributary_dev.shell import run, succeeds

DEBIAN_SUITE = "bookworm"
# What the public Python image has as well: the interpreter with its headers, and certificates.
BASE_PACKAGES = ("ca-certificates", "libpython3.11-dev", "python3.11", "python3-pip", "python3-venv")
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
CA_BUNDLE_IN_IMAGE = "/etc/ssl/certs/ca-certificates.crt"
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

    def push(self, name: str, layout: Path, tag: str) -> None:
        """Put an image into an OCI layout, with the compression that costs least time (layouts need one)."""
        quickest = ["--compression-format", "zstd", "--compression-level", "1"]
        self.run("push", *quickest, name, f"oci:{layout}:{tag}")

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

    directory: Path
    ca_bundle: Path | None
    uv_cache: Path | None

    def flags(self) -> list[str]:
        secrets = {"pip": self.directory / "pip.conf", "uv": self.directory / "uv.toml"}
        if self.ca_bundle is not None:
            secrets["ca"] = self.ca_bundle
        flags = [flag for name, path in secrets.items() for flag in ("--secret", f"id={name},src={path}")]
        if self.uv_cache is not None:
            flags += ["--volume", f"{self.uv_cache}:{UV_CACHE_IN_IMAGE}", "--build-arg", "UV_NO_CACHE=false"]
        return flags


@contextmanager
def _settings() -> Iterator[HostSettings]:
    with tempfile.TemporaryDirectory(prefix="tributary-settings-") as name:
        directory = Path(name)
        index, extra = _index_urls()
        (directory / "pip.conf").write_text(pip_conf(index, extra))
        (directory / "uv.toml").write_text(uv_toml(index, extra))
        yield HostSettings(directory, _ca_bundle(), _uv_cache())


def pip_conf(index_url: str, extra_index_url: str) -> str:
    lines = ["[global]", f"cert = {CA_BUNDLE_IN_IMAGE}"]
    lines += [f"index-url = {index_url}"] if index_url else []
    lines += [f"extra-index-url = {extra_index_url}"] if extra_index_url else []
    return "\n".join(lines) + "\n"


def uv_toml(index_url: str, extra_index_url: str) -> str:
    lines = [f'index-url = "{index_url}"'] if index_url else []
    if extra_index_url:
        quoted = ", ".join(f'"{url}"' for url in extra_index_url.split())
        lines.append(f"extra-index-url = [{quoted}]")
    return "".join(f"{line}\n" for line in lines)


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
