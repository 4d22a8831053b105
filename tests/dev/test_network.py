"""Addresses: every cluster of a machine has its own, and keeps them."""

import re
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tributary_dev.network import (
    SUBNET_FILE,
    SUBNETS,
    NoSubnetError,
    Subnet,
    claim_subnet,
    forget_claims,
    free_subnet,
)
from tributary_dev.places import ClusterPlaces, cluster_id


@given(st.sampled_from(SUBNETS))
def test_the_parts_of_a_subnet_are_apart_and_inside_it(network: IPv4Network) -> None:
    subnet = Subnet(network)
    parts = [subnet.cable, subnet.pods, subnet.services]
    assert all(part.subnet_of(network) for part in parts)
    assert not any(a.overlaps(b) for i, a in enumerate(parts) for b in parts[i + 1 :])
    assert {subnet.host, subnet.node} == set(subnet.cable.hosts())
    assert subnet.kubernetes_service in subnet.services


@given(st.sets(st.sampled_from(SUBNETS)))
def test_a_free_subnet_overlaps_nothing_that_is_taken(taken: set[IPv4Network]) -> None:
    if taken == set(SUBNETS):
        with pytest.raises(NoSubnetError, match="down"):
            free_subnet(taken)
    else:
        assert free_subnet(taken).network not in taken


def test_a_route_inside_a_range_takes_the_whole_range() -> None:
    assert free_subnet([IPv4Network("10.160.7.0/24")]).network == SUBNETS[1]


def test_clusters_get_different_subnets_and_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIBUTARY_STATE", str(tmp_path))
    first, second = ClusterPlaces.of("one"), ClusterPlaces.of("two")
    claimed = claim_subnet(first)
    assert claim_subnet(second) != claimed
    assert claim_subnet(first) == claimed


def test_the_interface_name_is_short_enough_for_the_kernel() -> None:
    place = ClusterPlaces.of("any checkout")
    assert len(place.interface) <= 15
    assert re.fullmatch(r"[0-9a-f]{8}", cluster_id("any checkout"))


def test_the_last_cluster_takes_the_lock_file_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIBUTARY_STATE", str(tmp_path))
    places = [ClusterPlaces.of("one"), ClusterPlaces.of("two")]
    for place in places:
        claim_subnet(place)
    (places[0].root / SUBNET_FILE).unlink()
    assert not forget_claims(places[0])
    (places[1].root / SUBNET_FILE).unlink()
    assert forget_claims(places[1])
    assert not list(tmp_path.glob("*.lock"))
