"""The model that a round starts from: its configuration, and where each of its weights lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tributary_api.failures import Reason
from tributary_api.records import BundleManifest, FileDigest
from tributary_api.shared import ModelRef
from tributary_store.bundle import file_uri, read_manifest, weight_files
from tributary_store.bundle_files import CONFIG_FILE
from tributary_store.objects import Objects
from tributary_store.tensors import TensorHeader, TensorInfo, read_header
from tributary_worker.aggregation.numbers import WEIGHT_DTYPES
from tributary_worker.aggregation.reader import CheckedReader
from tributary_worker.failures import StageFailure


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file of the base model."""

    digest: FileDigest
    header: TensorHeader
    header_bytes: bytes
    reader: CheckedReader


@dataclass(frozen=True, slots=True)
class BaseModel:
    ref: ModelRef
    manifest: BundleManifest
    model_type: str
    files: tuple[WeightFile, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name; tied weights are stored once."""
        return {name: info for file in self.files for name, info in file.header.tensors.items()}


def open_base(store: Objects, ref: ModelRef) -> BaseModel:
    """Read the base model's manifest, configuration and headers; none of its weights yet."""
    manifest = read_manifest(store, ref)
    config = next((file for file in manifest.files if file.path == CONFIG_FILE), None)
    if config is None:
        raise StageFailure(Reason.MODEL_UNSUPPORTED, f"{ref.uri} has no {CONFIG_FILE}: push the model again")
    text = bytes(CheckedReader(store, file_uri(ref, CONFIG_FILE), config).read(0, config.size))
    files = tuple(_weight_file(store, ref, digest) for digest in weight_files(manifest))
    return BaseModel(ref, manifest, str(json.loads(text).get("model_type", "")), files)


def _weight_file(store: Objects, ref: ModelRef, digest: FileDigest) -> WeightFile:
    reader = CheckedReader(store, file_uri(ref, digest.path), digest)
    head = reader.chunk(0) if digest.size else b""

    def read(start: int, length: int) -> bytes:
        is_at_hand = start + length <= len(head)
        return head[start : start + length] if is_at_hand else bytes(reader.read(start, length))

    header = read_header(digest.path, digest.size, read)
    end = min((info.start for info in header.tensors.values()), default=digest.size)
    return WeightFile(digest, header, read(0, end), reader)


def check_changeable(info: TensorInfo) -> None:
    """Refuse a weight of a type that no delta can be added to, such as a quantised one."""
    if info.dtype not in WEIGHT_DTYPES:
        raise StageFailure(
            Reason.MODEL_UNSUPPORTED,
            f"{info.name} has elements of type {info.dtype}: use the model before compression",
        )
