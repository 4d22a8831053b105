"""What failed, as people read it in a condition."""

from __future__ import annotations

import pytest

from tributary_api.client import FederatedClient
from tributary_operator.api import error_of
from tributary_operator.troubles import trouble


def test_an_object_that_is_no_valid_client_is_its_owners_to_correct():
    with pytest.raises(ValueError) as caught:
        FederatedClient.model_validate({"metadata": {"name": "c", "namespace": "n"}, "spec": {}})
    found = trouble(caught.value)
    assert (found.reason, found.progress) == ("SpecInvalid", "stalled")
    assert "spec.data" in found.message


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_server_that_cannot_answer_now_is_waited_for(status):
    found = trouble(error_of(status, "later"))
    assert (found.reason, found.progress) == ("ApiServerUnavailable", "progressing")
