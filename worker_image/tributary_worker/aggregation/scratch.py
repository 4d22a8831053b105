"""Space for what does not last: on the local disk, and what a killed pod left at the store."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from tributary_store.errors import StoreError
from tributary_store.objects import Objects


def discard_unfinished(store: Objects, uri: str) -> None:
    """Remove unfinished uploads of this object, if the store lets us: they cost space and nothing else."""
    with suppress(StoreError):
        store.discard_unfinished(uri)


def unnamed_file(directory: Path) -> int:
    """The descriptor of a file without a name: its space is free again when this process ends, however."""
    file, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    return file
