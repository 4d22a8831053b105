"""What makes a worker refuse in the owner's object and in the grant; and how it reads that object."""

from __future__ import annotations

import json

import pytest
import training_worlds as worlds
from api_servers import CLIENT_PATH as PATH
from api_servers import api_server, write_certificate
from signers import HUB_KEY, OWNER_KEY

from tributary_api.failures import Reason
from tributary_api.round import LoraMethod, Method
from tributary_api.shared import ModelRef, TaskKind
from tributary_store.keys import Layout
from tributary_worker.consent import ApiServer, check_consent, check_grant
from tributary_worker.failures import StageFailure

MODEL = ModelRef(uri="s3://exchange/models/0", digest="sha256:" + "0" * 64)
CLIENT = worlds.client_object()
TASK = worlds.train_task(MODEL, CLIENT)


def object_with(**spec):
    base = CLIENT.spec.to_json_object()
    return worlds.client_object(
        **{name: base[name] | value if isinstance(value, dict) else value for name, value in spec.items()}
    )


def test_what_the_owner_agreed_to_is_not_refused():
    check_consent(TASK, CLIENT, worlds.RECEIPT_KEY, worlds.NOW)
    check_grant(TASK)


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (object_with(suspend=True), "suspended"),
        (object_with(consent={"expires": "2026-05-31T23:59:59Z"}), "expired"),
        (object_with(consent={"hubs": [{"namespace": "other"}]}), "hub hub"),
        (object_with(data={"uri": "s3://data/other/"}), r"spec\.data"),
        (object_with(data={"name": "letters"}), r"spec\.data"),
        (object_with(data={"numExamples": 39}), r"spec\.data"),
        (object_with(privacy={"ledgerUri": "s3://own/new-ledger/"}), "ledger"),
        (object_with(store={"endpoint": "http://elsewhere"}), "store"),
        (object_with(privacy={"maxRoundEpsilon": "3.9"}), "maxRoundEpsilon"),
        (object_with(consent={"hubs": [{"namespace": "hub", "publicKey": OWNER_KEY.public}]}), "trusts only"),
        (object_with(privacy={"receiptKey": HUB_KEY.public}), "receiptKey"),
        (object_with(privacy={"budget": {"epsilon": "8", "delta": "1e-6"}}), "delta"),
        (CLIENT.model_copy(update={"metadata": CLIENT.metadata.model_copy(
            update={"deletion_timestamp": worlds.NOW})}), "deleted"),
    ],
)  # fmt: skip
def test_what_the_owner_did_not_agree_to_is_refused(client, words):
    with pytest.raises(StageFailure, match=words) as failure:
        check_consent(TASK, client, worlds.RECEIPT_KEY, worlds.NOW)
    assert failure.value.reason is Reason.CONSENT_REFUSED
    assert not failure.value.retryable


def test_keys_that_the_owner_names_are_accepted():
    client = object_with(
        consent={"hubs": [{"namespace": "hub", "publicKey": HUB_KEY.public}]},
        privacy={"receiptKey": worlds.RECEIPT_KEY},
    )
    check_consent(TASK, client, worlds.RECEIPT_KEY, worlds.NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"grant": TASK.grant.model_copy(update={"epsilon": "4.0"})},
        {"grant_signature": HUB_KEY.sign(TASK.grant.model_copy(update={"round_name": "round-2"}))},
        {"grant_signature": HUB_KEY.sign(TASK.grant).model_copy(update={"key": OWNER_KEY.public})},
    ],
    ids=["altered", "of another grant", "under another's name"],
)
def test_a_grant_that_the_hub_did_not_sign_so_is_refused(change):
    with pytest.raises(StageFailure, match="altered") as failure:
        check_grant(TASK.model_copy(update=change))
    assert failure.value.reason is Reason.GRANT_REFUSED


def signed(task, **grant):
    """A hub that means it so."""
    changed = task.grant.model_copy(update=grant)
    return task.model_copy(update={"grant": changed, "grant_signature": HUB_KEY.sign(changed)})


