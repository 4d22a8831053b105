"""A cluster of the user's own: what is missing is said before anything is made."""

from __future__ import annotations

import json

import pytest
from kubernetes.config import kube_config

from docstrings_demo import stage
from docstrings_demo.problems import DemoError

NOBODY = "http://127.0.0.1:9"
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "dev", "cluster": {"server": NOBODY}}],
    "users": [{"name": "me", "user": {}}],
    "contexts": [{"name": "kind-dev", "context": {"cluster": "dev", "user": "me"}}],
    "current-context": "kind-dev",
}


@pytest.fixture
def variables(monkeypatch, tmp_path):
    """All that a run needs, with nothing behind it."""
    (tmp_path / "kubeconfig").write_text(json.dumps(KUBECONFIG))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    for name in (*stage.S3_VARIABLES, *stage.IMAGE_VARIABLES.values()):
        monkeypatch.setenv(name, NOBODY)
    return monkeypatch


@pytest.mark.parametrize("name", [*stage.S3_VARIABLES, *stage.IMAGE_VARIABLES.values()])
def test_a_missing_variable_is_named(variables, name):
    variables.delenv(name)
    with pytest.raises(DemoError, match=name):
        stage.existing("kind-dev")


@pytest.mark.timeout(60)
def test_an_s3_server_that_does_not_answer_is_named(variables):
    with pytest.raises(DemoError, match=NOBODY):
        stage.existing("kind-dev")


def test_a_context_that_does_not_exist_is_named(variables):
    with pytest.raises(DemoError, match="kind-other"):
        stage.existing("kind-other")
