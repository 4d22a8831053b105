"""What a release's revisions and records are named by: hashes of everything that they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tributary_api.base import canonical_json, sha256_of
from tributary_api.release import ModelRelease
from tributary_api.shared import ModelRef
from tributary_operator.settings import Settings


@dataclass(frozen=True, slots=True)
class Rivals:
    """What a candidate is compared with besides its parent; absent where it is the same model."""

    stable: ModelRef | None = None
    stable_parent: ModelRef | None = None
    best: ModelRef | None = None


REVISION_LENGTH = 10
"""Hex digits: people read and type it; the revisions of one release are few."""
KEY_LENGTH = 40

NOT_IN_POD = {"replicas", "service_name", "port"}
"""Fields of spec.serving that change no pod: scaling or renaming must not start a new revision."""


def revision(release: ModelRelease, parent: ModelRef, settings: Settings) -> str:
    """Short name of what the spec asks to serve: a model, its compression, and the pods that serve it."""
    spec = release.spec
    return _hash(
        REVISION_LENGTH,
        model=parent.digest,
        compression=[step.to_json_object() for step in spec.compression],
        task=spec.task,
        serving=spec.serving.model_dump(mode="json", by_alias=True, exclude=NOT_IN_POD),
        image=settings.worker_image,
        store=settings.store_for_pods.to_json_object(),
        secret=settings.serving_secret,
        account=settings.hub_service_account,
    )


def spec_hash(release: ModelRelease) -> str:
    """Of all that a verdict may depend on: scaling or renaming does not change it.

    Fields left at their default do not count, so that a later version may add fields.
    """
    spec = release.spec.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude_defaults=True, exclude={"serving": NOT_IN_POD}
    )
    return _hash(KEY_LENGTH, spec=spec)


def compression_key(release: ModelRelease, parent: ModelRef, settings: Settings) -> str:
    """Of the CompressionManifest: equal inputs are compressed once, whichever release asks."""
    spec = release.spec
    steps = [step.to_json_object() for step in spec.compression]
    return _hash(KEY_LENGTH, model=parent.digest, steps=steps, task=spec.task, image=settings.worker_image)


def gate_key(
    release: ModelRelease, candidate: ModelRef, parent: ModelRef, rivals: Rivals, settings: Settings
) -> str:
    """Of the GateVerdict: it holds for this candidate against these models, on this data and these terms."""
    return _hash(
        KEY_LENGTH,
        candidate=candidate.digest,
        parent=parent.digest,
        rivals=[ref.digest if ref else "" for ref in (rivals.stable, rivals.stable_parent, rivals.best)],
        gate=release.spec.gate.to_json_object(),
        task=release.spec.task,
        sequence=release.spec.serving.max_sequence_length,
        image=settings.worker_image,
    )


def _hash(length: int, **parts: Any) -> str:
    return sha256_of(canonical_json(parts)).removeprefix("sha256:")[:length]