def test_a_grant_that_counts_on_more_examples_than_declared_is_refused():
    mechanism = TASK.grant.mechanism.model_copy(update={"num_examples": 50})
    task = signed(TASK, mechanism=mechanism)
    with pytest.raises(StageFailure, match="more examples"):
        check_consent(task, CLIENT, worlds.RECEIPT_KEY, worlds.NOW)


def with_training(**settings):
    return TASK.model_copy(update={"training": TASK.training.model_copy(update=settings)})


def in_bucket(bucket):
    """The task of a hub that asks for the same delta once more, in a bucket of its own."""
    layout = Layout(bucket)
    return TASK.model_copy(
        update={
            "delta_uri": layout.delta(worlds.CLIENT, worlds.RUN_KEY),
            "manifest_uri": layout.delta_manifest(worlds.CLIENT, worlds.RUN_KEY),
        }
    )


OTHER_MODEL = MODEL.model_copy(update={"digest": "sha256:" + "1" * 64})


def changed(**mechanism):
    return signed(TASK, mechanism=TASK.grant.mechanism.model_copy(update=mechanism))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (changed(steps=4), "steps"),
        (changed(expected_batch_size=9), "expectedBatchSize"),
        (changed(batch_cap=39), "batch cap"),
        (changed(noise_multiplier=0.3), "costs epsilon"),
        (TASK.model_copy(update={"base_model": OTHER_MODEL}), "base model"),
        (TASK.model_copy(update={"delta_uri": TASK.delta_uri + "2"}), "must be written to"),
        (TASK.model_copy(update={"manifest_uri": TASK.delta_uri}), "must be written to"),
        (signed(TASK, epsilon="0.5"), "costs epsilon"),
        (in_bucket("another"), "must be written to s3://exchange/"),
        (with_training(learning_rate="2e-2"), "method, training or task kind"),
        (with_training(micro_batch_size=2), "method, training or task kind"),
        (TASK.model_copy(update={"method": Method(lora=LoraMethod(rank=8, alpha=8))}), "method, training"),
        (TASK.model_copy(update={"task": TaskKind.SEQUENCE_CLASSIFICATION}), "method, training or task"),
    ],
)  # fmt: skip
def test_a_task_that_is_not_its_grant_is_refused(task, words):
    with pytest.raises(StageFailure, match=words) as failure:
        check_grant(task)
    assert failure.value.reason is Reason.GRANT_REFUSED


@pytest.fixture
def api(tmp_path, monkeypatch):
    with api_server(tmp_path) as (environment, answers):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield answers


def test_the_owners_object_is_read_under_the_pods_identity(api, tmp_path):
    api[PATH] = (200, json.dumps(CLIENT.to_json_object()).encode())
    assert ApiServer.of_cluster(tmp_path).client(worlds.CLIENT).spec == CLIENT.spec


@pytest.mark.parametrize(
    ("answer", "retryable"),
    [((404, b"{}"), False), ((403, b"{}"), False), ((503, b""), True), ((200, b"not json"), True)],
)
def test_an_object_that_cannot_be_read_is_no_consent(api, tmp_path, answer, retryable):
    api[PATH] = answer
    with pytest.raises(StageFailure) as failure:
        ApiServer.of_cluster(tmp_path).client(worlds.CLIENT)
    assert failure.value.reason is Reason.CONSENT_REFUSED
    assert failure.value.retryable is retryable


def test_a_server_that_the_cluster_did_not_sign_is_not_believed(api, tmp_path):
    api[PATH] = (200, json.dumps(CLIENT.to_json_object()).encode())
    write_certificate(tmp_path)
    with pytest.raises(StageFailure):
        ApiServer.of_cluster(tmp_path).client(worlds.CLIENT)


def test_outside_a_cluster_there_is_no_consent(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(StageFailure, match="API server"):
        ApiServer.of_cluster(tmp_path)
