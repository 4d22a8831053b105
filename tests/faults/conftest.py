"""The cluster of standing_cluster.py, with the harness of fault_plans.py between it and the operator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_plans import Harness
from kube import ROOT, Kubectl
from standing_cluster import admin, helm, installed, running

from tributary_dev import cluster as dev

__all__ = ["admin", "helm", "installed", "running"]


@pytest.fixture(scope="session")
def harness(
    running: dev.Cluster, installed: Kubectl, helm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Harness]:
    made = Harness(running, installed, helm, tmp_path_factory.mktemp("faults"))
    yield made
    made.close()
    made.report(ROOT / "out" / "faults.json")
