"""The image store of one cluster's containerd: what it holds, and how images get into it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tributary_dev.oci import Layout, write_archive
from tributary_dev.shell import CommandError, run, succeeds

NAMESPACE = "k8s.io"
SNAPSHOTTER = "overlayfs"
START_SECONDS = 60.0


@dataclass(frozen=True)
class ImageStore:
    """Talks to containerd with its own command line tool."""

    program: Path
    socket: Path

    def _ctr(self, *arguments: str) -> list[str]:
        return [str(self.program), "--address", str(self.socket), "--namespace", NAMESPACE, *arguments]

    def wait(self) -> None:
        """Wait for containerd to answer. Raises CommandError when it does not."""
        deadline = time.monotonic() + START_SECONDS
        while not succeeds(self._ctr("version"), timeout_seconds=10.0):
            if time.monotonic() > deadline:
                raise CommandError(f"containerd does not answer at {self.socket}")
            time.sleep(0.2)

    def names(self) -> list[str]:
        return run(self._ctr("images", "list", "--quiet")).split()

    def remove(self, name: str) -> None:
        run(self._ctr("images", "remove", name))

    def load(self, layout: Layout, manifest_digest: str, names: Sequence[str]) -> None:
        """Import and unpack an image under `names`. Layers that are unpacked already are not sent again."""
        layers = [row["digest"] for row in layout.document(manifest_digest)["layers"]]
        chain = layout.chain_ids(manifest_digest)
        missing = [layer for layer, unpacked in zip(layers, chain, strict=True) if not self._has(unpacked)]
        flags = ["--local", "--discard-unpacked-layers", "--snapshotter", SNAPSHOTTER]
        argv = self._ctr("images", "import", *flags, "-")
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as ctr:
            assert ctr.stdin is not None
            assert ctr.stdout is not None
            try:
                write_archive(layout, manifest_digest, names, missing, ctr.stdin)
                ctr.stdin.close()
            except BrokenPipeError:
                pass  # containerd gave up; what it printed says why
            output = ctr.stdout.read().decode(errors="replace")
        if ctr.returncode != 0:
            raise CommandError(f"containerd did not take {names[0]}:\n{output[-2000:]}")

    def _has(self, chain_id: str) -> bool:
        return succeeds(self._ctr("snapshots", "--snapshotter", SNAPSHOTTER, "info", chain_id))
