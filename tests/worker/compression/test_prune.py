"""Pruned models: smaller, dense, of the same type, and without what mattered least."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from tributary_api.release import Prune
from tributary_api.shared import TaskKind
from tributary_worker.compression.loading import load_model
from tributary_worker.compression.prune import SHAPES, largest, measure, prune_directory, smaller
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure

LM = TaskKind.CAUSAL_LM
MODELS = {
    "llama-tied": tiny_models.llama,
    "llama-untied": lambda: tiny_models.llama(tied=False),
    "mistral": lambda: tiny_models.causal_lm("mistral"),
    "qwen2": lambda: tiny_models.causal_lm("qwen2"),
    "gpt2": tiny_models.gpt2,
}
DOCUMENTS = [Document(f"{i}", f"the {word} fox jumps") for i, word in enumerate(("quick", "brown", "lazy"))]
HALF = Prune(ffn_fraction="0.5", depth_fraction="0.5")
IDS = torch.arange(1, 20)[None]


def pruned(model, tmp_path, step=HALF, documents=DOCUMENTS):
    source, target = tiny_models.save(model, tmp_path / "parent"), tmp_path / "pruned"
    target.mkdir()
    prune_directory(source, target, step, LM, documents)
    return target


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_result_is_a_plain_smaller_model(make, tmp_path):
    model = make()
    target = pruned(model, tmp_path)
    loaded = load_model(target, LM).model
    shape = SHAPES[model.config.model_type]
    assert len(loaded.get_submodule(shape.blocks)) == 1
    assert getattr(loaded.config, shape.width_field) % 32 == 0
    assert type(loaded) is type(model)
    assert loaded.num_parameters() < model.num_parameters()
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(target)(IDS).logits).all()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_units_that_never_fire_and_blocks_that_do_nothing_go_without_a_trace(make, tmp_path):
    """The oracle: dead units and a dead block are what pruning must find, and then no answer changes."""
    model = make()
    shape = SHAPES[model.config.model_type]
    blocks = model.get_submodule(shape.blocks)
    state = model.state_dict()
    with torch.no_grad():
        silence(state, shape, 0, range(0, 192, 2))
        for name, parameter in blocks[1].named_parameters():
            if name.endswith(("o_proj.weight", "c_proj.weight", "c_proj.bias", "down_proj.weight")):
                parameter.zero_()
        expected = model(IDS).logits
    width = dict(blocks[0].named_parameters())[shape.rows[0]].shape[0]
    step = Prune(ffn_fraction=str(96 / width), depth_fraction="0.5")
    found = load_model(pruned(model, tmp_path, step), LM).model
    assert torch.allclose(found(IDS).logits, expected, atol=1e-5)


def silence(state, shape, block, units):
    """Cut these hidden units of a block off from their inputs."""
    prefix = f"{shape.blocks}.{block}."
    readers = ("mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.c_fc.weight", "mlp.c_fc.bias")
    for name in (prefix + part for part in readers):
        if name in state:
            index = (..., list(units)) if name.endswith("c_fc.weight") else (list(units),)
            state[name][index] = 0


def test_nothing_pruned_is_the_same_model():
    model = tiny_models.llama()
    shape = SHAPES["llama"]
    same = smaller(model, shape, [0, 1], [list(range(192))] * 2)
    assert torch.equal(same(IDS).logits, model(IDS).logits)


def test_importance_is_the_mean_size_of_activations(tmp_path):
    loaded = load_model(tiny_models.save(tiny_models.llama(), tmp_path / "model"), LM)
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    found = measure(loaded, SHAPES["llama"], texts)
    seen = []
    down = loaded.model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0]))
    for ids in texts:
        loaded.model(torch.tensor([ids]))
    handle.remove()
    assert torch.allclose(found.units[0], torch.cat(seen).double().abs().mean(0), atol=1e-9)
    assert found.blocks.shape == (2,)
    assert (found.blocks > 0).all()


def test_the_same_text_prunes_to_the_same_bytes(tmp_path):
    """Without documents the model writes the text itself, from a fixed seed."""
    digests = []
    for name in ("one", "two"):
        target = pruned(
            tiny_models.llama(), tmp_path / name, Prune(ffn_fraction="0.5", max_sequence_length=8), []
        )
        digests.append((target / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]


def test_half_precision_stays_half_precision(tmp_path):
    target = pruned(tiny_models.llama().to(torch.bfloat16), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Prune(ffn_fraction="0.01"), "less than 32: raise it"),
        (Prune(depth_fraction="0.99"), "leaves none of 2 blocks"),
    ],
)
def test_what_cannot_be_pruned_is_refused(tmp_path, step, words):
    with pytest.raises(StageFailure, match=words):
        pruned(tiny_models.llama(), tmp_path, step)


def test_the_largest_are_kept_in_their_order():
    assert largest(torch.tensor([1.0, 3.0, 3.0, 0.0, 5.0]), 3) == [1, 2, 4]
