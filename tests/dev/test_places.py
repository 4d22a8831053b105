"""Which cluster belongs to whom."""

from pathlib import Path

import pytest

from tributary_dev.places import OWNER_FILE, ClusterPlaces, checkout


def test_the_clusters_of_a_checkout_are_found_whatever_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIBUTARY_STATE", str(tmp_path))
    mine = [ClusterPlaces.of(), ClusterPlaces.of("beside it")]
    foreign = ClusterPlaces.of("of another checkout")
    for place in (*mine, foreign):
        place.claim()
    (foreign.root / OWNER_FILE).write_text("/another/checkout")
    assert {place.root for place in ClusterPlaces.of_checkout()} == {place.root for place in mine}


def test_the_checkout_is_where_the_project_lies() -> None:
    assert (checkout() / "pyproject.toml").is_file()


def test_a_cluster_is_named_by_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUTARY_STATE", str(tmp_path))
    assert ClusterPlaces.of("a") == ClusterPlaces.of("a") != ClusterPlaces.of("b")
    assert ClusterPlaces.of() == ClusterPlaces.of(str(checkout()))
