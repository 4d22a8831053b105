"""The image store of one cluster's containerd: what it holds, and how images get into it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tributary_dev.oci import Image, write_archive
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

    def load(self, image: Image, names: Sequence[str]) -> None:
        """Import and unpack an image under `names`. Layers that are unpacked already are not sent again."""
        unpacked = zip(image.layers, image.chain_ids(), strict=True)
        missing = [layer.digest for layer, chain_id in unpacked if not self._has(chain_id)]
        flags = ["--local", "--discard-unpacked-layers", "--snapshotter", SNAPSHOTTER]
        argv, pipe = self._ctr("images", "import", *flags, "-"), subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as ctr:
            assert ctr.stdin is not None
            assert ctr.stdout is not None
            with suppress(BrokenPipeError):  # containerd gave up; what it printed says why
                write_archive(image, names, missing, ctr.stdin)
                ctr.stdin.close()
            output = ctr.stdout.read().decode(errors="replace")
        if ctr.returncode != 0:
            raise CommandError(f"containerd did not take {names[0]}:\n{output[-2000:]}")

    def _has(self, chain_id: str) -> bool:
        return succeeds(self._ctr("snapshots", "--snapshotter", SNAPSHOTTER, "info", chain_id))
