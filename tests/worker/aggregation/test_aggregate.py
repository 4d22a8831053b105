"""The aggregate stage: equal to a float64 oracle and to the running model, the same bytes in any order."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from aggregation_worlds import FROZEN, FULL, LAYOUT, RUN_KEY, SCALE, TRAINED_A, a_round, client, tensors_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tributary_api.aggregation import DeltaEncoding
from tributary_api.failures import Reason
from tributary_api.records import CHUNK_BYTES
from tributary_store import bundle
from tributary_store.errors import ObjectDamaged
from tributary_worker import lora, lora_names
from tributary_worker.aggregation.numbers import decode, encode
from tributary_worker.delta_file import write_delta
from tributary_worker.failures import StageFailure
from tributary_worker.privacy.keystream import Keystream

MODELS = {"gpt2": tiny_models.gpt2, "llama": tiny_models.llama}


def modules_of(model):
    """(inputs, outputs) of every layer that a client would adapt."""
    names = lora.target_names(model, lora.LoraSettings(3, 6.0))
    return {name: lora.features(model.get_submodule(name)) for name in names}


def a_tiny_round(tmp_path, architecture="llama", method=FROZEN, clients=3):
    model = MODELS[architecture]()
    return a_round(tiny_models.save(model, tmp_path / "base"), modules_of(model), method, clients)


def weighted(made, value):
    """Σ w·value(delta) / Σ w, in float64."""
    names = made.weights
    total = sum(
        made.weights[n] * value({k: v.astype(np.float64) for k, v in made.deltas[n].items()}) for n in names
    )
    return total / sum(made.weights.values())


def oracle(made, architecture):
    """The new weights by the textbook's formula, with NumPy's own matrix product."""
    new = {name: tensor.astype(np.float64) for name, tensor in tensors_of(made.base_directory).items()}
    for name in new:
        if made.method == FULL:
            new[name] += weighted(made, lambda delta, n=name: delta[n])
        elif name.removesuffix(".weight") in made.modules:
            factor = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight".format
            product = weighted(made, lambda delta, f=factor: delta[f("B")] @ delta[f("A")])
            new[name] += SCALE * (product.T if architecture == "gpt2" else product)
    return new


@pytest.mark.parametrize("method", [FROZEN, TRAINED_A, FULL], ids=["frozen-a", "trained-a", "full"])
@pytest.mark.parametrize("architecture", MODELS)
def test_the_new_weights_are_the_oracles(tmp_path, architecture, method):
    made = a_tiny_round(tmp_path, architecture, method)
    new, old, expected = (
        tensors_of(made.result(tmp_path)),
        tensors_of(made.base_directory),
        oracle(made, architecture),
    )
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=2e-7, atol=1e-9, err_msg=name)
        assert tensor.dtype == old[name].dtype
    changed = {name for name in new if not np.array_equal(new[name], old[name])}
    assert len(changed) == (len(new) if method == FULL else len(made.modules))


@pytest.mark.parametrize("architecture", MODELS)
def test_the_new_model_answers_like_the_old_one_with_the_mean_adapter(tmp_path, architecture):
    """In the very modules that a client trains: names and orientation of every factor are right."""
    made = a_tiny_round(tmp_path, architecture)
    directory = made.result(tmp_path)
    adapted = MODELS[architecture]()
    lora.add_adapters(adapted, lora.LoraSettings(3, 6.0), seed=RUN_KEY)
    for module, adapter in lora.adapters(adapted):
        name = f"base_model.model.{module}.lora_B.weight"
        mean = weighted(made, lambda delta, n=name: delta[n])
        adapter.lora_b.data = torch.from_numpy(mean.astype(np.float32))
    new = AutoModelForCausalLM.from_pretrained(directory)
    ids = AutoTokenizer.from_pretrained(directory)("The same answer.", return_tensors="pt").input_ids
    with torch.no_grad():
        due, plain = adapted(ids).logits, MODELS[architecture]()(ids).logits
        torch.testing.assert_close(new(ids).logits, due, rtol=1e-4, atol=1e-5)
    assert (due - plain).abs().max() > 0.01
    # Tied weights stay tied, and everything but the weights is the base model's.
    assert new.config.tie_word_embeddings is True
    assert new.lm_head.weight is new.get_input_embeddings().weight
    for file in made.base_directory.glob("*.json"):
        assert (directory / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("method", [FROZEN, TRAINED_A, FULL], ids=["frozen-a", "trained-a", "full"])
def test_the_order_of_the_clients_changes_no_byte(tmp_path, method):
    made = a_tiny_round(tmp_path, "gpt2", method)
    manifests = set()
    for n, order in enumerate(itertools.permutations(made.weights)):
        made.store.objects.pop(LAYOUT.aggregate_manifest(RUN_KEY), None)
        # Rounded to float32 a sum rarely shows its order; the manifest, which names the clients, always does.
        manifests.add(made.only(*order).run(tmp_path / f"work-{n}").canonical_json())
    assert len(manifests) == 1


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@settings(max_examples=200, deadline=None)
@example([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # halfway between two: to the even one
def test_bfloat16_is_rounded_as_torch_rounds_it(values):
    array = np.array(values, np.float32)
    due = torch.from_numpy(array).to(torch.bfloat16)
    assert encode(array.astype(np.float64), "BF16") == due.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(
        decode(encode(array.astype(np.float64), "BF16"), "BF16"), due.to(torch.float64).numpy()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type_and_their_files(tmp_path, dtype):
    model = tiny_models.gpt2().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len([*(tmp_path / "base").glob("*.safetensors")]) > 1
    made = a_round(tmp_path / "base", modules_of(model))
    directory = made.result(tmp_path)
    assert {p.name for p in directory.iterdir()} == {p.name for p in made.base_directory.iterdir()}
    new = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()
    name = "transformer.h.0.attn.c_attn"
    delta = weighted(
        made,
        lambda d: d[f"base_model.model.{name}.lora_B.weight"] @ d[f"base_model.model.{name}.lora_A.weight"],
    )
    due = model.state_dict()[f"{name}.weight"].double() + SCALE * torch.from_numpy(delta.T)
    # Torch rounds float64 twice on its way to float16, NumPy once.
    due = torch.from_numpy(due.numpy().astype(np.float16)) if dtype is torch.float16 else due.to(dtype)
    assert torch.equal(new[f"{name}.weight"], due)


def test_a_delta_of_several_chunks(tmp_path):
    model = tiny_models.llama(width=448)
    made = a_round(tiny_models.save(model, tmp_path / "base"), {}, FULL, clients=2)
    assert len(save(made.deltas["a"])) > CHUNK_BYTES
    new, expected = tensors_of(made.result(tmp_path)), oracle(made, "llama")
    for name, tensor in new.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=2e-7, atol=1e-9, err_msg=name)


def test_a_model_stored_without_its_head(tmp_path):
    model = tiny_models.gpt2()
    tiny_models.save(model.transformer, tmp_path / "base")
    made = a_round(tmp_path / "base", modules_of(model))
    new, old = tensors_of(made.result(tmp_path)), tensors_of(made.base_directory)
    assert not np.array_equal(new["h.0.attn.c_attn.weight"], old["h.0.attn.c_attn.weight"])


def test_what_a_client_saves_is_accepted(tmp_path):
    made = a_tiny_round(tmp_path, "gpt2", clients=1)
    trained = tiny_models.gpt2()
    lora.add_adapters(trained, lora.LoraSettings(3, 6.0), seed=RUN_KEY)
    factors = {
        lora_names.PEFT_PREFIX + name: p.detach().numpy()
        for name, p in trained.named_parameters()
        if ".lora_" in name
    }
    write_delta(tmp_path / "delta.safetensors", factors, {}, DeltaEncoding.FLOAT32, Keystream(bytes(32)))
    made.publish("a", (tmp_path / "delta.safetensors").read_bytes())
    manifest = made.run(tmp_path / "work")
    assert manifest.excluded == []
    # Nothing was trained, so B is zero and the model is the base model.
    assert manifest.model.digest == made.base.digest


def test_the_manifest_comes_last_and_is_adopted(tmp_path):
    made = a_tiny_round(tmp_path)
    first = made.run(tmp_path / "one")
    uri = LAYOUT.aggregate_manifest(RUN_KEY)
    assert [*made.store.objects][-1] == uri
    assert uri in made.store.retained
    assert bundle.read_manifest(made.store, first.model).parents == [made.base]
    assert [*map(str, first.included)] == ["clinic-a/notes", "clinic-b/notes", "clinic-c/notes"]
    # Whatever becomes of the deltas, the model of this run stays what it is.
    made.store.objects = {u: data for u, data in made.store.objects.items() if "/clients/" not in u}
    assert made.run(tmp_path / "two") == first


def test_an_attempt_that_died_before_the_manifest_is_repeated_to_the_byte(tmp_path):
    made = a_tiny_round(tmp_path)
    first = made.run(tmp_path / "one")
    del made.store.objects[LAYOUT.aggregate_manifest(RUN_KEY)]
    assert made.run(tmp_path / "two") == first


def test_a_manifest_of_another_run_is_not_adopted(tmp_path):
    made = a_tiny_round(tmp_path)
    uri = LAYOUT.aggregate_manifest(RUN_KEY)
    other = made.run(tmp_path / "one").model_copy(update={"run_key": "f" * 40})
    made.store.objects[uri] = other.canonical_json()
    with pytest.raises(StageFailure, match="belongs to another run"):
        made.run(tmp_path / "two")


def test_a_base_model_with_other_bytes_is_refused(tmp_path):
    made = a_tiny_round(tmp_path)
    uri = f"{made.base.uri}/model.safetensors"
    made.store.objects[uri] = made.store.objects[uri][:-1] + b"\0"
    with pytest.raises(ObjectDamaged, match=r"model\.safetensors"):
        made.run(tmp_path / "work")


@pytest.mark.parametrize(
    ("architecture", "targets", "message"),
    [
        ("llama", ["lm_head"], "no weight of its own for lm_head"),
        ("llama", ["q_proj", "c_attn"], "no weight of its own for c_attn"),
    ],
)
def test_what_cannot_carry_an_adapter_is_refused_by_name(tmp_path, architecture, targets, message):
    method = {"lora": {"rank": 3, "alpha": 6, "targetModules": targets}}
    made = a_round(tiny_models.save(MODELS[architecture](), tmp_path / "base"), {}, method)
    with pytest.raises(StageFailure, match=message) as raised:
        made.run(tmp_path / "work")
    assert raised.value.reason is Reason.MODEL_UNSUPPORTED


def test_a_change_out_of_range_is_refused(tmp_path):
    made = a_tiny_round(tmp_path, method=TRAINED_A, clients=1)
    made.publish("a", save({name: np.float32(1e30) * tensor for name, tensor in made.deltas["a"].items()}))
    with pytest.raises(StageFailure, match="leaves the range of F32"):
        made.run(tmp_path / "work")


def test_torch_is_not_loaded():
    """It would cost the pod a gigabyte and ten seconds."""
    code = (
        "import sys, tributary_worker.aggregate; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_client_is_named(tmp_path):
    made = a_tiny_round(tmp_path)
    made.publish("b", b"no delta")
    manifest = made.run(tmp_path / "work")
    assert [f.client for f in manifest.excluded] == [str(client("b"))]
