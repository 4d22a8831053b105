"""`python -m tributary_worker train` as a pod runs it: real S3, a TLS API server, one or two processes."""

from __future__ import annotations

import json

import pytest
import training_worlds as worlds
from s3_servers import s3_server
from safetensors.torch import load
from tenant_pods import tenant_namespace

from tributary_api.failures import EXIT_CODES, Reason
from tributary_store.objects import bucket_and_key


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def namespace(s3, tmp_path):
    with tenant_namespace(s3, tmp_path) as found:
        yield found


STEPS = [{"step": t, "steps": worlds.STEPS} for t in (1, 2, 3)]
PRIVATE_WORDS = ("loss", "norm=", "grad_norm", "skipped", "lr=", "says")
"""What DeepSpeed and others like to print, and a word of every record."""


def test_two_processes_train_what_one_does_and_nothing_private_is_printed(namespace, s3):
    one = namespace.run()
    assert one.returncode == 0, one.stderr
    delta = load(namespace.store.get(namespace.task.delta_uri))
    for uri in (namespace.task.delta_uri, namespace.task.manifest_uri):
        bucket, key = bucket_and_key(uri)
        s3.client().delete_object(Bucket=bucket, Key=key)  # else the second would adopt the first's
    two = namespace.run(processes_per_node=2)
    assert two.returncode == 0, two.stderr
    again = load(namespace.store.get(namespace.task.delta_uri))
    assert all(delta[name].allclose(again[name], rtol=1e-4, atol=1e-5) for name in delta)
    for ended in (one, two):
        assert [json.loads(line) for line in ended.stdout.splitlines()] == STEPS
        assert not [word for word in PRIVATE_WORDS if word in ended.stderr.lower()]


def test_all_processes_end_when_consent_is_refused(namespace):
    grant = namespace.task.grant.model_copy(update={"hub_namespace": "another"})
    ended = namespace.run(processes_per_node=2, grant=grant)
    assert ended.returncode == EXIT_CODES[Reason.CONSENT_REFUSED]
    assert namespace.termination_message["reason"] == Reason.CONSENT_REFUSED
    assert "hub another" in str(namespace.termination_message["message"])
    assert ended.stdout == ""
