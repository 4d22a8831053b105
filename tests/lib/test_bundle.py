"""Laws of model bundles: what is pushed comes back, equal content has equal digests, any change is found."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import MemoryStore

from tributary_api.shared import ModelRef
from tributary_store.bundle import bundle_digest, pull, push, read_manifest, weight_bytes
from tributary_store.bundle_files import BUNDLE_FILE
from tributary_store.errors import BundleRefused, ObjectDamaged, ObjectExists, ObjectMissing, StoreError
from tributary_store.tensors import encode_header

MODELS = "s3://exchange/models/"


def weights(values=b"\1\2\3\4"):
    return encode_header({"w": ("U8", (len(values),))}, {}) + values


def a_model(directory, **files):
    """A directory that save_pretrained could have written; a test spells out only what it is about."""
    content = {
        "config.json": b'{"model_type": "gpt2"}',
        "model.safetensors": weights(),
        "tokenizer.json": b"{}",
        **files,
    }
    directory.mkdir(exist_ok=True)
    for name, data in content.items():
        if data is not None:
            (directory / name).write_bytes(data)
    return directory


def content_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


models = st.builds(
    lambda values, texts: {
        "model.safetensors": weights(values),
        **{name: json.dumps({"t": t}).encode() for name, t in texts.items()},
    },
    st.binary(max_size=200),
    st.dictionaries(
        st.sampled_from(["tokenizer.json", "generation_config.json", "config.json"]), st.text(max_size=20)
    ),
)


@settings(deadline=None)
@given(models)
def test_what_is_pushed_comes_back(files):
    with TemporaryDirectory() as root:
        source, target, store = a_model(Path(root, "a"), **files), Path(root, "b"), MemoryStore()
        ref = push(store, source, MODELS)
        pull(store, ref, target)
        assert content_of(target) == content_of(source)
        assert push(store, target, MODELS) == ref


@settings(deadline=None)
@given(models, models)
def test_digests_are_equal_if_and_only_if_the_files_are(first, second):
    with TemporaryDirectory() as root:
        a, b = a_model(Path(root, "a"), **first), a_model(Path(root, "b"), **second)
        refs = push(MemoryStore(), a, MODELS), push(MemoryStore(), b, MODELS, description="else")
        assert (refs[0].digest == refs[1].digest) == (content_of(a) == content_of(b))


@settings(deadline=None)
@given(models, st.data())
def test_any_flipped_byte_is_found(files, data):
    with TemporaryDirectory() as root:
        store = MemoryStore()
        ref = push(store, a_model(Path(root, "a"), **files), MODELS)
        uri = data.draw(st.sampled_from(sorted(uri for uri in store.objects if store.objects[uri])))
        content = bytearray(store.objects[uri])
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        store.objects[uri] = bytes(content)
        try:
            manifest = pull(store, ref, Path(root, "b"))
        except (ObjectDamaged, BundleRefused, ObjectMissing):
            return
        # A flipped bit may leave JSON that means the same to the model's user: the digested part is unharmed.
        assert uri.endswith(BUNDLE_FILE)
        assert bundle_digest(manifest.files) == ref.digest
        assert content_of(Path(root, "b")) == content_of(Path(root, "a"))


def test_the_manifest_is_written_last_and_kept(tmp_path):
    store = MemoryStore()
    ref = push(store, a_model(tmp_path / "m"), MODELS, run_key="k", description="base")
    assert [*store.objects][-1] == f"{ref.uri}/{BUNDLE_FILE}"
    assert store.retained == {f"{ref.uri}/{BUNDLE_FILE}"}
    assert ref.uri == MODELS + ref.digest.removeprefix("sha256:")
    manifest = read_manifest(store, ref)
    assert (manifest.run_key, manifest.description) == ("k", "base")
    assert weight_bytes(manifest) == len(weights())


def test_the_first_history_of_equal_weights_stays(tmp_path):
    store, model = MemoryStore(), a_model(tmp_path / "m")
    first = push(store, model, MODELS, run_key="one")
    assert push(store, model, MODELS, run_key="two") == first
    assert read_manifest(store, first).run_key == "one"


def test_a_push_that_was_cut_off_is_finished_by_the_next(tmp_path):
    store, model = MemoryStore(), a_model(tmp_path / "m")
    ref = push(store, model, MODELS)
    for uri in [*store.objects][1:]:
        del store.objects[uri]
    with pytest.raises(ObjectMissing, match="tributary model push"):
        pull(store, ref, tmp_path / "b")
    assert push(store, model, MODELS) == ref
    pull(store, ref, tmp_path / "b")
    assert content_of(tmp_path / "b") == content_of(model)


def test_another_digest_than_the_reference_is_refused(tmp_path):
    store = MemoryStore()
    ref = push(store, a_model(tmp_path / "m"), MODELS)
    other = ModelRef(uri=ref.uri, digest="sha256:" + "0" * 64)
    with pytest.raises(ObjectDamaged, match=f"has digest {ref.digest}, not sha256:000"):
        pull(store, other, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_files_under_the_bundles_keys_are_never_replaced(tmp_path):
    store, model = MemoryStore(), a_model(tmp_path / "m")
    digest = push(MemoryStore(), model, MODELS).digest.removeprefix("sha256:")
    store.put_new(f"{MODELS}{digest}/model.safetensors", b"planted")
    with pytest.raises(ObjectExists):
        push(store, model, MODELS)


def linked(directory):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b""}, r"pytorch_model\.bin: pickles can run code.*save_pretrained"),
        ({"optimizer.PT": b""}, r"optimizer\.PT: pickles"),
        ({"config.json": None}, r"has no config\.json"),
        ({"config.json": b"{"}, r"config\.json is not JSON"),
        ({"config.json": b"[]"}, r"config\.json is not a JSON object"),
        ({"config.json": b'{"auto_map": {}}'}, r"auto_map: a model that brings its own code"),
        ({"model.safetensors": None}, r"no weights: model\.safetensors missing"),
        ({"model.safetensors": b"\x80\x04K\x01."}, r"not a whole safetensors file"),
        ({"model.safetensors": weights()[:-1]}, r"not a whole safetensors file"),
        (
            {
                "model.safetensors.index.json": b'{"weight_map": {"w": "model-1.safetensors"}}',
            },
            r"no weights: model-1\.safetensors missing",
        ),
    ],
)
def test_what_is_no_safe_model_is_refused_by_name(tmp_path, files, message):
    store = MemoryStore()
    with pytest.raises(BundleRefused, match=message):
        push(store, a_model(tmp_path / "m", **files), MODELS)
    assert store.objects == {}


def test_a_link_out_of_the_directory_is_refused(tmp_path):
    model = a_model(tmp_path / "m")
    linked(model)
    with pytest.raises(BundleRefused, match=r"tokenizer\.json is a link to /etc/hostname.*cp -L"):
        push(MemoryStore(), model, MODELS)


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "model.pkl", "a/b.json", "evil.sh"])
def test_a_manifest_cannot_name_files_outside_or_unsafe_ones(tmp_path, name):
    store = MemoryStore()
    ref = push(store, a_model(tmp_path / "m"), MODELS)
    manifest = read_manifest(store, ref)
    files = [manifest.files[0].model_copy(update={"path": name})]
    forged = manifest.model_copy(update={"files": files, "digest": bundle_digest(files)})
    store.objects[f"{ref.uri}/{BUNDLE_FILE}"] = forged.canonical_json()
    with pytest.raises(StoreError, match=r"pickles|which no bundle may hold"):
        pull(store, ModelRef(uri=ref.uri, digest=forged.digest), tmp_path / "b")
    assert not (tmp_path / "b").exists()
