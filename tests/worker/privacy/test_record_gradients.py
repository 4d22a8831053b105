"""Norms and clipped sums of records against vmap(grad), for every shape of model that can be trained."""

from __future__ import annotations

from functools import partial

import pytest
import tiny_models
import torch
from torch.func import functional_call, grad, vmap

from tributary_api.shared import TaskKind
from tributary_worker import lora
from tributary_worker.objectives import IGNORED_LABEL, OBJECTIVES, attention_mask
from tributary_worker.privacy.engine import enable_checkpointing
from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.trained import TrainedWeights

LENGTH = 10
CAUSAL, CLASSES = TaskKind.CAUSAL_LM, TaskKind.SEQUENCE_CLASSIFICATION
LORA = {"freeze_a": True, "targets": ()}
MODELS = {
    "gpt2 full, tied": (tiny_models.gpt2, CAUSAL, None),
    "llama full, tied": (tiny_models.llama, CAUSAL, None),
    "llama full, untied": (lambda: tiny_models.llama(tied=False), CAUSAL, None),
    "gpt2 classifier full": (tiny_models.gpt2_classifier, CLASSES, None),
    "llama classifier full": (tiny_models.llama_classifier, CLASSES, None),
    "bert classifier full": (tiny_models.bert_classifier, CLASSES, None),
    "gpt2 lora": (tiny_models.gpt2, CAUSAL, LORA),
    "gpt2 lora, tied head": (tiny_models.gpt2, CAUSAL, LORA | {"targets": ("c_attn", "lm_head")}),
    "llama lora, trained A": (tiny_models.llama, CAUSAL, LORA | {"freeze_a": False}),
    "llama classifier lora": (tiny_models.llama_classifier, CLASSES, LORA),
    "bert classifier lora": (tiny_models.bert_classifier, CLASSES, LORA | {"freeze_a": False}),
}


def made(name):
    """A model as in the middle of a training: no trained weight is zero."""
    make, task, adapters = MODELS[name]
    model = make()
    if adapters is not None:
        lora.add_adapters(model, lora.LoraSettings(3, 6.0, **adapters), seed="a round", task=task)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, task


