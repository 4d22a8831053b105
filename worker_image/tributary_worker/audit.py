"""The `audit` stage: an attack on the private engine as it runs here, with canaries instead of data.

It needs no store, no Secret and no data set, so whoever has the image can run it, on the hardware and with
the ZeRO stage that a training would use:

    python -m tributary_worker audit --epsilon 8 --zero-stage 2

It prints a receipt. The stage fails if an adversary learns more than the claimed epsilon allows.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Sequence
from dataclasses import fields

from tributary_api.audits import AuditReceipt
from tributary_api.failures import Reason
from tributary_api.records import MechanismSpec
from tributary_worker import distributed
from tributary_worker.auditing.canaries import CanaryModel
from tributary_worker.auditing.estimators import AuditPlan, MakeEngine, audit_many_runs, audit_one_run
from tributary_worker.failures import StageFailure
from tributary_worker.privacy.engine import EngineSettings, PrivateEngine
from tributary_worker.privacy.keystream import KEY_BYTES
from tributary_worker.train import VERSIONED, installed_version

MICRO_BATCH_SIZE = 50
LEARNING_RATE = 1e-3
"""Of no consequence: gradients are recorded and no weight moves."""
IMAGE_ENV = "TRIBUTARY_IMAGE"
"""The digest of the image that runs, for the receipt; set by whoever writes the Job."""


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    plan = AuditPlan(**{field.name: getattr(options, field.name) for field in fields(AuditPlan)})
    layout = distributed.RankLayout(0, 0, 1, 1, distributed.LOOPBACK, distributed.free_port())
    os.environ.update(layout.environment)
    with distributed.process_group(layout):
        receipt = audit(plan, canary_engines(options.zero_stage), options.zero_stage)
    print(receipt.model_dump_json(by_alias=True), flush=True)
    check(receipt)
    return 0


def audit(plan: AuditPlan, make_engine: MakeEngine, zero_stage: int) -> AuditReceipt:
    """Both adversaries against the engine; the receipt's bound is the larger of theirs."""
    findings = [audit_many_runs(make_engine, plan), audit_one_run(make_engine, plan)]
    return AuditReceipt(
        epsilon_claimed=min(finding.epsilon_claimed for finding in findings),
        epsilon_lower_bound=max(finding.epsilon_lower_bound for finding in findings),
        delta=str(plan.delta),
        # Either bound may fail, so both risks count.
        confidence=round(1.0 - len(findings) * (1.0 - plan.confidence), 6),
        findings=findings,
        zero_stage=zero_stage,
        versions={name: installed_version(name) for name in VERSIONED},
        image=os.environ.get(IMAGE_ENV, ""),
    )


def check(receipt: AuditReceipt) -> None:
    """Raises StageFailure (SelfTestFailed) if an adversary got beyond the claim."""
    if receipt.epsilon_lower_bound > receipt.epsilon_claimed:
        raise StageFailure(
            Reason.SELF_TEST_FAILED,
            f"an adversary shows epsilon {receipt.epsilon_lower_bound} where {receipt.epsilon_claimed} is "
            "claimed: do not train with this image",
        )


def canary_engines(zero_stage: int, keys: tuple[bytes, bytes] | None = None) -> MakeEngine:
    """The engine that trains. `keys` are those of sampling and noise; fresh ones unless they are given, so
    that an audit repeats nothing of any training."""
    sampling_key, noise_key = keys or (secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES))

    def make(model: CanaryModel, mechanism: MechanismSpec) -> PrivateEngine:
        micro_batch_size = min(MICRO_BATCH_SIZE, mechanism.batch_cap)
        return PrivateEngine(
            model,
            model.losses,
            mechanism=mechanism,
            sampling_key=sampling_key,
            noise_key=noise_key,
            settings=EngineSettings(zero_stage, micro_batch_size, learning_rate=LEARNING_RATE),
        )

    return make


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tributary_worker audit")
    for field in fields(AuditPlan):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    parser.add_argument("--zero-stage", type=int, default=2, help="of DeepSpeed, as in the training")
    return parser.parse_args(argv)
