"""A delta that cannot be trusted is left out by name, and the others make the model that they would alone."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from aggregation_worlds import FROZEN, FULL, LAYOUT, RUN_KEY, a_round, client, grant_digest
from safetensors.numpy import save
from signers import HUB_KEY

from tributary_api.failures import Reason
from tributary_api.records import DeltaManifest
from tributary_store.errors import StoreUnreachable
from tributary_worker import lora
from tributary_worker.failures import StageFailure

B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
A = B.replace("lora_B", "lora_A")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = tiny_models.llama()
    names = lora.target_names(model, lora.LoraSettings(3, 6.0))
    modules = {name: lora.features(model.get_submodule(name)) for name in names}
    return tiny_models.save(model, tmp_path_factory.mktemp("base") / "model"), modules


@pytest.fixture
def made(base):
    return a_round(*base)


def with_tensor(name, change):
    """The second client's delta with one tensor changed."""

    def publish(made):
        delta = dict(made.deltas["b"])
        delta[name] = change(delta[name].copy())
        made.publish("b", save(delta))

    return publish


def put(index, value):
    def change(tensor):
        tensor.flat[index] = value
        return tensor

    return change


def flip(made):
    """The bytes change after the manifest was written."""
    uri = LAYOUT.delta(client("b"), RUN_KEY)
    data = bytearray(made.store.objects[uri])
    data[-5] ^= 1
    made.store.objects[uri] = bytes(data)


def cut(made):
    uri = LAYOUT.delta(client("b"), RUN_KEY)
    made.store.objects[uri] = made.store.objects[uri][:-4]


def without(*names):
    return lambda made: made.publish("b", save({k: v for k, v in made.deltas["b"].items() if k not in names}))


def forged_receipt(made):
    manifest = made.store.objects[LAYOUT.delta_manifest(client("b"), RUN_KEY)]
    forged = manifest.replace(grant_digest("b").encode(), grant_digest("z").encode())
    assert forged != manifest
    made.store.objects[LAYOUT.delta_manifest(client("b"), RUN_KEY)] = forged


def signed_by_another(made):
    uri = LAYOUT.delta_manifest(client("b"), RUN_KEY)
    manifest = DeltaManifest.model_validate_json(made.store.objects[uri])
    made.store.objects[uri] = HUB_KEY.signed(manifest).canonical_json()


def altered_after_signing(made):
    uri = LAYOUT.delta_manifest(client("b"), RUN_KEY)
    altered = made.store.objects[uri].replace(b'"epsilon":"1"', b'"epsilon":"2"')
    assert altered != made.store.objects[uri]
    made.store.objects[uri] = altered


def remove(uri):
    return lambda made: made.store.objects.pop(uri)


def scaled(made, factor):
    return save({k: v if "lora_A" in k else factor * v for k, v in made.deltas["b"].items()})


def too_large(made):
    made.publish("b", scaled(made, 100))


