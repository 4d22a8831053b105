"""Layers of images as tar streams, made from directories whenever they are needed.

The worker's wheels are a layer of 6 GB. It lies unpacked in buildah's storage and in each cluster's; a third,
packed copy would cost gigabytes and minutes, so a layer is packed while it is sent. That needs a packing
that gives the same bytes each time: `write_layer` sorts, and writes whole seconds and numeric owners.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

# How the kernel's overlay marks what a layer removes, and how an OCI layer says the same.
OPAQUE_ATTRIBUTE = "trusted.overlay.opaque"
WHITEOUT_PREFIX = ".wh."
OPAQUE_MARK = ".wh..wh..opq"


@dataclass(frozen=True)
class Layer:
    """A packed layer: its digest, its size, and the directory that it is packed from."""

    digest: str
    size_bytes: int
    directory: Path


def measure(directory: Path) -> Layer:
    """Pack `directory` into nothing, to learn the digest and size of the result."""
    sink = _Sink()
    write_layer(directory, cast(IO[bytes], sink))
    return Layer(f"sha256:{sink.hash.hexdigest()}", sink.size_bytes, directory)


class _Sink:
    """A file that keeps the hash and the size of what is written to it, and nothing else."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size_bytes


def write_layer(directory: Path, out: IO[bytes]) -> None:
    """Pack one directory of an overlay; removals become whiteouts."""
    stream = cast(IO[bytes], _Unseekable(out))
    with tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _walk(directory):
            name = str(path.relative_to(directory))
            if _is_whiteout(path):
                tar.addfile(_mark(path.parent.relative_to(directory) / f"{WHITEOUT_PREFIX}{path.name}"))
            elif not stat.S_ISSOCK(path.lstat().st_mode):
                _add(tar, path, name)
                if _is_opaque(path):
                    tar.addfile(_mark(Path(name) / OPAQUE_MARK))


class _Unseekable:
    """Lets tarfile write to a pipe without its slow streaming mode: it only wants to know where it is."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._written_bytes = 0

    def write(self, data: bytes) -> int:
        self._out.write(data)
        self._written_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self._written_bytes


def _walk(directory: Path) -> Iterator[Path]:
    """Everything below `directory` in a fixed order, parents before children."""
    with os.scandir(directory) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    info = tar.gettarinfo(path, name)
    info.uname = info.gname = ""
    info.mtime = int(info.mtime)
    if info.isreg():
        with path.open("rb") as content:
            tar.addfile(info, content)
    else:
        tar.addfile(info)


def _is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _is_opaque(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        return os.getxattr(path, OPAQUE_ATTRIBUTE) == b"y"
    except OSError:  # without the attribute, and without root
        return False


def _mark(name: Path) -> tarfile.TarInfo:
    return tarfile.TarInfo(str(name))
