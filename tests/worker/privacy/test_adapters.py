from __future__ import annotations

from hashlib import sha256

import pytest
import tiny_models
import torch
from torch.func import functional_call, grad, vmap

from tributary_api.shared import TaskKind
from tributary_worker import lora
from tributary_worker.lora_init import frozen_a
from tributary_worker.objectives import IGNORED_LABEL, OBJECTIVES
from tributary_worker.privacy.adapters import PerExampleAdapters
from tributary_worker.privacy.clipping import per_example_norms
from tributary_worker.privacy.errors import PrivacyError, UnsupportedError

LENGTH = 10
CLASSIFIER_TARGETS = ("q_proj", "down_proj", "score")
MODELS = {
    "gpt2": (tiny_models.gpt2, TaskKind.CAUSAL_LM, ()),
    "gpt2-tied-head": (tiny_models.gpt2, TaskKind.CAUSAL_LM, ("c_attn", "lm_head")),
    "llama": (tiny_models.llama, TaskKind.CAUSAL_LM, ()),
    "llama-classifier": (tiny_models.llama_classifier, TaskKind.SEQUENCE_CLASSIFICATION, CLASSIFIER_TARGETS),
}


def adapted(name, *, freeze_a):
    """A model with adapters whose B is not zero, as in the middle of a training."""
    make, task, targets = MODELS[name]
    model = make()
    lora.add_adapters(model, lora.LoraSettings(3, 6.0, freeze_a, targets), seed="a round")
    torch.manual_seed(1)
    for _, adapter in lora.adapters(model):
        torch.nn.init.normal_(adapter.lora_b, std=0.1)
    return model, task


def ragged_batch(task, size):
    """Records of different lengths, the first without a single token that counts."""
    ids = torch.randint(1, 257, (size, LENGTH), generator=torch.Generator().manual_seed(size))
    lengths = torch.tensor([0, 1, 2, 5, LENGTH, 7, 3, LENGTH])[:size]
    if task is TaskKind.SEQUENCE_CLASSIFICATION:
        return ids, torch.tensor([IGNORED_LABEL, 0, 1, 2, 0, 1, 2, 0])[:size]
    return ids, torch.where(torch.arange(LENGTH) < lengths[:, None], ids, IGNORED_LABEL)


def oracle_norms(model, task, ids, labels):
    """Norms by vmap(grad) of a functional call: another way through other code of torch."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters, ids, labels):
        def call(attention_mask=None, **inputs):
            return functional_call(model, parameters | frozen, (), inputs)

        mask = torch.ones_like(ids)[None]
        batch = {"input_ids": ids[None], "attention_mask": mask, "labels": labels[None]}
        return OBJECTIVES[task](call, batch)[0]

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(trained, ids, labels)
    return torch.stack([g.flatten(1).double().square().sum(1) for g in gradients.values()]).sum(0).sqrt()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("freeze_a", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_norms_per_record_equal_those_of_vmap_of_grad(name, freeze_a, size):
    model, task = adapted(name, freeze_a=freeze_a)
    ids, labels = ragged_batch(task, size)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    gradients = PerExampleAdapters(model).gradients(lambda: OBJECTIVES[task](model, batch), size)
    found, expected = per_example_norms(gradients), oracle_norms(model, task, ids, labels)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert float(found[0]) == 0.0
    assert size == 1 or bool((found[2:] > 0).all())


def test_no_gradient_reaches_a_parameter():
    model, task = adapted("llama", freeze_a=False)
    ids, labels = ragged_batch(task, 4)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    PerExampleAdapters(model).gradients(lambda: OBJECTIVES[task](model, batch), 4)
    assert all(p.grad is None for p in model.parameters())
    assert all(a.example_a is None and a.example_b is None for _, a in lora.adapters(model))


def test_a_trainable_parameter_without_a_gradient_per_record_is_refused():
    model, _ = adapted("llama", freeze_a=True)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(PrivacyError, match="embed_tokens"):
        PerExampleAdapters(model)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(PrivacyError, match="no trainable"):
        PerExampleAdapters(tiny_models.llama().requires_grad_(False))


def test_a_factor_that_the_forward_never_uses_is_refused():
    model, task = adapted("llama", freeze_a=True)
    model.unused = lora.LoraLinear(torch.nn.Linear(4, 4).requires_grad_(False), lora.LoraSettings(2, 2.0))
    ids, labels = ragged_batch(task, 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with pytest.raises(RuntimeError, match="not have been used"):
        PerExampleAdapters(model).gradients(lambda: OBJECTIVES[task](model, batch), 2)


def test_a_layer_whose_first_dimension_is_not_the_batch_is_refused():
    adapter = lora.LoraLinear(torch.nn.Linear(4, 4).requires_grad_(False), lora.LoraSettings(2, 2.0))
    per_example = PerExampleAdapters(adapter)
    with pytest.raises(UnsupportedError, match="told apart"):
        per_example.gradients(lambda: adapter(torch.ones(6, 4)).view(3, 2, 4).sum((1, 2)), 3)


def test_the_delta_of_a_conv1d_and_of_a_linear_layer_is_b_times_a():
    for model in (tiny_models.gpt2(), tiny_models.llama()):
        lora.add_adapters(model, lora.LoraSettings(3, 6.0), seed="a round")
        for _, adapter in lora.adapters(model):
            torch.nn.init.normal_(adapter.lora_b)
            x = torch.randn(2, 5, lora.features(adapter.base)[0])
            change = 2.0 * adapter.lora_b @ adapter.lora_a
            assert torch.allclose(adapter(x) - adapter.base(x), x @ change.T, atol=1e-4)


def test_clients_share_the_frozen_factor_and_rounds_do_not():
    shared = frozen_a("round", "q_proj", 3, 16)
    assert (shared == frozen_a("round", "q_proj", 3, 16)).all()
    assert not (shared == frozen_a("next", "q_proj", 3, 16)).any()
    assert not (shared == frozen_a("round", "k_proj", 3, 16)).any()


def test_the_frozen_factor_is_uniform_and_never_changes():
    large = frozen_a("round", "q_proj", 64, 1024)
    assert abs(large).max() <= 1024**-0.5
    # Mean 0 and variance bound**2 / 3; 5 standard errors of 65 536 draws.
    assert abs(large.mean()) < 5 * large.std() / 256
    assert abs(large.var() * 1024 * 3 - 1) < 0.02
    # A round that is taken up again under a later version must find the same factor.
    assert sha256(large.tobytes()).hexdigest()[:16] == "dd0af164bab05ace"


def test_peft_names():
    model = tiny_models.llama()
    lora.add_adapters(model, lora.LoraSettings(3, 6.0), seed="a round")
    tensors = lora.peft_tensors(model)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lora.LoraSettings(3, 6.0, targets=("nowhere",)), "no module"),
        (lora.LoraSettings(3, 6.0, targets=("embed_tokens",)), "Embedding"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(settings, message):
    with pytest.raises(UnsupportedError, match=message):
        lora.add_adapters(tiny_models.llama(), settings, seed="a round")
