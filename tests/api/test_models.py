"""The contract's values: one spelling, lenient reading, and a run key that means the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tributary_api.base import canonical_json, sha256_of
from tributary_api.failures import EXIT_CODES, RETRYABLE, Reason
from tributary_api.round import FederatedRound

SPEC = {
    "baseModel": {"uri": "s3://tributary/models/x", "digest": "sha256:" + "0" * 64},
    "clients": {"minAvailable": 2},
    "method": {"lora": {"rank": 8}},
    "training": {"maxSteps": 10, "expectedBatchSize": 64, "learningRate": "1e-3"},
    "privacy": {"epsilon": "2", "delta": "1e-6"},
}


def a_round(name="r", namespace="hub", **changes):
    return FederatedRound.model_validate(
        {"metadata": {"name": name, "namespace": namespace}, "spec": {**SPEC, **changes}}
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_canonical_json_does_not_depend_on_order(value):
    reordered = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(reordered)
    assert sha256_of(canonical_json(value)) == sha256_of(canonical_json(reordered))


@pytest.mark.parametrize(
    "other",
    [
        a_round(name="s"),
        a_round(namespace="hub2"),
        a_round(run=2),
        a_round(clients={"minAvailable": "50%"}),
        a_round(privacy={"epsilon": "3", "delta": "1e-6"}),
        a_round(training={**SPEC["training"], "maxSteps": 11}),
    ],
)
def test_another_run_has_another_key(other):
    assert other.run_key != a_round().run_key


def test_the_same_run_keeps_its_key_whatever_surrounds_it():
    key = a_round().run_key
    assert a_round(suspend=True, ttlSecondsAfterFinished=1).run_key == key
    assert a_round(task="CausalLM", clientBackoffLimit=1).run_key == key, "defaults are filled in"
    assert a_round(aggregation={"deltaEncoding": "Float32", "parallelism": 1}).run_key == key
    assert a_round(fieldOfALaterVersion={"x": 1}).run_key == key, "a downgrade must find the same run"
    assert len(key) == 40
    assert int(key, 16)


@pytest.mark.parametrize("text", ["-1", "1e", "nan", "inf", ".5", "1.2.3", "1" * 25])
def test_a_decimal_is_a_plain_number(text):
    with pytest.raises(ValidationError):
        a_round(privacy={"epsilon": text, "delta": "1e-6"})


def test_exit_codes_are_distinct_and_leave_the_shells_alone():
    assert len(set(EXIT_CODES.values())) == len(Reason)
    assert all(10 <= code <= 125 for code in EXIT_CODES.values())
    assert set(Reason) >= RETRYABLE
