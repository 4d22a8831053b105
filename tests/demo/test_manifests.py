"""The committed manifests, completed as the demo completes them, are what the API accepts."""

from __future__ import annotations

from docstrings_demo import manifests
from docstrings_demo.owners import BUCKET, DATASET_URI, OWNERS
from tributary_api.client import FederatedClientSpec
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound
from tributary_api.shared import DatasetRef, ModelRef, StoreEndpoint

DIGEST = "sha256:" + "0" * 64
DATASET = DatasetRef(uri=DATASET_URI, digest=DIGEST)
MODEL = ModelRef(uri=f"s3://{BUCKET}/models/{'0' * 64}", digest=DIGEST)
STORE = StoreEndpoint(endpoint="http://10.0.0.1:9000")
IMAGE = f"localhost/worker@{DIGEST}"


def test_round_2_differs_from_round_1_only_in_its_base_model() -> None:
    first = FederatedRound.model_validate(manifests.fedround("round-1", DATASET, MODEL))
    second = FederatedRound.model_validate(manifests.fedround("round-2", DATASET, None))
    assert second.spec.base_model.round_ref is not None
    assert second.spec.base_model.round_ref.name == first.metadata.name
    assert first.spec.model_copy(update={"base_model": second.spec.base_model}) == second.spec


def test_release_2_is_release_1_with_another_round() -> None:
    first, second = (
        ModelRelease.model_validate(manifests.release(name, DATASET)) for name in ("release-1", "release-2")
    )
    assert first.metadata == second.metadata
    assert second.spec.model.round_ref is not None
    assert second.spec.model.round_ref.name == "round-2"
    assert first.spec.model_copy(update={"model": second.spec.model}) == second.spec


def test_every_owner_consents_to_the_hub_and_can_pay_for_both_rounds() -> None:
    fedround = FederatedRound.model_validate(manifests.fedround("round-1", DATASET, MODEL))
    for owner in OWNERS:
        values = manifests.client_values(owner, IMAGE, STORE, ("key", "secret"))
        spec = FederatedClientSpec.model_validate(values["client"]["spec"])
        assert [hub.namespace for hub in spec.consent.hubs] == [fedround.metadata.namespace]
        # The sum of the rounds' ε is an upper bound of what the ledger composes.
        assert 2 * float(fedround.spec.privacy.epsilon) <= float(spec.privacy.budget.epsilon)
        assert float(fedround.spec.privacy.epsilon) <= float(spec.privacy.max_round_epsilon)
        assert owner.private_uri.startswith(spec.data.uri)
        assert not owner.published_uri.startswith(spec.data.uri)
        assert values["namespace"]["labels"].items() >= {"example": "docstrings"}.items()


def test_one_owner_trains_in_two_pods() -> None:
    nodes = [
        FederatedClientSpec.model_validate(
            manifests.client_values(owner, IMAGE, STORE, ("key", "secret"))["client"]["spec"]
        ).worker.nodes
        for owner in OWNERS
    ]
    assert sorted(nodes) == [1, 1, 2]


def test_training_pods_may_reach_the_store_they_are_given() -> None:
    values = manifests.client_values(OWNERS[0], IMAGE, STORE, ("key", "secret"))
    assert 9000 in values["networkPolicy"]["egressPorts"]
    cloud = manifests.client_values(OWNERS[0], IMAGE, StoreEndpoint(), ("key", "secret"))
    assert 443 in cloud["networkPolicy"]["egressPorts"]
