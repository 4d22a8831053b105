"""The project's own images: built when their inputs changed, loaded into a cluster by digest.

An admission policy pins digests, so an image is always addressed as `localhost/tributary-<name>@sha256:…`.
containerd resolves such a reference without a registry when its store has an image of exactly this name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tributary_dev import places
from tributary_dev.build import PAUSE
from tributary_dev.configs import PAUSE_IMAGE
from tributary_dev.containers import BASE_PACKAGES, DEBIAN_SUITE, Buildah
from tributary_dev.imagestore import ImageStore
from tributary_dev.layers import Layer, measure
from tributary_dev.locks import file_lock, is_held
from tributary_dev.oci import Image, program_image
from tributary_dev.places import ClusterPlaces
from tributary_dev.progress import note, step

LOADED_FILE = "images.json"
PREFIX = "localhost/tributary-"
BASE = "localhost/python-base"
# The newest builds of each image that are kept, so that going back to another branch is quick.
KEPT_BUILDS = 3
# A release may still run an older build, and its pods must be able to start again.
KEPT_IN_CLUSTER = 6


class ImageError(RuntimeError):
    """An image cannot be built or found."""


@dataclass(frozen=True)
class Recipe:
    """What an image is made from; paths are relative to the checkout."""

    name: str
    containerfile: str
    lock: str
    sources: tuple[str, ...]
    disk_bytes: int
    """What the first build takes: the copies of buildah and of the cluster, and what is in flight between."""
    stages: tuple[str, ...] = ()
    """Stages beside the last one that are expensive: they get a name, and so stay in the cache."""


SHARED_SOURCES = ("crds/tributary_api", "lib")
RECIPES = (
    Recipe(
        "operator",
        "operator/Containerfile",
        "requirements/operator.txt",
        (*SHARED_SOURCES, "operator/tributary_operator"),
        disk_bytes=2 * 10**9,
    ),
    Recipe(
        "worker",
        "worker_image/Containerfile",
        "requirements/worker.txt",
        (*SHARED_SOURCES, "worker_image/tributary_worker"),
        disk_bytes=20 * 10**9,
        stages=("operations",),
    ),
)
IMAGE_NAMES = tuple(recipe.name for recipe in RECIPES)


def image_references(names: Iterable[str] = IMAGE_NAMES) -> dict[str, str]:
    """Reference by digest of each named image, built from the checkout as it is now if it changed."""
    return {name: _reference(name, image) for name, image in _images(names).items()}


def disk_bytes_to_build(names: Iterable[str] = IMAGE_NAMES) -> int:
    """What the first build of the named images takes; an image that was ever built counts 0."""
    built = {recipe.name for recipe in RECIPES if _records(recipe).is_dir()}
    return sum(recipe.disk_bytes for recipe in RECIPES if recipe.name in set(names) - built)


def _images(names: Iterable[str]) -> dict[str, Image]:
    recipes, wanted = {recipe.name: recipe for recipe in RECIPES}, list(names)
    if unknown := sorted(set(wanted) - set(recipes)):
        raise ImageError(f"no image is called {', '.join(unknown)}: choose from {', '.join(IMAGE_NAMES)}")
    return {name: _built(recipes[name]) for name in wanted}


def _reference(name: str, image: Image) -> str:
    return f"{PREFIX}{name}@{image.digest}"


def load(place: ClusterPlaces, binaries: Path, names: Sequence[str]) -> dict[str, str]:
    """Build the named images if needed and load them into a cluster; the reference of each by digest."""
    store, loaded = _store(place, binaries), _loaded(place)
    for name, image in _images(names).items():
        reference = _reference(name, image)
        if reference not in store.names():
            with step(f"loading the {name} image into the cluster"):
                store.load(image, [reference])
        newest_first = [reference, *(other for other in loaded.get(name, []) if other != reference)]
        for old in newest_first[KEPT_IN_CLUSTER:]:
            store.remove(old)
        loaded[name] = newest_first[:KEPT_IN_CLUSTER]
    (place.root / LOADED_FILE).write_text(json.dumps(loaded))
    return {name: loaded[name][0] for name in names}


def loaded_references(place: ClusterPlaces) -> dict[str, str]:
    """What `load` last put into this cluster, by name."""
    return {name: references[0] for name, references in _loaded(place).items()}


def _loaded(place: ClusterPlaces) -> dict[str, list[str]]:
    """Every build of each image that this cluster holds, the newest first."""
    path = place.root / LOADED_FILE
    loaded: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def load_pause(place: ClusterPlaces, binaries: Path) -> None:
    """Load the image that holds the namespaces of each pod; without it no pod starts."""
    store = _store(place, binaries)
    store.wait()
    if PAUSE_IMAGE in store.names():
        return
    with tempfile.TemporaryDirectory(prefix="tributary-pause-") as directory:
        shutil.copy(binaries / PAUSE, directory)
        store.load(program_image(Path(directory), PAUSE, platform.machine()), [PAUSE_IMAGE])


def content_key(checkout: Path, recipe: Recipe) -> str:
    """What the image depends on: its Containerfile, its lock file, its sources and the base."""
    digest = hashlib.sha256(_base_key().encode())
    for path in sorted(inputs(checkout, recipe)):
        digest.update(f"{path.relative_to(checkout)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def inputs(checkout: Path, recipe: Recipe) -> Iterator[Path]:
    """Every file that the image is made from. Raises ImageError when one that must exist does not."""
    for name in (recipe.containerfile, recipe.lock):
        if not (checkout / name).is_file():
            raise ImageError(f"the {recipe.name} image needs {name}, which this checkout lacks")
        yield checkout / name
    for name in recipe.sources:
        for path in (checkout / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _base_key() -> str:
    facts = " ".join([DEBIAN_SUITE, platform.machine(), *BASE_PACKAGES])
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _root() -> Path:
    return places.cache_root() / "images"


def _buildah() -> Buildah:
    return Buildah(_root() / "buildah")


def _records(recipe: Recipe) -> Path:
    return _root() / "built" / recipe.name


def _record(recipe: Recipe, key: str) -> Path:
    return _records(recipe) / f"{key}.json"


def _lock() -> Path:
    return _root() / "lock"


def _store(place: ClusterPlaces, binaries: Path) -> ImageStore:
    return ImageStore(binaries / "ctr", place.containerd_socket)


def _built(recipe: Recipe) -> Image:
    """The image; builds it when its inputs changed."""
    record = _record(recipe, content_key(places.checkout(), recipe))
    if not record.exists():
        if is_held(_lock()):
            note(f"Another build of images is going on; the {recipe.name} image is next")
        with file_lock(_lock()), tempfile.TemporaryDirectory(prefix="tributary-context-") as name:
            record = _build_from_copy(recipe, Path(name))
            _prune(recipe)
    record.touch()
    return read_record(record)


def _build_from_copy(recipe: Recipe, context: Path) -> Path:
    """Build from a copy, so that the image has what its key says even when somebody edits the checkout."""
    copy_inputs(places.checkout(), recipe, context)
    key = content_key(context, recipe)
    record = _record(recipe, key)
    if not record.exists():
        with step(f"building the {recipe.name} image"):
            write_record(record, _build(recipe, context, key))
    return record


def copy_inputs(checkout: Path, recipe: Recipe, target: Path) -> None:
    for path in inputs(checkout, recipe):
        copy = target / path.relative_to(checkout)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


def _build(recipe: Recipe, context: Path, key: str) -> Image:
    buildah = _buildah()
    buildah.clear()
    containerfile, base = context / recipe.containerfile, f"{BASE}:{_base_key()}"
    if base not in buildah.names():
        with step("making the base image with debootstrap"):
            buildah.make_base(base)
    for stage in recipe.stages:
        buildah.build(f"{PREFIX}{recipe.name}-{stage}:latest", containerfile, context, base, stage)
    name = f"{PREFIX}{recipe.name}:{key}"
    buildah.build(name, containerfile, context, base)
    return Image.of(buildah.settings(name), [_measured(path) for path in buildah.layer_directories(name)])


def _measured(directory: Path) -> Layer:
    """A layer with its digest, which is worked out once: directories of buildah's storage never change."""
    known = directory.with_name("tributary-layer.json")
    if not known.exists():
        layer = measure(directory)
        known.write_text(json.dumps([layer.digest, layer.size_bytes]))
    digest, size_bytes = json.loads(known.read_text())
    return Layer(digest, size_bytes, directory)


def write_record(path: Path, image: Image) -> None:
    """Keep an image: everything but the layers themselves, which stay in buildah's storage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [[layer.digest, layer.size_bytes, str(layer.directory)] for layer in image.layers]
    staging = path.with_suffix(".new")
    staging.write_text(json.dumps({"config": image.config, "layers": layers}))
    staging.rename(path)


def read_record(path: Path) -> Image:
    record = json.loads(path.read_text())
    layers = [Layer(digest, size_bytes, Path(name)) for digest, size_bytes, name in record["layers"]]
    return Image(record["config"], tuple(layers))


def _prune(recipe: Recipe) -> None:
    """Forget the builds of this image that were not used for longest, and old bases."""
    records = sorted(_records(recipe).glob("*.json"), key=lambda path: path.stat().st_mtime)
    old, base = records[:-KEPT_BUILDS], f"{BASE}:{_base_key()}"
    buildah = _buildah()
    names = {f"{PREFIX}{recipe.name}:{record.stem}" for record in old}
    for record in old:
        record.unlink()
    unwanted = [
        name for name in buildah.names() if name in names or (name.startswith(f"{BASE}:") and name != base)
    ]
    if unwanted:
        buildah.remove(unwanted)
