"""INT8 bundles: as exact as int8 can be, small, the same every time, and read by transformers as by us."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tributary_api.failures import Reason
from tributary_api.release import QuantizationScheme, Quantize
from tributary_api.shared import TaskKind
from tributary_worker.compression.layout import ARCHITECTURES, Precision
from tributary_worker.compression.loading import load_model
from tributary_worker.compression.quantize import precision_of, quantize_directory, row_scales
from tributary_worker.failures import StageFailure

MODELS = {
    "llama-tied": tiny_models.llama,
    "llama-untied": lambda: tiny_models.llama(tied=False),
    "llama-width-not-a-multiple-of-the-packing": lambda: tiny_models.llama(width=12, intermediate_size=37),
    "mistral": lambda: tiny_models.causal_lm("mistral"),
    "qwen2": lambda: tiny_models.causal_lm("qwen2"),
    "gpt2": tiny_models.gpt2,
}


def compressed(model, tmp_path, name="int8"):
    source, target = tmp_path / f"{name}-parent", tmp_path / name
    if not source.exists():
        tiny_models.save(model, source)
    target.mkdir()
    quantize_directory(source, target)
    return source, target


def weight_bytes(directory):
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def rounded(weight):
    """The oracle: round-to-nearest int8 with a scale for each row, in float64."""
    wide = weight.double()
    scales = wide.abs().amax(1, keepdim=True) / 127
    return torch.where(scales > 0, torch.round(wide / scales) * scales, 0).float()


def is_matrix(name, tensor):
    return tensor.dim() == 2 and "wpe" not in name


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_transformers_reads_the_rounded_weights(make, tmp_path):
    model = make()
    _, target = compressed(model, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for name, weight in model.state_dict().items():
        expected = rounded(weight) if is_matrix(name, weight) else weight
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8, msg=name)


def test_half_precision_weights_move_by_no_more_than_half_a_level(tmp_path):
    model = tiny_models.llama().bfloat16()
    _, target = compressed(model, tmp_path)
    found = load_model(target, TaskKind.CAUSAL_LM).model.state_dict()
    for name, weight in model.state_dict().items():
        scales = row_scales(weight.float()) if is_matrix(name, weight) else torch.zeros(1)
        assert ((found[name] - weight.float()).abs() <= scales * (0.5 + 1e-4)).all(), name


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_our_loader_computes_what_transformers_computes(make, tmp_path):
    _, target = compressed(make(), tmp_path)
    ids = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(1))
    ours = load_model(target, TaskKind.CAUSAL_LM).model(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    assert torch.equal(ours, theirs)


def test_a_tied_head_stays_tied(tmp_path):
    _, target = compressed(tiny_models.llama(), tmp_path)
    model = load_model(target, TaskKind.CAUSAL_LM).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not any("lm_head" in name for name in load_file(target / "model.safetensors"))


def test_a_copy_of_the_tied_embedding_is_not_stored(tmp_path):
    source = tiny_models.save(tiny_models.llama(), tmp_path / "int8-parent")
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"}
    )
    _, target = compressed(None, tmp_path)
    assert not any("lm_head" in name for name in load_file(target / "model.safetensors"))


@pytest.mark.parametrize("make", [lambda: tiny_models.llama(width=256), lambda: tiny_models.gpt2(width=256)])
def test_weight_files_are_a_third_of_their_parents(make, tmp_path):
    source, target = compressed(make(), tmp_path)
    assert weight_bytes(target) <= 0.30 * weight_bytes(source)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = tiny_models.llama()
    _, first = compressed(model, tmp_path, "first")
    _, second = compressed(model, tmp_path, "second")
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_shards_stay_shards(tmp_path):
    model = tiny_models.llama()
    source = tmp_path / "int8-parent"
    model.save_pretrained(source, max_shard_size="100KB")
    tiny_models.byte_tokenizer().save_pretrained(source)
    _, target = compressed(model, tmp_path)
    assert len(list(target.glob("*.safetensors"))) > 1
    index = json.loads((target / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert {name for file in target.glob("*.safetensors") for name in load_file(file)} == set(index)
    whole = compressed(model, tmp_path, "whole")[1]
    ids = torch.arange(20)[None]
    sharded = load_model(target, TaskKind.CAUSAL_LM).model(ids).logits
    assert torch.equal(sharded, load_model(whole, TaskKind.CAUSAL_LM).model(ids).logits)


def test_a_classifier_keeps_its_head(tmp_path):
    model = tiny_models.llama_classifier()
    _, target = compressed(model, tmp_path)
    loaded = load_model(target, TaskKind.SEQUENCE_CLASSIFICATION).model
    assert torch.equal(loaded.score.weight, model.score.weight)
    expected = rounded(model.model.embed_tokens.weight)
    torch.testing.assert_close(loaded.model.embed_tokens.weight, expected, rtol=1e-6, atol=1e-8)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=4, max_size=64),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_no_weight_moves_by_more_than_half_a_level(values, rows):
    weight = torch.tensor(values).repeat(rows, 1) * torch.arange(1, rows + 1)[:, None]
    scales = row_scales(weight)
    levels = (weight / scales).round()
    assert levels.abs().max() <= 127
    assert ((weight - levels * scales).abs() <= scales * (0.5 + 1e-4)).all()


def change_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_value(directory, value, dtype=torch.float32):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full((64,), value).to(dtype)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: change_config(d, model_type="bert"), "'bert'"),
        (lambda d: change_config(d, quantization_config={}), "quantised already"),
        (lambda d: with_value(d, float("nan")), "model.norm.weight holds NaN"),
        (lambda d: with_value(d, 1.0, torch.float64), "model.norm.weight has data type torch.float64"),
        (lambda d: (d / "model.safetensors").write_bytes(b"pickle"), "not a safetensors file"),
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(spoil, words, tmp_path):
    spoil(tiny_models.save(tiny_models.llama(), tmp_path / "int8-parent"))
    with pytest.raises(StageFailure, match=words) as failure:
        compressed(None, tmp_path)
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED


def without(directory, part):
    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: without(d, "layers.1.mlp.up_proj"), "missing keys, as model.layers.1.mlp.up_proj"),
        (lambda d: change_config(d, num_hidden_layers=1), "unexpected keys"),
        (lambda d: change_config(d, vocab_size=300), "mismatched|size"),
        (lambda d: change_config(d, model_type="unheard-of"), "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_a_model_is_never_loaded_in_part(kind, spoil, words, tmp_path):
    parent, int8 = compressed(tiny_models.llama(), tmp_path)
    directory = parent if kind == "plain" else int8
    spoil(directory)
    with pytest.raises(StageFailure, match=words) as failure:
        load_model(directory, TaskKind.CAUSAL_LM)
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    source = tiny_models.save(tiny_models.llama(), tmp_path / "model")
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(source)
    with pytest.raises(StageFailure, match="258 tokens, the model 257"):
        load_model(source, TaskKind.CAUSAL_LM)


def test_every_architecture_is_tested():
    assert {name.partition("-")[0] for name in MODELS} == set(ARCHITECTURES)


@pytest.mark.parametrize("make", [tiny_models.llama, lambda: tiny_models.llama(tied=False), tiny_models.gpt2])
def test_int4_is_rounded_group_by_group(make, tmp_path):
    model, step = make(), Quantize(scheme=QuantizationScheme.INT4, group_size=32)
    source = tiny_models.save(model, tmp_path / "parent")
    (tmp_path / "int4").mkdir()
    quantize_directory(source, tmp_path / "int4", precision_of(step))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "int4").state_dict()
    for name, tensor in model.state_dict().items():
        groups = tensor.double().unflatten(-1, (-1, 32)) if is_matrix(name, tensor) else None
        expected = tensor if groups is None else rounded_to(7, groups).flatten(-2)
        assert torch.allclose(found[name].double(), expected.double(), atol=1e-7), name
    assert weight_bytes(tmp_path / "int4") < 0.3 * weight_bytes(source)


def rounded_to(levels, groups):
    scales = groups.abs().amax(-1, keepdim=True) / levels
    return torch.where(scales > 0, torch.round(groups / scales) * scales, 0)


def test_groups_that_do_not_divide_a_row_are_refused(tmp_path):
    source = tiny_models.save(tiny_models.llama(), tmp_path / "parent")
    (tmp_path / "int4").mkdir()
    with pytest.raises(StageFailure, match="groupSize 48"):
        quantize_directory(source, tmp_path / "int4", Precision(4, 48))
