"""When an image is built again: whenever something that is in it changed, and only then."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tributary_dev import containers, images, places
from tributary_dev.images import RECIPES, Recipe, content_key
from tributary_dev.layers import Layer
from tributary_dev.oci import Image

RECIPE = Recipe("demo", "demo/Containerfile", "requirements/demo.txt", ("lib", "demo/package"), disk_bytes=1)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("demo/Containerfile", "requirements/demo.txt", "lib/a/b.py", "demo/package/c.py"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "checkout"


@pytest.mark.parametrize(
    "name", ["demo/Containerfile", "requirements/demo.txt", "lib/a/b.py", "demo/package/c.py"]
)
def test_a_changed_input_changes_the_key(checkout: Path, name: str) -> None:
    before = content_key(checkout, RECIPE)
    (checkout / name).write_text("changed")
    assert content_key(checkout, RECIPE) != before


def test_a_moved_file_changes_the_key(checkout: Path) -> None:
    before = content_key(checkout, RECIPE)
    (checkout / "lib/a/b.py").rename(checkout / "lib/a/moved.py")
    assert content_key(checkout, RECIPE) != before


def test_bytecode_and_other_files_do_not_change_the_key(checkout: Path) -> None:
    before = content_key(checkout, RECIPE)
    for name in ("lib/a/__pycache__/b.pyc", "demo/tests/t.py", "README.md"):
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert content_key(checkout, RECIPE) == before


def test_a_copy_has_the_same_key_whatever_happens_to_the_original(checkout: Path, tmp_path: Path) -> None:
    before = content_key(checkout, RECIPE)
    images.copy_inputs(checkout, RECIPE, tmp_path / "copy")
    (checkout / "lib/a/b.py").write_text("edited meanwhile")
    assert content_key(tmp_path / "copy", RECIPE) == before


def test_a_missing_lock_is_named(checkout: Path) -> None:
    (checkout / "requirements/demo.txt").unlink()
    with pytest.raises(images.ImageError, match=r"requirements/demo\.txt"):
        content_key(checkout, RECIPE)


def test_only_images_that_were_never_built_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path))
    needed = {recipe.name: recipe.disk_bytes for recipe in RECIPES}
    assert images.disk_bytes_to_build() == sum(needed.values())
    assert images.disk_bytes_to_build(["operator"]) == needed["operator"]
    images.write_record(tmp_path / "images" / "built" / "worker" / "key.json", Image.of({}, []))
    assert images.disk_bytes_to_build() == needed["operator"]


def test_an_unknown_image_is_refused_with_the_known_names() -> None:
    with pytest.raises(images.ImageError, match="operator, worker"):
        images.image_references(["trainer"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_names_what_its_containerfile_copies(recipe: Recipe) -> None:
    text = (places.checkout() / recipe.containerfile).read_text()
    copied = set(re.findall(r"^COPY (?!--)(\S+) ", text, re.MULTILINE))
    assert copied == {recipe.lock, *recipe.sources}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_container_runs_as_nobody_special(recipe: Recipe) -> None:
    text = (places.checkout() / recipe.containerfile).read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["65532:65532"]


def test_index_settings_are_passed_on_as_they_are() -> None:
    text = containers.shell_settings("https://one/it's", "https://a https://b", has_bundle=True)
    script = text + 'printf "%s|" "$PIP_INDEX_URL" "$UV_DEFAULT_INDEX" "$UV_EXTRA_INDEX_URL" "$PIP_CERT"'
    seen = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={}).stdout
    assert seen == "https://one/it's|https://one/it's|https://a https://b|/run/secrets/ca|"


def test_what_is_not_set_is_left_to_the_tools() -> None:
    assert containers.shell_settings("", "", has_bundle=False) == ""


def test_an_image_reads_back_from_its_record(tmp_path: Path) -> None:
    image = Image.of({"os": "linux"}, [Layer("sha256:a", 7, tmp_path / "diff")])
    images.write_record(tmp_path / "built" / "x.json", image)
    assert images.read_record(tmp_path / "built" / "x.json") == image


def test_the_layers_of_an_image_are_found_in_the_storage(tmp_path: Path) -> None:
    for name, rows in {
        "overlay-images/images.json": [{"names": ["localhost/x:1"], "layer": "top"}, {"layer": "other"}],
        "overlay-layers/layers.json": [{"id": "top", "parent": "base"}, {"id": "base"}, {"id": "other"}],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(rows))
    found = containers.Buildah(tmp_path).layer_directories("localhost/x:1")
    assert found == [tmp_path / "overlay" / name / "diff" for name in ("base", "top")]
