"""The project's own images: built when their inputs changed, loaded into a cluster by digest.

An admission policy pins digests, so an image is always addressed as `localhost/tributary-<name>@sha256:…`.
containerd resolves such a reference without a registry when its store has an image of exactly this name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tributary_dev import places
from tributary_dev.configs import PAUSE_IMAGE
from tributary_dev.containers import BASE_PACKAGES, DEBIAN_SUITE, Buildah
from tributary_dev.imagestore import ImageStore
from tributary_dev.locks import file_lock
from tributary_dev.oci import Layout, add_program_image
from tributary_dev.places import ClusterPlaces
from tributary_dev.progress import step

LOADED_FILE = "images.json"
PREFIX = "localhost/tributary-"
BASE = "localhost/python-base"
# The newest builds of each image that are kept, so that going back to another branch is quick.
KEPT_BUILDS = 2
KEPT_IN_CLUSTER = 4


class ImageError(RuntimeError):
    """An image cannot be built or found."""


@dataclass(frozen=True)
class Recipe:
    """What an image is made from; paths are relative to the checkout."""

    name: str
    containerfile: str
    lock: str
    sources: tuple[str, ...]
    stages: tuple[str, ...] = ()
    """Stages beside the last one that are expensive: they get a name, and so stay in the cache."""


SHARED_SOURCES = ("crds/tributary_api", "lib")
RECIPES = (
    Recipe(
        "operator",
        "operator/Containerfile",
        "requirements/operator.txt",
        (*SHARED_SOURCES, "operator/tributary_operator"),
    ),
    Recipe(
        "worker",
        "worker_image/Containerfile",
        "requirements/worker.txt",
        (*SHARED_SOURCES, "worker_image/tributary_worker"),
        stages=("operations",),
    ),
)
IMAGE_NAMES = tuple(recipe.name for recipe in RECIPES)


def image_references(names: Iterable[str] = IMAGE_NAMES) -> dict[str, str]:
    """Reference by digest of each named image, built from the checkout as it is now if it changed."""
    recipes = {recipe.name: recipe for recipe in RECIPES}
    if unknown := set(names) - set(recipes):
        raise ImageError(
            f"no image is called {', '.join(sorted(unknown))}: choose from {', '.join(IMAGE_NAMES)}"
        )
    return {name: f"{PREFIX}{name}@{_built(recipes[name])}" for name in names}


def load(place: ClusterPlaces, binaries: Path, names: Iterable[str]) -> dict[str, str]:
    """Build the named images if needed and load them into a cluster; the reference of each by digest."""
    references = image_references(names)
    store = _store(place, binaries)
    for name, reference in references.items():
        if reference not in store.names():
            with step(f"loading the {name} image into the cluster"):
                store.load(_layout(), reference.partition("@")[2], [reference])
    loaded = {**loaded_references(place), **references}
    (place.root / LOADED_FILE).write_text(json.dumps(loaded))
    return references


def loaded_references(place: ClusterPlaces) -> dict[str, str]:
    """What `load` last put into this cluster, by name."""
    path = place.root / LOADED_FILE
    loaded: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def load_pause(place: ClusterPlaces, binaries: Path) -> None:
    """Load the image that holds the namespaces of each pod; without it no pod starts."""
    store = _store(place, binaries)
    store.wait()
    if PAUSE_IMAGE in store.names():
        return
    with tempfile.TemporaryDirectory(prefix="tributary-pause-") as directory:
        layout = Layout(Path(directory))
        digest = add_program_image(layout, binaries / "pause", platform.machine())
        store.load(layout, digest, [PAUSE_IMAGE])


def content_key(checkout: Path, recipe: Recipe) -> str:
    """What the image depends on: its Containerfile, its lock file, its sources and the base."""
    digest = hashlib.sha256(_base_key().encode())
    for path in sorted(_inputs(checkout, recipe)):
        digest.update(f"{path.relative_to(checkout)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _inputs(checkout: Path, recipe: Recipe) -> Iterator[Path]:
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


def _layout() -> Layout:
    return Layout(_root() / "layout")


def _store(place: ClusterPlaces, binaries: Path) -> ImageStore:
    return ImageStore(binaries / "ctr", place.containerd_socket)


def _built(recipe: Recipe) -> str:
    """Manifest digest of the image; builds it when its inputs changed."""
    tag = f"{recipe.name}-{content_key(places.checkout(), recipe)}"
    record = _root() / "built" / tag
    if not record.exists():
        with file_lock(_root() / "lock"):
            if not record.exists():
                _build(recipe, tag)
                record.parent.mkdir(exist_ok=True)
                record.write_text(_layout().tags()[tag])
    return record.read_text()


def _build(recipe: Recipe, tag: str) -> None:
    checkout, buildah = places.checkout(), Buildah(_root() / "buildah")
    containerfile, base = checkout / recipe.containerfile, f"{BASE}:{_base_key()}"
    if base not in buildah.names():
        with step("making the base image with debootstrap"):
            buildah.make_base(base)
    with step(f"building the {recipe.name} image"):
        for stage in recipe.stages:
            buildah.build(f"{PREFIX}{recipe.name}-{stage}:latest", containerfile, checkout, base, stage)
        name = f"{PREFIX}{recipe.name}:latest"
        buildah.build(name, containerfile, checkout, base)
        buildah.push(name, _layout().root, tag)
    _prune(buildah, recipe, base)


def _prune(buildah: Buildah, recipe: Recipe, base: str) -> None:
    """Forget old builds of this image and old bases."""
    old = [tag for tag in _layout().tags() if tag.startswith(f"{recipe.name}-")][:-KEPT_BUILDS]
    for tag in old:
        (_root() / "built" / tag).unlink(missing_ok=True)
    _layout().keep_only(set(_layout().tags()) - set(old))
    bases = [name for name in buildah.names() if name.startswith(f"{BASE}:")]
    buildah.remove([name for name in bases if name != base])
