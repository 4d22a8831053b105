"""The daemon of a ModelRelease: observe, decide, carry out."""

from __future__ import annotations

from collections import defaultdict

from tributary_api.release import ModelRelease
from tributary_operator.api import JsonObject
from tributary_operator.kinds import RELEASE
from tributary_operator.reconciler import Pass, World, carry_out
from tributary_operator.releases.decide import decide
from tributary_operator.releases.observe import Memory, observe


class ReleaseReconciler:
    kind = RELEASE
    has_finalizer = False
    """All children lie in the release's namespace and are owned by it: Kubernetes removes them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._memory: dict[str, Memory] = defaultdict(Memory)

    async def run_pass(self, raw: JsonObject) -> Pass:
        release = ModelRelease.model_validate(raw)
        situation = await observe(self._world, release, self._memory[release.metadata.uid])
        return await carry_out(self._world, RELEASE, raw, decide(situation))

    async def clean_up(self, raw: JsonObject) -> list[str]:  # noqa: ARG002 - nothing is left behind
        return []

    def forget(self, raw: JsonObject) -> None:
        self._memory.pop(raw["metadata"]["uid"], None)
