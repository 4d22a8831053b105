"""What a round's status says about privacy before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from round_worlds import a_client, a_plan, a_round, decided, nn

from tributary_accounting import accountant
from tributary_operator import conditions
from tributary_operator.rounds.models import lora_weights
from tributary_operator.rounds.observed import ObservedRound
from tributary_operator.rounds.status import NOISE_ACCEPTABLE

CLIENTS = [a_client("a"), a_client("b")]
PLANNED = ObservedRound(
    plan=a_plan(a_round(), CLIENTS), clients=dict(zip(map(nn, "ab"), CLIENTS, strict=True))
)
"""Nothing is reserved or announced yet."""
DEMO = Path(__file__).parents[2] / "examples" / "docstrings"
DEMO_MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
}
"""The shape of docstrings_demo.pretrain."""
DEMO_SIGMA = 0.9028


def noise_of(seen: ObservedRound, fedround: Any = None) -> Any:
    status = decided(fedround or a_round(), seen).status
    return status.privacy, conditions.find(status.conditions, NOISE_ACCEPTABLE)


def test_what_privacy_will_cost_is_shown_before_anything_is_reserved() -> None:
    seen = replace(PLANNED, trained_weights=4096, affordable_rounds=3)
    decision = decided(a_round(), seen)
    assert decision.record == ()
    shown = decision.status.privacy
    assert (shown.noise_multiplier, shown.expected_batch_size, shown.affordable_rounds) == ("0.8", 64, 3)
    assert shown.noise_to_signal == f"{0.8 * 64 / 64:g}"
    # What was shown stays, though nobody asks the ledgers again.
    later = a_round(status=decision.status.to_json_object())
    assert decided(later, replace(PLANNED, trained_weights=4096)).status.privacy == shown


def test_a_plan_that_cannot_help_is_a_warning_once() -> None:
    hopeless = replace(PLANNED, trained_weights=64_000_000)
    shown, condition = noise_of(hopeless)
    assert float(shown.noise_to_signal) == 100.0
    assert (condition.status, condition.reason) == ("False", "NoiseAboveSignal")
    assert "raise privacy.epsilon or training.expectedBatchSize" in condition.message
    first = decided(a_round(), hopeless)
    assert [e.type for e in first.events if e.reason == "NoiseAboveSignal"] == ["Warning"]
    again = decided(a_round(status=first.status.to_json_object()), hopeless)
    assert not [e for e in again.events if e.reason == "NoiseAboveSignal"]


def test_an_unknown_architecture_is_no_warning() -> None:
    shown, condition = noise_of(PLANNED)
    assert (shown.noise_to_signal, condition) == ("", None)


@pytest.mark.parametrize("name", ["round-1", "round-2"])
def test_the_demos_rounds_are_not_warned_about(name: str) -> None:
    """With the noise that their epsilon asks for, which the accountant confirms here."""
    spec = yaml.safe_load((DEMO / "manifests" / f"{name}.yaml").read_text())["spec"]
    owner = yaml.safe_load((DEMO / "manifests" / "client-algebra.yaml").read_text())["client"]["spec"]
    training, privacy = spec["training"], spec["privacy"]
    fedround = a_round(training=training, privacy=privacy, method=spec["method"])
    client = a_client("a", data={"numExamples": owner["data"]["numExamples"]})
    plan = a_plan(fedround, [client], sigma=DEMO_SIGMA)
    cost = accountant.epsilon([plan.cohort[0].grant.mechanism], float(privacy["delta"]))
    assert cost == pytest.approx(float(privacy["epsilon"]), rel=1e-3)
    weights = lora_weights(DEMO_MODEL, fedround.spec.method)
    shown, condition = noise_of(ObservedRound(plan=plan, trained_weights=weights), fedround)
    assert float(shown.noise_to_signal) == pytest.approx(2.30, abs=0.01)
    assert condition.status == "True"
