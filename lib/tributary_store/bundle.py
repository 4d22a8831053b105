"""A model as a bundle of files in the object store.

A folder holds the files and, written last, bundle.json: a bundle without it does not exist. What is pushed
from a directory lies in <models>/<sha256>/, named by the digest of its bytes; what is written while it is
computed has the name of what it is computed from (`keys.aggregated_model`). In both cases the digest says
what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from pydantic import ValidationError

from tributary_api.base import canonical_json, sha256_of
from tributary_api.records import BundleManifest, FileDigest
from tributary_api.shared import ModelRef
from tributary_store.bundle_files import BUNDLE_FILE, WEIGHTS, bundle_files, check_names
from tributary_store.digests import digest_of_file
from tributary_store.errors import ObjectDamaged, ObjectExists, ObjectMissing
from tributary_store.objects import Objects


def push(
    store: Objects,
    directory: Path,
    models_uri: str,
    *,
    parents: Sequence[ModelRef] = (),
    run_key: str | None = None,
    description: str = "",
) -> ModelRef:
    """Publish a Hugging Face directory under `models_uri`; pushing the same files again changes nothing.

    BundleRefused if the directory is no model, or not a safe one.
    """
    paths = bundle_files(directory)
    files = [digest_of_file(path) for path in paths]
    digest = bundle_digest(files)
    ref = ModelRef(uri=models_uri.rstrip("/") + "/" + digest.removeprefix("sha256:"), digest=digest)
    for path, file in zip(paths, files, strict=True):
        _upload(store, ref, path, file)
    return publish(store, ref.uri, files, parents=parents, run_key=run_key, description=description)


def publish(
    store: Objects,
    uri: str,
    files: Sequence[FileDigest],
    *,
    parents: Sequence[ModelRef] = (),
    run_key: str | None = None,
    description: str = "",
) -> ModelRef:
    """Write the manifest that makes the bundle at `uri` exist, once its files are there."""
    ordered = sorted(files, key=lambda file: file.path)
    ref = ModelRef(uri=uri, digest=bundle_digest(ordered))
    manifest = BundleManifest(
        digest=ref.digest, files=ordered, parents=list(parents), run_key=run_key, description=description
    )
    _publish(store, ref, manifest)
    return ref


def pull(store: Objects, ref: ModelRef, directory: Path) -> BundleManifest:
    """Write the bundle's files into `directory`; files that are there with the right bytes are kept.

    ObjectDamaged if any byte differs from what `ref.digest` stands for.
    """
    manifest = read_manifest(store, ref)
    check_names(file.path for file in manifest.files)
    directory.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        path = directory / file.path
        if not path.is_file() or digest_of_file(path) != file:
            store.download(file_uri(ref, file.path), path, file)
    return manifest


def read_manifest(store: Objects, ref: ModelRef) -> BundleManifest:
    """The bundle's manifest, whose file digests are the ones that `ref.digest` stands for."""
    uri = file_uri(ref, BUNDLE_FILE)
    try:
        manifest = BundleManifest.model_validate_json(store.get(uri))
    except ObjectMissing as error:
        raise ObjectMissing(f"{error}; push the model with `tributary model push`") from error
    except ValidationError as error:
        raise ObjectDamaged(f"{uri} is not a bundle's manifest: push the model again") from error
    found = bundle_digest(manifest.files)
    if found != ref.digest:
        raise ObjectDamaged(
            f"the model at {ref.uri} has digest {found}, not {ref.digest}: correct the URI or the digest"
        )
    return manifest


def bundle_digest(files: Iterable[FileDigest]) -> str:
    """Digest over the files alone: equal weights have equal digests, whatever their history."""
    ordered = sorted(files, key=lambda file: file.path)
    return sha256_of(canonical_json([file.to_json_object() for file in ordered]))


def file_uri(ref: ModelRef, path: str) -> str:
    return f"{ref.uri.rstrip('/')}/{path}"


def weight_files(manifest: BundleManifest) -> list[FileDigest]:
    return [file for file in manifest.files if fnmatch(file.path, WEIGHTS)]


def weight_bytes(manifest: BundleManifest) -> int:
    """Size of the bundle's weights, in bytes."""
    return sum(file.size for file in weight_files(manifest))


def _upload(store: Objects, ref: ModelRef, path: Path, file: FileDigest) -> None:
    sent = store.upload_new(file_uri(ref, file.path), path)
    if sent != file:
        raise ObjectDamaged(f"{path} changed while it was read: push it again when nobody writes to it")


def _publish(store: Objects, ref: ModelRef, manifest: BundleManifest) -> None:
    try:
        store.put_new(file_uri(ref, BUNDLE_FILE), manifest.canonical_json(), retain=True)
    except ObjectExists:
        # The same weights with another history: the first history stays.
        read_manifest(store, ref)
