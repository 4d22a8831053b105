from __future__ import annotations

from hashlib import sha256

import pytest
import tiny_models
import torch

from tributary_worker import lora, lora_names
from tributary_worker.lora_init import frozen_a
from tributary_worker.privacy.errors import UnsupportedError


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
    name = lora_names.factor_name("model.layers.0.self_attn.q_proj", "lora_A")
    assert name == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert lora_names.module_of(name) == "model.layers.0.self_attn.q_proj"


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
