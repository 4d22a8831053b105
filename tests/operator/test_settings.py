from __future__ import annotations

import pytest
from signers import HUB_ENVIRONMENT, HUB_KEY

from tributary_operator.settings import Settings, SettingsInvalid

MINIMAL = {
    "TRIBUTARY_WORKER_IMAGE": "worker@sha256:" + "0" * 64,
    "TRIBUTARY_BUCKET": "tributary",
    **HUB_ENVIRONMENT,
}


def test_minimal_environment_is_enough() -> None:
    settings = Settings.from_environment({**MINIMAL, "PATH": "/bin"})
    assert settings.store.endpoint is None
    assert settings.hub_job_resources.requests == {}


def test_pods_may_reach_the_store_under_another_name() -> None:
    inside = {"TRIBUTARY_STORE_ENDPOINT": "http://in:9000"}
    outside = {"TRIBUTARY_STORE_ENDPOINT_FOR_PODS": "http://out:9000"}
    assert Settings.from_environment({**MINIMAL, **inside}).store_for_pods.endpoint == "http://in:9000"
    assert (
        Settings.from_environment({**MINIMAL, **inside, **outside}).store_for_pods.endpoint
        == "http://out:9000"
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"TRIBUTARY_WORKER_IMAGE": "worker:latest"}, "TRIBUTARY_WORKER_IMAGE"),
        ({"TRIBUTARY_STORE_THREADS": "none"}, "TRIBUTARY_STORE_THREADS"),
        ({"TRIBUTARY_HUB_JOB_RESOURCES": "{"}, "TRIBUTARY_HUB_JOB_RESOURCES"),
        ({"TRIBUTARY_BUCKET": ""}, "TRIBUTARY_BUCKET"),
        ({"TRIBUTARY_LEASE_RENEW_SECONDS": "12"}, "TRIBUTARY_LEASE_RENEW_SECONDS"),
        ({"TRIBUTARY_SIGNING_KEY": "c2hvcnQ="}, "TRIBUTARY_SIGNING_KEY: .* 32 random bytes"),
        ({"TRIBUTARY_SIGNING_KEY": "no base64"}, "TRIBUTARY_SIGNING_KEY"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsInvalid, match=named):
        Settings.from_environment({**MINIMAL, **wrong})


def test_the_signing_key_is_read_and_never_shown() -> None:
    settings = Settings.from_environment(MINIMAL)
    assert settings.signing_key.public == HUB_KEY.public
    secret = HUB_ENVIRONMENT["TRIBUTARY_SIGNING_KEY"]
    assert secret not in repr(settings)
    with pytest.raises(SettingsInvalid) as error:
        Settings.from_environment({**MINIMAL, "TRIBUTARY_SIGNING_KEY": secret + "!"})
    assert secret not in str(error.value)


def test_every_setting_can_be_set() -> None:
    assert {name.removeprefix("TRIBUTARY_").lower() for name in Settings.environment_names()} == set(
        Settings.model_fields
    )
