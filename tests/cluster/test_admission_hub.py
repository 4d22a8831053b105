"""What a tampered operator could do in the hub: run a stage of the worker image as that stage."""

from __future__ import annotations

import pytest
from forged_jobs import ENTRY_POINT, EXEC, Change, hub_job, in_container, in_pod, volume
from kube import PINNED, Kubectl, Refused

pytestmark = pytest.mark.cluster

STAGE_SECRETS = {
    "aggregate": "tributary-aggregator",
    "evaluate": "tributary-aggregator",
    "compress": "tributary-serving",
    "gate": "tributary-serving",
}


@pytest.mark.parametrize("stage", STAGE_SECRETS)
def test_a_stage_in_the_hub_has_its_own_identity_only(operator: Kubectl, stage: str) -> None:
    """Compression and gate hold no credential with which deltas can be read."""
    own = STAGE_SECRETS[stage]
    operator.create(hub_job(stage, own), "--dry-run=server")
    (other,) = set(STAGE_SECRETS.values()) - {own}
    with pytest.raises(Refused, match="S3 keys of the stage"):
        operator.create(hub_job(stage, other), "--dry-run=server")


HUB_BYPASSES: dict[str, tuple[Change, str]] = {
    "other image": (
        in_container(image=f"localhost/evil{PINNED}"),
        "the image must be the chart's workerImage",
    ),
    "command": (in_container(command=["sh"]), ENTRY_POINT),
    "training": (in_container(args=["train"]), "the arguments must be one stage"),
    "serving in a Job": (in_container(args=["serve"]), "the arguments must be one stage"),
    "account": (in_pod(serviceAccountName="default"), "service account must be tributary-job"),
    "secret volume": (volume({"secret": {"secretName": "tributary-aggregator"}}), "scratch volumes only"),
    "probe": (in_container(livenessProbe=EXEC), "probes and hooks run no commands"),
}


@pytest.mark.parametrize("bypass", HUB_BYPASSES)
def test_a_way_round_in_the_hub_is_refused(operator: Kubectl, bypass: str) -> None:
    change, reason = HUB_BYPASSES[bypass]
    job = hub_job("aggregate", "tributary-aggregator")
    change(job)
    with pytest.raises(Refused) as refused:
        operator.create(job, "--dry-run=server")
    assert reason in str(refused.value)
