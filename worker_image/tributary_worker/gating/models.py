"""The models of a gate: each pulled once, one in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tributary_api.shared import ModelRef, TaskKind
from tributary_store import bundle
from tributary_store.objects import Objects
from tributary_worker.compression.loading import LoadedModel, load_model


@dataclass(slots=True)
class Models:
    """Models of one task, kept as files in `workspace`. StoreErrors and StageFailures go through."""

    store: Objects
    task: TaskKind
    workspace: Path
    _digest: str = ""
    _loaded: list[LoadedModel] = field(default_factory=list[LoadedModel])
    """The one in memory, or none."""

    def load(self, ref: ModelRef) -> LoadedModel:
        if self._digest != ref.digest:
            self._loaded.clear()  # before the next one takes its memory
            self._digest = ""
            self._loaded.append(load_model(self._directory(ref), self.task))
            self._digest = ref.digest
        return self._loaded[0]

    def weight_bytes(self, ref: ModelRef) -> int:
        return bundle.weight_bytes(bundle.read_manifest(self.store, ref))

    def _directory(self, ref: ModelRef) -> Path:
        directory = self.workspace / ref.digest.removeprefix("sha256:")
        if not directory.exists():
            bundle.pull(self.store, ref, directory)
        return directory
