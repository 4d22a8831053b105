"""What a run of the proofs measured, and the report of it: out/privacy.json and the list of seeded bugs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass
class Audit:
    epsilon_claimed: float
    epsilon_lower_bound: float


@dataclass(frozen=True)
class SeededBug:
    name: str
    caught_by: str


@dataclass
class Figures:
    """Absent until a test of this very run has measured it."""

    seeded_bugs: list[SeededBug] = field(default_factory=list)
    oracle_max_rel_err: float | None = None
    sensitivity_max_ratio: float | None = None
    noise_std_rel_err: float | None = None
    audit: Audit | None = None

    @property
    def missing(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) in (None, [])]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def lines(self) -> list[str]:
        """The seeded bugs, and beside each the test that caught it."""
        width = max((len(bug.name) for bug in self.seeded_bugs), default=0)
        return [f"{bug.name:<{width}}  caught by {bug.caught_by}" for bug in self.seeded_bugs]
