"""The aggregate stage as its pod runs it: its own process, a real S3 server, each part's identity."""

import os
import subprocess
import sys

import pytest
import tiny_models
from aggregation_worlds import LAYOUT, RUN_KEY, a_round, client
from s3_servers import s3_server

from tributary_api.failures import EXIT_CODES, Reason, TerminationMessage
from tributary_api.records import AggregateManifest
from tributary_api.shared import StoreEndpoint
from tributary_api.tasks import TASK_ENV
from tributary_store import bundle
from tributary_store.objectstore import ObjectStore
from tributary_store.policies import ClientIdentity, HubIdentities, exchange_policy
from tributary_worker import lora
from tributary_worker.failures import TERMINATION_MESSAGE_PATH_ENV

pytestmark = pytest.mark.cluster

HUB = HubIdentities("id-operator", "id-aggregator", "id-serving")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        clients = [
            ClientIdentity(client(n), f"id-{n}", f"s3://exchange/ledger/clinic-{n}/notes/") for n in "abc"
        ]
        for identity in (HUB.operator, HUB.aggregator, HUB.serving, *(c.identity for c in clients)):
            running.create_user(identity, f"secret-of-{identity}")
        running.create_bucket("exchange", object_lock=True)
        running.put_policy("exchange", exchange_policy(LAYOUT, HUB, clients))
        yield running


@pytest.fixture(scope="module")
def made(tmp_path_factory, server):
    """A round whose model was pushed by the hub and whose deltas by the clients."""
    model = tiny_models.gpt2()
    modules = {
        n: lora.features(model.get_submodule(n)) for n in lora.target_names(model, lora.LoraSettings(3, 6.0))
    }
    made = a_round(tiny_models.save(model, tmp_path_factory.mktemp("base") / "model"), modules)
    assert bundle.push(store(server, HUB.aggregator), made.base_directory, LAYOUT.models) == made.base
    for name in made.weights:
        own = store(server, f"id-{name}")
        for uri in (LAYOUT.delta(client(name), RUN_KEY), LAYOUT.delta_manifest(client(name), RUN_KEY)):
            own.put_new(uri, made.store.objects[uri], retain=uri.endswith("manifest.json"))
    return made


def store(server, identity):
    return ObjectStore.open(
        StoreEndpoint(endpoint=server.endpoint_for_host), identity, f"secret-of-{identity}"
    )


def run_stage(made, endpoint, identity, tmp_path, **task):
    changed = made.task.model_copy(update={"store": StoreEndpoint(endpoint=endpoint), **task})
    env = {
        **os.environ,
        TASK_ENV: changed.model_dump_json(by_alias=True),
        "AWS_ACCESS_KEY_ID": identity,
        "AWS_SECRET_ACCESS_KEY": f"secret-of-{identity}",
        TERMINATION_MESSAGE_PATH_ENV: str(tmp_path / "message"),
        "TMPDIR": str(tmp_path),
    }
    argv = [sys.executable, "-m", "tributary_worker", "aggregate"]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_aggregators_identity_suffices_and_the_operator_sees_the_outcome(made, server, tmp_path):
    done = run_stage(made, server.endpoint_for_host, HUB.aggregator, tmp_path)
    assert done.returncode == 0, done.stderr
    seen = store(server, HUB.operator).get(LAYOUT.aggregate_manifest(RUN_KEY))
    manifest = AggregateManifest.model_validate_json(seen)
    assert len(manifest.included) == 3
    # The same bytes as with the store of dictionaries.
    assert manifest.model == made.run(tmp_path / "memory").model
    assert '"event": "done"' in done.stdout
    again = run_stage(made, server.endpoint_for_host, HUB.aggregator, tmp_path)
    assert again.returncode == 0


@pytest.mark.parametrize(
    ("identity", "endpoint", "reason"),
    [
        ("id-a", None, Reason.STORE_DENIED),
        ("nobody", None, Reason.STORE_DENIED),
        (HUB.aggregator, "http://127.0.0.1:9", Reason.STORE_UNREACHABLE),
    ],
)
def test_what_fails_at_the_store_has_its_reason(made, server, tmp_path, *, identity, endpoint, reason):
    done = run_stage(
        made,
        endpoint or server.endpoint_for_host,
        identity,
        tmp_path,
        manifest_uri=LAYOUT.aggregate_manifest("f" * 40),
        run_key="f" * 40,
    )
    assert done.returncode == EXIT_CODES[reason]
    message = TerminationMessage.model_validate_json((tmp_path / "message").read_text())
    assert message.reason is reason
    assert message.retryable is (reason is Reason.STORE_UNREACHABLE)
    assert identity in message.message or endpoint in message.message
