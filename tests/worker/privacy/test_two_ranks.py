"""4.3 and 4.4 on two ranks, and the defects that show only there."""

from __future__ import annotations

import pytest
from privacy_proofs import ranks
from privacy_proofs.figures import SeededBug


@pytest.fixture(scope="module")
def found():
    return ranks.found_on_ranks()


@pytest.mark.parametrize("name", ranks.HONEST)
def test_two_ranks(found, name):
    assert [said[name] for said in found] == [""] * ranks.RANKS


@pytest.mark.parametrize("name", ranks.DEFECTIVE)
def test_a_defect_of_several_ranks_is_caught(found, figures, name):
    assert all(said[name].startswith(("AssertionError", "PrivacyError")) for said in found)
    figures.seeded_bugs.append(SeededBug(name, test_two_ranks.__name__))