def ragged_batch(model, task, size):
    """Records of different lengths, the first without a single token that counts; the last has the token for
    padding, whose embedding is not trained in a classifier, in the middle of its text."""
    ids = torch.randint(1, 257, (size, LENGTH), generator=torch.Generator().manual_seed(size))
    ids[-1, 1] = 0
    lengths = torch.tensor([0, 1, 2, 5, LENGTH, 7, 3, LENGTH])[:size]
    is_token = torch.arange(LENGTH) < lengths[:, None]
    ids = torch.where(is_token, ids, 0)
    labels = torch.where(is_token, ids, IGNORED_LABEL)
    if task is CLASSES:
        labels = torch.tensor([IGNORED_LABEL, 0, 1, 2, 0, 1, 2, 0])[:size]
    mask = attention_mask(model.config.model_type, is_token)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def oracle(model, task, batch):
    """Each record's gradient, flat (batch, numel): another way through other code of torch."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters, record):
        def call(attention_mask, **inputs):
            # Two dimensions mask nothing, but transformers branches on them, which vmap cannot.
            mask = attention_mask if attention_mask.dim() == 4 else torch.ones(1, LENGTH)
            return functional_call(model, parameters | frozen, (), inputs | {"attention_mask": mask})

        return OBJECTIVES[task](call, {name: rows[None] for name, rows in record.items()})[0]

    gradients = vmap(grad(loss), in_dims=(None, 0))(trained, batch)
    return torch.cat([g.flatten(1) for g in gradients.values()], 1).double()


def clipped(trained, losses, weights, limit, checkpointing=False):
    total = torch.zeros(trained.numel)
    add = trained.add_clipped_in_two_passes if checkpointing else trained.add_clipped
    add(losses, weights, limit, total)
    return total.double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_clipped_sums_are_those_of_vmap_of_grad(name, size):
    model, task = made(name)
    batch = ragged_batch(model, task, size)
    due = oracle(model, task, batch)
    trained, norms = TrainedWeights(model), due.norm(dim=1)
    found = trained.norms(lambda: OBJECTIVES[task](model, batch), size)
    assert torch.allclose(found, norms, rtol=1e-5, atol=1e-8)
    assert float(found[0]) == 0.0
    assert size == 1 or bool((found[3:] > 0).all())
    limit = float(norms.median()) or 1.0
    expected = (due * (limit / norms.clamp(min=limit))[:, None]).sum(0)
    for checkpointing in (False, True):
        enable_checkpointing(model, checkpointing)
        total = clipped(
            trained, lambda: OBJECTIVES[task](model, batch), torch.ones(size), limit, checkpointing
        )
        assert torch.allclose(total, expected, rtol=1e-4, atol=1e-6 * limit)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2 full, tied", "bert classifier full", "llama lora, trained A"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_broken_record_changes_nothing_for_the_others(name, value, checkpointing):
    model, task = made(name)
    batch, trained = ragged_batch(model, task, 5), TrainedWeights(model)
    enable_checkpointing(model, checkpointing)
    scales = torch.tensor([1.0, 1.0, 1.0, value, 1.0])
    others = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    args = (0.5, checkpointing)
    with_it = clipped(trained, lambda: OBJECTIVES[task](model, batch) * scales, torch.ones(5), *args)
    without = clipped(trained, lambda: OBJECTIVES[task](model, batch), others, *args)
    moved = float((with_it - without).norm())
    assert moved <= 0.5 * (1 + 1e-6)
    assert moved == 0.0 or value == 1e30


def test_a_record_whose_activations_are_broken_contributes_nothing():
    model, task = made("llama full, untied")
    batch = ragged_batch(model, task, 4)
    only_third = next(i for i in batch["input_ids"][3].tolist() if (batch["input_ids"] == i).sum() == 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[only_third] = float("nan")
    trained, three = TrainedWeights(model), torch.tensor([1.0, 1.0, 1.0, 0.0])
    losses = partial(OBJECTIVES[task], model, batch)
    total = clipped(trained, losses, torch.ones(4), 1.0)
    assert float(total.norm()) > 0
    assert torch.equal(total, clipped(trained, losses, three, 1.0))


def test_a_trainable_parameter_without_a_rule_is_refused_by_its_name():
    model = tiny_models.llama()
    model.odd = torch.nn.PReLU()
    with pytest.raises(UnsupportedError, match=r"odd\.weight \(PReLU\)"):
        TrainedWeights(model)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(PrivacyError, match="no trainable"):
        TrainedWeights(tiny_models.llama().requires_grad_(False))


def test_trained_weights_in_low_precision_are_refused():
    with pytest.raises(PrivacyError, match="float32"):
        TrainedWeights(tiny_models.llama().to(torch.bfloat16))


def test_a_layer_that_the_losses_do_not_depend_on_is_refused():
    model, task = made("llama lora, trained A")
    model.unused = lora.LoraLinear(torch.nn.Linear(4, 4).requires_grad_(False), lora.LoraSettings(2, 2.0))
    batch = ragged_batch(model, task, 2)
    with pytest.raises(UnsupportedError, match=r"unused\.lora_B"):
        TrainedWeights(model).norms(lambda: OBJECTIVES[task](model, batch), 2)


def test_a_layer_that_is_used_twice_is_refused():
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match="used twice"):
        TrainedWeights(layer).norms(lambda: layer(layer(torch.ones(3, 4))).sum(1), 3)


def test_a_layer_whose_first_dimension_is_not_the_batch_is_refused():
    adapter = lora.LoraLinear(torch.nn.Linear(4, 4).requires_grad_(False), lora.LoraSettings(2, 2.0))
    with pytest.raises(UnsupportedError, match="told apart"):
        TrainedWeights(adapter).norms(lambda: adapter(torch.ones(6, 4)).view(3, 2, 4).sum((1, 2)), 3)
