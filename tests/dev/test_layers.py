"""Layers: packed the same way each time, and meaning what the overlay directory means."""

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tributary_dev.layers import measure, write_layer


def packed(directory: Path) -> bytes:
    out = io.BytesIO()
    write_layer(directory, out)
    return out.getvalue()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    root = tmp_path / "layer"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tool").write_text("#!/bin/sh\n")
    (root / "bin" / "tool").chmod(0o755)
    (root / "bin" / "alias").symlink_to("tool")
    os.link(root / "bin" / "tool", root / "bin" / "twin")
    (root / "empty").mkdir()
    return root


def test_an_independent_tar_unpacks_what_was_packed(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "unpacked"
    target.mkdir()
    subprocess.run(["tar", "-x", "-C", target], input=packed(directory), check=True)
    assert subprocess.run(["diff", "-r", "--no-dereference", directory, target], check=False).returncode == 0
    assert (target / "bin" / "tool").stat().st_mode == (directory / "bin" / "tool").stat().st_mode
    assert (target / "bin" / "tool").samefile(target / "bin" / "twin")


def test_the_measure_is_that_of_the_packed_bytes(directory: Path) -> None:
    content = packed(directory)
    layer = measure(directory)
    assert layer.size_bytes == len(content)
    assert layer.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


@given(order=st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_creation_does_not_matter(
    order: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("layer")
    for name in order:
        (root / name).write_text(name)
        os.utime(root / name, (0, 0.5))
    with tarfile.open(fileobj=io.BytesIO(packed(root))) as tar:
        assert tar.getnames() == ["a", "b", "c", "d"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and trusted attributes")
def test_removals_of_an_overlay_become_whiteouts(directory: Path) -> None:
    os.mknod(directory / "bin" / "gone", 0o020000)
    os.setxattr(directory / "empty", "trusted.overlay.opaque", b"y")
    with tarfile.open(fileobj=io.BytesIO(packed(directory))) as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert members["bin/.wh.gone"].isreg()
    assert "bin/gone" not in members
    assert members["empty/.wh..wh..opq"].isreg()
    assert "bin/.wh..wh..opq" not in members
