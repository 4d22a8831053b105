"""The whole stage with a real model, engine and ledger; only the store is a dictionary."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
import training_worlds as worlds
from safetensors.torch import load, load_file, save
from signers import HUB_KEY

from tributary_accounting import receipts
from tributary_api.failures import Reason
from tributary_api.records import DeltaManifest, LedgerKind
from tributary_api.round import Aggregation
from tributary_api.tasks import AggregateTask
from tributary_store.digests import digest_of_bytes
from tributary_worker.aggregation.base import open_base
from tributary_worker.aggregation.methods import plan_for
from tributary_worker.failures import StageFailure
from tributary_worker.privacy.keystream import Keystream
from tributary_worker.train import check_finite, computation_hash, read_tenant_key, train

pytestmark = pytest.mark.usefixtures("alone")
ROUNDING = Keystream(bytes(32))


def trained(world):
    """(manifest, tensors) after a training."""
    train(world.task, world.surroundings)
    manifest = DeltaManifest.model_validate_json(world.store.get(world.task.manifest_uri))
    return manifest, load(world.store.get(world.task.delta_uri))


def refused(world, reason, words=None):
    """The training fails with this reason, and nothing is charged or published."""
    with pytest.raises(StageFailure, match=words) as failure:
        train(world.task, world.surroundings)
    assert failure.value.reason is reason
    assert world.store.head(world.task.delta_uri) is None
    assert world.store.head(world.task.manifest_uri) is None
    return failure.value


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2], ids=["llama", "gpt2"])
def test_a_training_publishes_a_delta_with_its_receipt(make, tmp_path, capfd):
    world = worlds.world(tmp_path, make(width=16))
    manifest, tensors = trained(world)
    data = world.store.get(world.task.delta_uri)
    assert manifest.file == digest_of_bytes(data, "delta.safetensors")
    receipts.check(manifest, world.task.grant, worlds.RECEIPT_KEY)
    assert world.ledger.read().receipt_key(worlds.RUN_KEY) == worlds.RECEIPT_KEY
    assert manifest.receipt.self_test.noise_std_ratio == pytest.approx(1.0, abs=0.02)
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert all(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_B" in name)
    assert world.task.manifest_uri in world.store.retained
    assert world.ledger.read().state(worlds.RUN_KEY) is LedgerKind.LAUNCH
    progress = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert progress == [{"step": t, "steps": worlds.STEPS} for t in (1, 2, 3)]


def check_accepted(world, tensors):
    """The aggregator expects these tensors and no others."""
    task = AggregateTask(
        run_key=worlds.RUN_KEY,
        round=worlds.CLIENT,
        base_model=world.task.base_model,
        task=world.task.task,
        method=world.task.method,
        aggregation=Aggregation(),
        deltas=[],
        quorum=1,
        store=world.task.store,
        models_uri="s3://exchange/models/",
        manifest_uri="s3://exchange/manifest.json",
    )
    expected = plan_for(task, open_base(world.store, task.base_model)).expected()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2], ids=["llama", "gpt2"])
def test_full_fine_tuning_publishes_the_change_of_every_weight(make, stage, tmp_path):
    model = make(width=16)
    training = {"deepspeed": {"zeroStage": stage}, "gradientCheckpointing": stage == 3}
    world = worlds.world(tmp_path, model, method={"full": {}}, training=training)
    manifest, tensors = trained(world)
    check_accepted(world, tensors)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in stored.items()}
    # Adam moves every weight by about its learning rate in a step, and noise leaves none where it was.
    assert all(0 < float(t.abs().max()) < 10 * worlds.STEPS * 1e-2 for t in tensors.values())
    assert manifest.receipt.self_test.trainable_parameters == sum(t.numel() for t in stored.values())


def test_weights_that_the_task_has_no_use_for_do_not_change(tmp_path):
    model = tiny_models.gpt2_classifier(width=16)
    model.transformer.unused = torch.nn.Linear(2, 2)
    _, tensors = trained(worlds.world(tmp_path, model, CLASSES, **CLASSIFICATION, method={"full": {}}))
    assert float(tensors["score.weight"].abs().max()) > 0
    assert float(tensors["transformer.unused.weight"].abs().max()) == 0.0


CLASSES = [json.dumps({"text": f"record {i}", "label": i % 3}) for i in range(60)]
CLASSIFICATION = {"task": "SequenceClassification", "data": {"labelField": "label"}}


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (tiny_models.gpt2_classifier, ("score.weight",)),
        (tiny_models.llama_classifier, ("score.weight",)),
        (tiny_models.bert_classifier, ("classifier.weight", "classifier.bias")),
    ],
)
def test_a_classifier_trains_its_head_beside_adapters(make, head, tmp_path):
    training = {"baseDtype": "BFloat16", "gradientCheckpointing": True}
    world = worlds.world(tmp_path, make(), CLASSES, **CLASSIFICATION, training=training)
    _, tensors = trained(world)
    check_accepted(world, tensors)
    assert {name for name in tensors if "lora_" not in name} == set(head)
    assert all(float(tensors[name].abs().max()) > 0 for name in head)
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_classification(tmp_path):
    # Labels that the model does not have, or that are none, are bad records: they contribute nothing.
    bad = [json.dumps({"text": "unknown class", "label": 99}), json.dumps({"text": "none", "label": "a"})]
    method = {"lora": {"rank": 4, "alpha": 8, "targetModules": ["q_proj", "score"]}}
    model = tiny_models.llama_classifier()
    _, tensors = trained(worlds.world(tmp_path, model, CLASSES + bad, **CLASSIFICATION, method=method))
    assert [name for name in tensors if "score" in name] == ["score.weight"]


def test_a_retry_computes_the_same_delta_and_another_round_or_tenant_another(tmp_path):
    _, first = trained(worlds.world(tmp_path / "a"))
    _, again = trained(worlds.world(tmp_path / "b"))
    other_data = worlds.world(tmp_path / "c", lines=worlds.records(59))
    _, changed = trained(other_data)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in first:
        assert torch.equal(first[name], changed[name]) == ("lora_A" in name)


def test_a_published_delta_is_adopted_and_nothing_is_computed(tmp_path):
    world = worlds.world(tmp_path)
    trained(world)
    del world.store.objects["s3://data/notes/part-0.jsonl"]
    before = dict(world.store.objects)
    train(world.task, world.surroundings)
    assert world.store.objects == before


def test_a_delta_without_a_manifest_stays_the_only_one(tmp_path):
    """An attempt died between the two writes, and the retry rounds differently."""
    world = worlds.world(tmp_path)
    trained(world)
    del world.store.objects[world.task.manifest_uri]
    before = bytearray(world.store.objects[world.task.delta_uri])
    before[-4] ^= 1  # the last digit of one element
    world.store.objects[world.task.delta_uri] = bytes(before)
    train(world.task, world.surroundings)
    manifest = DeltaManifest.model_validate_json(world.store.get(world.task.manifest_uri))
    assert world.store.get(world.task.delta_uri) == bytes(before)
    assert manifest.file == digest_of_bytes(bytes(before), "delta.safetensors")


def test_a_delta_of_somebody_else_is_in_the_way_and_not_signed(tmp_path):
    world = worlds.world(tmp_path)
    _, tensors = trained(world)
    del world.store.objects[world.task.manifest_uri]
    delta = world.store.objects[world.task.delta_uri]
    zeros = save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    nothing_is_a_number = delta[:-4] + b"\x00\x00\xc0\x7f"
    for forged in (b"no safetensors", zeros, nothing_is_a_number, delta[:-4], delta[:-400] + bytes(400)):
        world.store.objects[world.task.delta_uri] = forged
        with pytest.raises(StageFailure, match="in the way"):
            train(world.task, world.surroundings)
        assert world.store.head(world.task.manifest_uri) is None


def test_a_manifest_of_another_grant_is_not_adopted(tmp_path):
    world = worlds.world(tmp_path)
    trained(world)
    grant = world.task.grant.model_copy(update={"epsilon": "3"})
    world.task = world.task.model_copy(update={"grant": grant})
    with pytest.raises(StageFailure, match="not for the grant"):
        train(world.task, world.surroundings)


def test_a_manifest_that_the_owner_did_not_sign_is_in_the_way_and_not_adopted(tmp_path):
    world = worlds.world(tmp_path)
    uri = world.task.manifest_uri
    trained(world)
    manifest = DeltaManifest.model_validate_json(world.store.objects[uri])
    world.store.objects[uri] = HUB_KEY.signed(manifest).canonical_json()
    with pytest.raises(StageFailure, match=f"in the way.*{worlds.RECEIPT_KEY}"):
        train(world.task, world.surroundings)


def test_bad_records_change_nothing_and_are_not_reported(tmp_path, capfd):
    bad = ["{not json", json.dumps({"text": 7}), json.dumps([1]), json.dumps({"other": "x"}), "\x00\x01"]
    world = worlds.world(tmp_path, lines=worlds.records(60) + bad)
    trained(world)
    output = capfd.readouterr()
    assert len(output.out.splitlines()) == worlds.STEPS
    assert "json" not in output.err
    assert "record" not in output.err


def test_without_a_reservation_nothing_starts(tmp_path):
    world = worlds.world(tmp_path)
    for uri in [uri for uri in world.store.objects if "ledger" in uri]:
        del world.store.objects[uri]
    refused(world, Reason.LEDGER_REFUSED, "no reservation")


def test_a_released_grant_starts_nothing(tmp_path):
    world = worlds.world(tmp_path)
    world.ledger.release(world.task.grant, "the round was given up")
    refused(world, Reason.LEDGER_REFUSED, "released")


def test_an_overdrawn_budget_starts_nothing(tmp_path):
    world = worlds.world(tmp_path)
    privacy = world.client.spec.privacy
    budget = privacy.budget.model_copy(update={"epsilon": "1"})
    spec = world.client.spec.model_copy(update={"privacy": privacy.model_copy(update={"budget": budget})})
    world.client = world.client.model_copy(update={"spec": spec})
    refused(world, Reason.LEDGER_REFUSED, "of 1")
    assert world.ledger.read().state(worlds.RUN_KEY) is LedgerKind.RESERVE


def test_refusals_of_the_owner_come_before_the_data_is_touched(tmp_path):
    world = worlds.world(tmp_path)
    del world.store.objects["s3://data/notes/part-0.jsonl"]
    world.client = worlds.client_object(suspend=True)
    refused(world, Reason.CONSENT_REFUSED, "suspended")
    assert world.ledger.read().state(worlds.RUN_KEY) is LedgerKind.RESERVE


@pytest.mark.parametrize(
    ("lines", "reason"),
    [([], Reason.DATA_EMPTY), (["{broken", "also broken"], Reason.DATA_UNPARSEABLE)],
)
def test_data_that_is_no_data_fails_without_a_word_of_it(tmp_path, lines, reason):
    failure = refused(worlds.world(tmp_path, lines=lines), reason)
    assert "broken" not in failure.message


def test_a_base_model_with_other_bytes_is_refused(tmp_path):
    world = worlds.world(tmp_path)
    uri = next(uri for uri in world.store.objects if uri.endswith("model.safetensors"))
    world.store.objects[uri] = world.store.objects[uri][:-1] + b"x"
    refused(world, Reason.MODEL_DIGEST_MISMATCH)


def test_a_missing_base_model_is_named(tmp_path):
    world = worlds.world(tmp_path)
    for uri in [uri for uri in world.store.objects if "/models/" in uri]:
        del world.store.objects[uri]
    refused(world, Reason.MODEL_MISSING, "models")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"lora": {"targetModules": ["nowhere"]}}}, "targetModules"),
        ({"training": {"maxSequenceLength": 4096}}, "maxSequenceLength"),
        ({"task": "SequenceClassification"}, r"lacks score\.weight"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, changes, words):
    refused(worlds.world(tmp_path, **changes), Reason.MODEL_UNSUPPORTED, words)


def test_other_settings_have_other_noise():
    """Else a hub could train twice with one key and subtract."""
    tasks = [
        worlds.train_task(worlds.NOWHERE, worlds.client_object(), **changes)
        for changes in (
            {},
            {"training": {"learningRate": "2e-2"}},
            {"training": {"maxSequenceLength": 17}},
            {"method": {"lora": {"rank": 4, "alpha": 9}}},
            {"task": "SequenceClassification"},
        )
    ]
    assert len({computation_hash(task) for task in tasks}) == len(tasks)
    assert computation_hash(tasks[0]) == computation_hash(
        tasks[0].model_copy(update={"attempt": 3, "nodes": 2})
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_not_published(value):
    with pytest.raises(StageFailure, match="learningRate") as failure:
        check_finite({"fine": np.zeros(3), "weight": np.array([1.0, value], np.float32)})
    assert failure.value.reason is Reason.NON_FINITE_DELTA


def test_a_model_type_that_nobody_has_looked_at_is_refused_by_name(tmp_path):
    refused(worlds.world(tmp_path, tiny_models.causal_lm("gemma")), Reason.MODEL_UNSUPPORTED, "'gemma'")


@pytest.mark.parametrize("content", [None, b"", b"too short"])
def test_a_missing_noise_key_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(StageFailure, match="32 random bytes"):
        read_tenant_key(tmp_path / "key")


def test_what_never_trained_costs_nothing(tmp_path):
    world = worlds.world(tmp_path, lines=[])
    refused(world, Reason.DATA_EMPTY)
    assert world.ledger.read().state(worlds.RUN_KEY) is LedgerKind.RESERVE
    world.ledger.release(world.task.grant, "no data")
    assert world.ledger.read().charged() == []


def test_a_release_that_comes_between_check_and_launch_stops_the_training(tmp_path):
    world = worlds.world(tmp_path)
    surroundings = world.surroundings

    class ReleasedWhileReading:
        def read(self):
            world.ledger.release(world.task.grant, "the operator gave up")
            return surroundings.files.read()

    with pytest.raises(StageFailure, match="released"):
        train(world.task, replace(surroundings, files=ReleasedWhileReading()))
    assert world.store.head(world.task.delta_uri) is None
