"""What an audit of the privacy engine states: the claim, and how much of it an adversary could show."""

from __future__ import annotations

from typing import Literal

from tributary_api.base import ApiModel, Decimal
from tributary_api.records import MechanismSpec


class AuditFinding(ApiModel):
    """One adversary's result."""

    estimator: Literal["many-runs", "one-run"]
    mechanism: MechanismSpec
    epsilon_claimed: float
    """By the accountant, for this mechanism."""
    epsilon_lower_bound: float


class AuditReceipt(ApiModel):
    """Printed by the `audit` stage. Nothing in it depends on private values."""

    epsilon_claimed: float
    epsilon_lower_bound: float
    """Largest of all findings: an engine that keeps its claim stays below it."""
    delta: Decimal
    confidence: float
    """Of the lower bound, over all findings together."""
    findings: list[AuditFinding]
    zero_stage: int
    versions: dict[str, str] = {}
    image: str = ""
