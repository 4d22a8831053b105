"""Helm, as `python -m tributary_dev build` makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tributary_dev import build


@pytest.fixture(scope="session")
def helm() -> Path:
    return build.binaries() / "helm"
