"""A cluster of the user's own: what is missing is said before anything is made."""

from __future__ import annotations

import pytest
from docstrings_demo import stage
from docstrings_demo.problems import DemoError

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def variables(monkeypatch):
    for name in (*stage.S3_VARIABLES, *stage.IMAGE_VARIABLES.values()):
        monkeypatch.setenv(name, NOBODY)
    return monkeypatch


@pytest.mark.parametrize("name", [*stage.S3_VARIABLES, *stage.IMAGE_VARIABLES.values()])
def test_a_missing_variable_is_named(variables, name):
    variables.delenv(name)
    with pytest.raises(DemoError, match=name):
        stage.existing("kind-dev")


@pytest.mark.timeout(60)
def test_an_s3_server_that_does_not_answer_is_named(variables):
    with pytest.raises(DemoError, match=NOBODY):
        stage.existing("kind-dev")
