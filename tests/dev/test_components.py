"""What is built, from which modules, and under which key it is cached."""

from dataclasses import replace

import pytest

from tributary_dev.components import (
    COMPONENTS,
    COREDNS,
    KUBERNETES,
    KUBERNETES_STAGING_VERSION,
    go_mod,
    key,
    staged_modules,
)

PUBLISHED = """\
module k8s.io/kubernetes

require (
	github.com/blang/semver/v4 v4.0.0
	k8s.io/api v0.0.0
	k8s.io/kube-openapi v0.0.0-20250910181357-589584f1c912
	k8s.io/kubelet v0.0.0
	k8s.io/utils v0.0.0-20250604170112-4c0f3b243397
)

require k8s.io/metrics v0.0.0
"""


def test_only_modules_without_a_version_are_staged() -> None:
    assert staged_modules(PUBLISHED) == ("k8s.io/api", "k8s.io/kubelet", "k8s.io/metrics")


def test_every_staged_module_is_replaced() -> None:
    text = go_mod(KUBERNETES, staged_modules(PUBLISHED))
    for module in ("k8s.io/api", "k8s.io/kubelet", "k8s.io/metrics"):
        assert f"replace {module} => {module} {KUBERNETES_STAGING_VERSION}\n" in text
    assert "k8s.io/utils" not in text
    assert f"require {KUBERNETES.module} {KUBERNETES.version}\n" in text


def test_staged_modules_without_a_version_for_them_are_refused() -> None:
    with pytest.raises(ValueError, match="staging_version"):
        go_mod(COREDNS, ("k8s.io/api",))


def test_a_module_with_one_program_gives_it_the_component_name() -> None:
    assert COREDNS.programs == ("coredns",)
    assert COREDNS.import_paths == ("github.com/coredns/coredns",)
    assert "kubelet" in KUBERNETES.programs


def test_no_two_components_build_the_same_program() -> None:
    programs = [program for component in COMPONENTS for program in component.programs]
    assert len(programs) == len(set(programs))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "v9"},
        {"tags": ("x",)},
        {"stamps": (("a.b", "c"),)},
        {"packages": ("cmd/other",)},
        {"staging_version": "v0.9.0"},
    ],
)
def test_the_key_depends_on_everything_that_changes_the_program(change: dict[str, object]) -> None:
    assert key(replace(COREDNS, **change)) != key(COREDNS)  # type: ignore[arg-type]


def test_the_linker_stamps_the_version() -> None:
    assert f"gitVersion={KUBERNETES.version}" in KUBERNETES.linker_flags
