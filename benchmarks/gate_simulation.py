"""How often does the gate err? Simulated candidates through the gate's own test, beside a plain comparison
of means.

`python benchmarks/gate_simulation.py [--candidates 1000] [--seed 1]` prints one JSON document. Three kinds
of data: losses whose differences are normal, and skewed, with a standard deviation of four margins; and
right or wrong answers that a tenth of the documents flips. A candidate at the margin must not be accepted
(false accept: at most the level of 5 %), and one that is exactly as good must not be rejected (false
reject). The point gate accepts whatever measures less than the margin, as a comparison of two numbers does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tributary_worker.gating.documents import DOCUMENTS_MIN
from tributary_worker.gating.spending import looks
from tributary_worker.noninferiority import Bounds, mean_difference, sequential, share_difference

LEVEL = 0.05
MARGIN = 0.02
"""In nats for losses, as a share of the documents for accuracy."""
SPREAD = 4 * MARGIN

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, float, int], Floats]
"""(randomness, true mean, documents) -> paired differences, more is worse."""


def normal(randomness: np.random.Generator, mean: float, documents: int) -> Floats:
    return randomness.normal(mean, SPREAD, documents)


def skewed(randomness: np.random.Generator, mean: float, documents: int) -> Floats:
    """A gamma distribution of shape 2: a few documents get much worse, most hardly."""
    shape = 2.0
    scale = SPREAD / np.sqrt(shape)
    found: Floats = randomness.gamma(shape, scale, documents) - shape * scale + mean
    return found


def answers(randomness: np.random.Generator, mean: float, documents: int) -> Floats:
    """-1, 0 or 1: on a tenth of the documents the two models disagree."""
    disagree = 0.1
    chances = [(disagree - mean) / 2, 1 - disagree, (disagree + mean) / 2]
    return randomness.choice([-1.0, 0.0, 1.0], size=documents, p=chances)


@dataclass(frozen=True, slots=True)
class Kind:
    draw: Draw
    bounds: Bounds
    documents: int


KINDS = {
    "normal losses": Kind(normal, mean_difference, 240),
    "skewed losses": Kind(skewed, mean_difference, 240),
    "answers": Kind(answers, share_difference, 3000),
}


def simulate(kind: Kind, candidates: int, seed: int) -> dict[str, Any]:
    """Error rates over so many simulated candidates at the margin, and as many at no difference."""
    randomness = np.random.default_rng(seed)
    plan = looks(kind.documents, DOCUMENTS_MIN, LEVEL)
    found: dict[str, list[Any]] = {"at margin": [], "at zero": []}
    point: dict[str, list[bool]] = {"at margin": [], "at zero": []}
    for where, mean in (("at margin", MARGIN), ("at zero", 0.0)):
        for _ in range(candidates):
            differences = [float(value) for value in kind.draw(randomness, mean, kind.documents)]
            found[where].append(sequential(differences, plan, MARGIN, kind.bounds))
            point[where].append(bool(np.mean(differences) < MARGIN))
    passes = {where: [f.finding(MARGIN) == "PASS" for f in items] for where, items in found.items()}
    return {
        "false_accept": float(np.mean(passes["at margin"])),
        "false_reject": 1 - float(np.mean(passes["at zero"])),
        "simulated": candidates,
        "point_ratio_false_accept": float(np.mean(point["at margin"])),
        "point_ratio_false_reject": 1 - float(np.mean(point["at zero"])),
        "documents": kind.documents,
        "documents_seen_at_zero": float(np.mean([f.count for f in found["at zero"]])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    figures = {name: simulate(kind, asked.candidates, asked.seed) for name, kind in KINDS.items()}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