CASES = {
    "not a number": (with_tensor(B, put(-1, np.nan)), "NonFiniteDelta", "not finite"),
    "infinite": (with_tensor(B, put(0, -np.inf)), "NonFiniteDelta", "not finite"),
    "a flipped bit": (flip, "DeltaDamaged", "not those that were published"),
    "cut off": (cut, "DeltaDamaged", "cut off"),
    "no safetensors": (
        lambda m: m.publish("b", b"\x80\x04K\x01."),
        "DeltaDamaged",
        "not a whole safetensors",
    ),
    "empty": (lambda m: m.publish("b", b""), "DeltaDamaged", "not a whole safetensors"),
    "a hundred times too large": (too_large, "NormTooLarge", "10 times the cohort's median"),
    "larger than it says": (
        lambda m: m.publish("b", scaled(m, 100), l2_norm=0.3),
        "NormMismatch",
        "its manifest states 0.3",
    ),
    "a norm that is none": (lambda m: m.publish("b", l2_norm=float("nan")), "DeltaDamaged", "not a delta"),
    "no delta": (remove(LAYOUT.delta(client("b"), RUN_KEY)), "DeltaMissing", "delta.safetensors"),
    "no manifest": (remove(LAYOUT.delta_manifest(client("b"), RUN_KEY)), "DeltaMissing", "manifest.json"),
    "another shape": (with_tensor(B, lambda t: t.T.copy()), "DeltaMalformed", "shape (3, 64), not (64, 3)"),
    "another type": (with_tensor(B, lambda t: t.astype(np.float16)), "DeltaMalformed", "type F16, not F32"),
    "a tensor too few": (without(B), "DeltaMalformed", f"no tensor {B}"),
    "a tensor too many": (
        lambda m: m.publish("b", save({**m.deltas["b"], "evil": m.deltas["b"][B]})),
        "DeltaMalformed",
        "evil belongs to no trained weight",
    ),
    "a frozen factor of its own": (with_tensor(A, put(3, 0.25)), "GrantMismatch", "not the frozen one"),
    "another grant": (forged_receipt, "GrantMismatch", "is for grant"),
    "another signer": (signed_by_another, "SignatureRefused", "only ed25519:"),
    "altered after signing": (altered_after_signing, "SignatureRefused", "was altered"),
    "another run": (lambda m: m.publish("b", run_key="f" * 40), "GrantMismatch", "is for run"),
    "another client": (lambda m: m.publish("b", client=client("a")), "GrantMismatch", "is for client"),
    "another base model": (
        lambda m: m.publish("b", base_model_digest="sha256:" + "1" * 64),
        "GrantMismatch",
        "is for base model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_delta_is_left_out_by_name(base, made, tmp_path, case):
    spoil, reason, message = CASES[case]
    spoil(made)
    manifest = made.run(tmp_path / "work")
    (failure,) = manifest.excluded
    assert (failure.client, failure.reason) == ("clinic-b/notes", reason)
    assert message in failure.message
    assert [c.namespace for c in manifest.included] == ["clinic-a", "clinic-c"]
    others = a_round(*base).only("a", "c").run(tmp_path / "others")
    assert manifest.model.digest == others.model.digest


def test_a_frozen_factor_need_not_be_sent(base, made, tmp_path):
    full = a_round(*base).run(tmp_path / "full")
    without(*[name for name in made.deltas["b"] if "lora_A" in name])(made)
    assert made.run(tmp_path / "work").model.digest == full.model.digest


def test_below_the_quorum_nothing_is_published(made, tmp_path):
    flip(made)
    before = set(made.store.objects)
    object.__setattr__(made, "quorum", 3)
    with pytest.raises(
        StageFailure, match=r"2 usable deltas of 3.*clinic-b/notes \(DeltaDamaged\)"
    ) as raised:
        made.run(tmp_path / "work")
    assert raised.value.reason is Reason.QUORUM_BROKEN
    assert not raised.value.retryable
    record = LAYOUT.aggregate_records(RUN_KEY).exclusion(client("b"))
    assert set(made.store.objects) == before | {record}


def test_a_store_that_does_not_answer_says_nothing_about_a_delta(made, tmp_path, monkeypatch):
    get = made.store.get

    def unreachable(uri):
        if "clinic-b" in uri:
            raise StoreUnreachable(uri)
        return get(uri)

    monkeypatch.setattr(made.store, "get", unreachable)
    with pytest.raises(StoreUnreachable):
        made.run(tmp_path / "work")


FULL_B = "model.layers.0.self_attn.q_proj.weight"
FULL_CASES = {
    "not a number": (
        with_tensor(FULL_B, put(-1, np.nan)),
        "NonFiniteDelta",
        f"tensor {FULL_B} is not finite",
    ),
    "infinite": (with_tensor(FULL_B, put(0, -np.inf)), "NonFiniteDelta", "not finite"),
    "another type": (with_tensor(FULL_B, lambda t: t.astype(np.float16)), "DeltaMalformed", "type F16"),
    "another shape": (with_tensor(FULL_B, lambda t: t[:-1].copy()), "DeltaMalformed", "has shape (63, 64)"),
    "a tensor too few": (without(FULL_B), "DeltaMalformed", f"no tensor {FULL_B}"),
    "larger than it says": (
        lambda m: m.publish("b", save({k: 9 * v for k, v in m.deltas["b"].items()}), l2_norm=4.0),
        "NormMismatch",
        "its manifest states 4",
    ),
    "a hundred times too large": (
        lambda m: m.publish("b", save({k: 100 * v for k, v in m.deltas["b"].items()})),
        "NormTooLarge",
        "10 times",
    ),
} | {name: CASES[name] for name in ("a flipped bit", "cut off", "empty", "no delta", "another grant")}


@pytest.mark.parametrize("strategy", [{}, {"strategy": "Median"}, {"strategy": "GeometricMedian"}], ids=str)
@pytest.mark.parametrize("case", FULL_CASES)
def test_a_bad_delta_of_all_weights_is_left_out_by_name(base, tmp_path, case, strategy):
    """It is found on the way, when much of the new model is written; the pass starts again without it."""
    spoil, reason, message = FULL_CASES[case]
    made = full_round(base, strategy)
    spoil(made)
    manifest = made.run(tmp_path / "work")
    (failure,) = manifest.excluded
    assert (failure.client, failure.reason) == ("clinic-b/notes", reason)
    assert message in failure.message
    others = full_round(base, strategy).only("a", "c", "d").run(tmp_path / "others")
    assert manifest.model.digest == others.model.digest


def full_round(base, strategy):
    return replace(a_round(*base, FULL, clients=4), aggregation=strategy)


@pytest.mark.parametrize("method", [FROZEN, FULL], ids=["frozen-a", "full"])
def test_a_header_cannot_change_after_it_was_read(base, tmp_path, monkeypatch, method):
    """It comes unchecked, and with another one right bytes would be taken for other weights."""
    directory, modules = base
    made = a_round(directory, modules, method)
    read, seen = made.store.get_range, []

    def changing(uri, start, length):
        data = read(uri, start, length)
        if uri == LAYOUT.delta(client("b"), RUN_KEY) and not seen:
            seen.append(start)
            # Two tensors of one shape change their names.
            return data.replace(b"q_proj", b"?").replace(b"o_proj", b"q_proj").replace(b"?", b"o_proj")
        return data

    monkeypatch.setattr(made.store, "get_range", changing)
    (failure,) = made.run(tmp_path / "work").excluded
    assert (failure.client, failure.reason) == ("clinic-b/notes", "DeltaDamaged")
