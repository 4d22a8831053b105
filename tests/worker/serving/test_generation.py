"""Generation against transformers' own, and the distribution of samples against the softmax."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

from tributary_api.shared import TaskKind
from tributary_worker.compression.loading import load_model
from tributary_worker.serving.generation import GenerationError, Sampling, choose, end_tokens, generate

PROMPT = [40, 41, 42, 43]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request, tmp_path_factory):
    model = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2}[request.param]()
    return load_model(tiny_models.save(model, tmp_path_factory.mktemp("model")), TaskKind.CAUSAL_LM)


def text_of(loaded, sampling, prompt=PROMPT):
    return "".join(piece.text for piece in generate(loaded, prompt, sampling))


def test_greedy_tokens_are_those_of_transformers(loaded):
    ids = torch.tensor([PROMPT])
    whole = loaded.model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    expected = loaded.tokenizer.decode(whole, skip_special_tokens=True)
    pieces = list(generate(loaded, PROMPT, Sampling(tokens_max=30, temperature=0)))
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].tokens == len(whole)
    assert pieces[-1].finish == ("stop" if int(whole[-1]) in end_tokens(loaded) else "length")


def test_a_seed_repeats_and_another_differs(loaded):
    def sample(seed):
        return text_of(loaded, Sampling(tokens_max=20, seed=seed))

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(5)}) > 1
    assert len({sample(None) for _ in range(5)}) > 1


def test_a_stop_string_ends_the_text_before_it(loaded):
    whole = text_of(loaded, Sampling(tokens_max=20, temperature=0))
    stop = whole[3:5]
    pieces = list(generate(loaded, PROMPT, Sampling(tokens_max=20, temperature=0, stops=(stop,))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


def test_a_cancelled_generation_ends(loaded):
    asked = iter([False, False, False, True])
    pieces = list(generate(loaded, PROMPT, Sampling(tokens_max=200), lambda: next(asked)))
    assert [piece.finish for piece in pieces] == [None, None, None]


def test_the_end_token_ends_and_is_not_shown(loaded):
    head = loaded.model.get_output_embeddings().weight
    before = head.detach().clone()
    try:
        head.zero_()  # all tokens are equally likely, and the first is the end
        pieces = list(generate(loaded, PROMPT, Sampling(tokens_max=9, temperature=0)))
    finally:
        head.copy_(before)
    assert [(piece.text, piece.finish) for piece in pieces] == [("", "stop")]


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def frequencies(sampling, draws=20000):
    randomness = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(LOGITS))
    for _ in range(draws):
        counts[choose(LOGITS, sampling, randomness)] += 1
    return counts / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(0).float()
    found = frequencies(Sampling(1, temperature=temperature))
    # Five standard deviations of a binomial share: a false alarm once in a million runs.
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / 20000)


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    shares = LOGITS.softmax(0)
    for size in range(1, 5):
        top_p = float(shares[:size].sum()) - 1e-6
        found = frequencies(Sampling(1, top_p=top_p), draws=2000)
        assert (found > 0).tolist() == [i < size for i in range(4)]


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-3])
def test_cold_is_greedy(temperature):
    assert choose(LOGITS, Sampling(1, temperature=temperature), torch.Generator()) == 0


def test_an_answer_that_is_not_finite_is_an_error():
    with pytest.raises(GenerationError):
        choose(LOGITS / 0.0, Sampling(1), torch.Generator())
