"""The configuration files are what the programs expect, and name nothing outside the cluster's own places."""

import json
import os
import re
import tomllib
from ipaddress import IPv4Network
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tributary_dev import configs, pki
from tributary_dev.network import Subnet
from tributary_dev.node import Program
from tributary_dev.places import ClusterPlaces
from tributary_dev.programs import ProgramList

PLACE = ClusterPlaces("0123abcd", Path("/state/0123abcd"))
SUBNET = Subnet(IPv4Network("10.170.0.0/16"))
BINARIES = Path("/cache/bin")
FILES = configs.render(PLACE, SUBNET, BINARIES)
OWN_OR_PRIVATE = ("/state/0123abcd", "/cache/bin", "/run/", "/var/log/pods", "/tributary-0123abcd")

texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=5)
values = st.booleans() | st.integers(-(2**31), 2**31) | texts | st.lists(texts, max_size=2)
leaves = st.dictionaries(texts, values, max_size=3)
documents = st.recursive(
    leaves, lambda inner: st.dictionaries(texts, inner | values, max_size=3), max_leaves=6
)


@given(documents)
def test_toml_reads_back_as_what_was_written(document: dict[str, object]) -> None:
    assert tomllib.loads(configs.toml(document)) == document


def test_every_file_parses() -> None:
    assert tomllib.loads(FILES["containerd.toml"])["version"] == 3
    assert json.loads(FILES["cni/10-pods.conflist"])["plugins"][0]["type"] == "ptp"
    assert yaml.safe_load(FILES["kubelet.yaml"])["kind"] == "KubeletConfiguration"
    assert yaml.safe_load(FILES["proxy.yaml"])["kind"] == "KubeProxyConfiguration"


def test_no_file_names_a_path_that_another_cluster_shares() -> None:
    for name, text in FILES.items():
        for path in re.findall(r"(?<![\w./])/[a-z][\w./-]+", text):
            assert path.startswith(OWN_OR_PRIVATE), f"{name} names {path}"


def test_pods_take_their_addresses_from_the_range_that_is_routed() -> None:
    plugin = json.loads(FILES["cni/10-pods.conflist"])["plugins"][0]
    assert plugin["ipam"]["ranges"] == [[{"subnet": str(SUBNET.pods)}]]
    assert yaml.safe_load(FILES["proxy.yaml"])["clusterCIDR"] == str(SUBNET.pods)
    assert yaml.safe_load(FILES["kubelet.yaml"])["clusterDNS"] == [str(SUBNET.node)]


def test_unchanged_files_are_not_touched(tmp_path: Path) -> None:
    place = ClusterPlaces("0123abcd", tmp_path)
    configs.write(place, FILES)
    for name in FILES:
        os.utime(place.config / name, (0, 0))
    configs.write(place, {**FILES, "kubelet.yaml": "changed"})
    assert [name for name in FILES if (place.config / name).stat().st_mtime > 0] == ["kubelet.yaml"]


def _programs(files: dict[str, str]) -> dict[str, Program]:
    programs = ProgramList(PLACE, SUBNET, BINARIES, files, {"ROOT_SECRET_KEY": "hidden"})
    return {program.name: program for program in programs.control_plane() + programs.node()}


def test_a_program_changes_when_its_file_does_and_no_other() -> None:
    before, after = _programs(FILES), _programs({**FILES, "kubelet.yaml": "changed"})
    assert {name for name in before if before[name] != after[name]} == {"kubelet"}


def test_no_secret_is_an_argument() -> None:
    assert not any("hidden" in word for program in _programs(FILES).values() for word in program.argv)


def test_only_the_administrator_is_a_master() -> None:
    assert [identity.name for identity in pki.IDENTITIES if "masters" in identity.subject] == ["admin"]
