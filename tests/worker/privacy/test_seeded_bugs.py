"""Deliberate defects: each must make the very check fail that the honest test of the same name passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from privacy_proofs import engine_checks, ledger_checks, randomness_checks
from privacy_proofs import engine_defects as engines
from privacy_proofs import ledger_defects as ledgers
from privacy_proofs import randomness_defects as randomness
from privacy_proofs.figures import SeededBug
from private_engines import adapted_gpt2

from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.noise import GaussianNoise

pytestmark = pytest.mark.usefixtures("alone")

HONEST = Path(__file__).with_name("test_proofs.py")


@dataclass(frozen=True)
class Bug:
    name: str
    part: Any
    check: Callable[[Any], object]

    @property
    def test(self) -> str:
        return f"test_{self.check.__name__.removeprefix('check_')}"


BUGS = [
    Bug("no noise", engines.with_noise(engines.NoNoise), engine_checks.check_noise_at_the_optimizer),
    Bug(
        "noise a hundredth too weak",
        engines.with_noise(GaussianNoise, lambda: 0.99),
        engine_checks.check_noise_at_the_optimizer,
    ),
    Bug(
        "noise repeats in every step",
        engines.with_noise(engines.SameInEveryStep),
        engine_checks.check_noise_at_the_optimizer,
    ),
    Bug(
        "noise repeats in another part of the weights",
        engines.with_noise(engines.SameInBothHalves),
        engine_checks.check_noise_at_the_optimizer,
    ),
    Bug(
        "noise is not Gaussian",
        engines.with_noise(engines.Uniform),
        engine_checks.check_noise_at_the_optimizer,
    ),
    Bug(
        "noise in the parameters' low precision",
        engines.with_noise(engines.InTheParametersPrecision),
        engine_checks.check_noise_at_the_optimizer,
    ),
    Bug(
        "noise added in floating point and not rounded",
        engines.with_noise(engines.OffTheGrid),
        engine_checks.check_noise_lies_on_a_grid,
    ),
    Bug("no clipping", engines.of_kind(engines.Unclipped), engine_checks.check_sensitivity),
    Bug("clip after the mean", engines.of_kind(engines.ClippedAfterTheMean), engine_checks.check_sensitivity),
    Bug("clip layer by layer", engines.of_kind(engines.ClippedLayerByLayer), engine_checks.check_sensitivity),
    Bug("tied weight skipped", engines.of_kind(engines.TiedWeightSkipped), engine_checks.check_sensitivity),
    Bug("tied weight counted once", engines.tied_weight_counted_once, engine_checks.check_norms_per_record),
    Bug("NaN passed through", engines.of_kind(engines.BrokenRecordsPassed), engine_checks.check_sensitivity),
    Bug("records of a batch mixed", engines.of_kind(engines.RecordsMixed), engine_checks.check_sensitivity),
    Bug(
        "divisor |S_t|", engines.of_kind(engines.DividedByWhatWasDrawn), engine_checks.check_step_by_the_book
    ),
    Bug("fp16 skip", engines.of_kind(engines.SkippedOnOverflow), engine_checks.check_same_work),
    Bug(
        "as many micro-batches as were drawn (in the trace)",
        engines.with_only_what_was_drawn,
        engine_checks.check_same_work,
    ),
    Bug("unsupported layer silently frozen", engines.silently_frozen, engine_checks.check_coverage),
    Bug("shuffled loader", randomness.Shuffled, randomness_checks.check_independent_draws),
    Bug("batches of fixed size", randomness.OfFixedSize, randomness_checks.check_inclusion_frequency),
    Bug(
        "the same batch in every step",
        randomness.SameInEveryStep,
        randomness_checks.check_inclusion_frequency,
    ),
    Bug("no cap", randomness.Uncapped, randomness_checks.check_batch_cap),
    Bug("the cap keeps the first records", randomness.FirstOnesKept, randomness_checks.check_batch_cap),
    Bug(
        "as many micro-batches as were drawn",
        randomness.OnlyWhatWasDrawn,
        randomness_checks.check_public_shapes,
    ),
    Bug(
        "seed reused on a retry with other data",
        randomness.key_without_snapshot,
        randomness_checks.check_keys_belong_to_one_computation,
    ),
    Bug(
        "seed reused with other settings",
        randomness.key_without_computation,
        randomness_checks.check_keys_belong_to_one_computation,
    ),
    Bug(
        "fresh seed for a retry",
        randomness.KeyOfTheMoment(),
        randomness_checks.check_keys_belong_to_one_computation,
    ),
    Bug("ledger entry lost", ledgers.entry_lost, ledger_checks.check_killed_at_every_write),
    Bug("ledger entry overwritten", ledgers.entry_overwritten, ledger_checks.check_reservers_in_a_race),
    Bug("epsilons added up", ledgers.added_up, ledger_checks.check_composition),
    Bug("composition forgotten", ledgers.largest, ledger_checks.check_composition),
    Bug("classical formula beyond epsilon 1", ledgers.classical, ledger_checks.check_composition),
    Bug(
        "sigma solved for a single step",
        ledgers.sigma_without_composition,
        ledger_checks.check_reference_sigmas,
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_seeded_bug_is_caught(bug, figures):
    assert f"def {bug.test}(" in HONEST.read_text(), "the check must be one that the shipped code passes"
    with pytest.raises((AssertionError, PrivacyError, UnsupportedError)) as caught:
        bug.check(bug.part)
    print(f"{bug.name}: {caught.value}")
    figures.seeded_bugs.append(SeededBug(bug.name, bug.test))


def test_the_frame_of_the_defects_is_sound():
    """Else a defect would be found for what it was not meant to be."""
    private = engines.of_kind(engines.RecordByRecord)(adapted_gpt2(), zero_stage=0)
    assert engine_checks.largest_movement(private) <= 1 + 1e-6
    engine_checks.check_noise_at_the_optimizer(engines.with_noise(GaussianNoise))
