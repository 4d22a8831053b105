"""Who is in a plan: draws, quorums, overlaps, and what the accountant is asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from round_worlds import BASE, SETTINGS, a_client, a_plan, a_round

from tributary_api.round import Method
from tributary_operator.rounds.eligibility import name_of, overlapping
from tributary_operator.rounds.models import lora_weights
from tributary_operator.rounds.planning import drawn, grant, quorum

NAMES = [f"c{i}" for i in range(8)]


@given(st.permutations(NAMES), st.integers(1, 10), st.integers(0, 99))
def test_a_sample_depends_on_seed_and_run_alone(order: list[str], count: int, seed: int) -> None:
    fedround = a_round(clients={"sample": {"count": count, "seed": seed}})
    cohort = [name_of(c) for c in drawn(fedround, [a_client(name) for name in order])]
    assert cohort == [name_of(c) for c in drawn(fedround, [a_client(name) for name in NAMES])]
    assert len(cohort) == min(count, len(NAMES))
    assert len(set(cohort)) == len(cohort)


def test_seeds_draw_differently() -> None:
    clients = [a_client(name) for name in NAMES]
    draws = {
        tuple(str(name_of(c)) for c in drawn(a_round(clients={"sample": {"count": 4, "seed": s}}), clients))
        for s in range(20)
    }
    assert len(draws) > 5


@pytest.mark.parametrize(
    ("wanted", "size", "needed"),
    [
        ("100%", 3, 3),
        ("80%", 3, 3),
        ("50%", 3, 2),
        ("0%", 3, 1),
        (2, 3, 2),
        (0, 3, 1),
        ("2", 3, 2),
        (9, 3, 9),
    ],
)
def test_quorum(wanted: str | int, size: int, needed: int) -> None:
    assert quorum(a_round(clients={"minAvailable": wanted}), size) == needed


def test_a_grant_states_the_rounded_number_of_examples() -> None:
    granted = grant(a_round(), a_client(data={"numExamples": 12987}), BASE, 0.8, SETTINGS.layout)
    assert granted.mechanism.num_examples == 12000
    assert granted.mechanism.sampling_probability == 64 / 12000


def test_weights_follow_the_declared_examples_or_are_equal() -> None:
    clients = [a_client("a", data={"numExamples": 1999}), a_client("b")]
    assert [p.weight for p in a_plan(a_round(), clients).cohort] == [1999.0, 1000.0]
    uniform = a_round(aggregation={"weighting": "Uniform"})
    assert [p.weight for p in a_plan(uniform, clients).cohort] == [1.0, 1.0]


def test_a_plan_is_the_same_bytes_each_time() -> None:
    once, again = (a_plan(a_round(), [a_client("a"), a_client("b")]) for _ in range(2))
    assert once.canonical_json() == again.canonical_json()


def in_namespace(name: str, uri: str, *, age: int, data_name: str | None = None):  # type: ignore[no-untyped-def]
    client = a_client("a", age=age, data={"uri": uri, "name": data_name or name})
    return client.model_copy(update={"metadata": client.metadata.model_copy(update={"name": name})})


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("s3://bucket/notes/", "s3://bucket/notes/", True),
        ("s3://bucket/notes/", "s3://bucket/notes/2026/", True),
        ("s3://bucket/notes", "s3://bucket/notes/", True),
        ("s3://bucket/notes/", "s3://bucket/notes-b/", False),
        ("s3://bucket/notes/", "s3://other/notes/", False),
        ("pvc://claim/a/", "pvc://claim/a/b/", True),
    ],
)
def test_the_younger_of_two_overlapping_clients_is_refused(one: str, other: str, overlap: bool) -> None:
    old, young = in_namespace("old", one, age=0), in_namespace("young", other, age=9)
    found = overlapping([young, old])
    assert found == ({name_of(young): name_of(old)} if overlap else {})


def test_overlap_is_a_matter_of_one_namespace() -> None:
    same = {"uri": "s3://bucket/notes/"}
    assert overlapping([a_client("a", data=same), a_client("b", data=same)]) == {}
    assert overlapping([in_namespace("x", "s3://b-1/", age=0, data_name="d"),
                        in_namespace("y", "s3://b-2/", age=1, data_name="d")])  # fmt: skip


GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize(
    ("config", "lora", "weights"),
    [
        (GPT2, {"rank": 4}, 2 * 4 * (24 + 8 + 32 + 8)),
        (GPT2, {"rank": 4, "freezeA": False}, 2 * 4 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))),
        (GPT2, {"rank": 1, "targetModules": ["c_attn"]}, 2 * 24),
        (LLAMA, {"rank": 2, "targetModules": ["q_proj", "k_proj"]}, 3 * 2 * (8 + 4)),
        ({"model_type": "unheard-of"}, {"rank": 2}, None),
    ],
)
def test_trained_weights(config: dict[str, object], lora: dict[str, object], weights: int | None) -> None:
    assert lora_weights(config, Method.model_validate({"lora": lora})) == weights
