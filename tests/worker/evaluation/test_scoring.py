"""Scores of documents: equal to transformers' own loss, one document at a time, however they are batched."""

from __future__ import annotations

import math
import random

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from tributary_api.failures import Reason
from tributary_api.shared import ModelRef, TaskKind
from tributary_api.tasks import ScoredModel
from tributary_worker.compression.loading import load_model
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure
from tributary_worker.scoring import NonFiniteScoreError, model_score, score_documents

LM, CLASSES = TaskKind.CAUSAL_LM, TaskKind.SEQUENCE_CLASSIFICATION
TEXTS = [
    "a short one",
    "",
    "x",
    "Zwölf Boxkämpfer jagen Viktor",
    "two\nlines of text " * 9,
    "ab",
    "same",
    "same",
]
LENGTH = 40


def quiet(done, total):
    """Progress that nobody watches."""


def documents(texts=TEXTS, labels=None):
    labels = labels or [None] * len(texts)
    return [
        Document(f"{i:016x}", text, label) for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request, tmp_path_factory):
    model = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2}[request.param]()
    return tiny_models.save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(directory):
    return load_model(directory, LM)


def oracle(model, ids):
    """(loss, accuracy) of one text, without batch or padding, in float64."""
    ids = torch.tensor([ids])
    with torch.inference_mode():
        output = model(ids, labels=ids)
    return float(output.loss), float((output.logits[0, :-1].argmax(-1) == ids[0, 1:]).double().mean())


def test_scores_are_those_of_transformers(directory, loaded):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    found = score_documents(loaded, documents(), LM, LENGTH, quiet)
    assert [score.document for score in found] == [document.name for document in documents()]
    for text, score in zip(TEXTS, found, strict=True):
        ids = loaded.tokenizer(text).input_ids[:LENGTH]
        assert score.tokens == max(0, len(ids) - 1)
        if score.tokens:
            loss, accuracy = oracle(model, ids)
            assert score.loss == pytest.approx(loss, rel=1e-5)
            assert score.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize("tokens_in_a_batch", [1, 50, 10**6])
def test_batches_change_nothing(loaded, tokens_in_a_batch):
    expected = score_documents(loaded, documents(), LM, LENGTH, quiet)
    shuffled = documents()
    random.Random(0).shuffle(shuffled)
    again = score_documents(loaded, shuffled, LM, LENGTH, quiet, batch_tokens_max=tokens_in_a_batch)
    found = {score.document: score for score in again}
    for score in expected:
        assert found[score.document].tokens == score.tokens
        assert found[score.document].loss == pytest.approx(score.loss, rel=1e-5)


def test_no_document_is_longer_than_the_model(loaded):
    (score,) = score_documents(loaded, documents(["x" * 1000]), LM, 10**6, quiet)
    assert score.tokens == loaded.positions - 1


def test_progress_ends_at_the_total(loaded):
    seen = []
    score_documents(loaded, documents(), LM, LENGTH, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(TEXTS), len(TEXTS))


def test_a_model_with_nan_is_not_scored(tmp_path):
    model = tiny_models.llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    loaded = load_model(tiny_models.save(model, tmp_path), LM)
    with pytest.raises(NonFiniteScoreError, match=r"document 0000.* is nan"):
        score_documents(loaded, documents(), LM, LENGTH, quiet)


def test_classification_scores_the_label(tmp_path):
    loaded = load_model(tiny_models.save(tiny_models.llama_classifier(), tmp_path), CLASSES)
    texts, labels = ["one", "", "three of them"], [0, 1, 2]
    found = score_documents(loaded, documents(texts, labels), CLASSES, LENGTH, quiet)
    assert [score.tokens for score in found] == [1, 0, 1]
    for text, label, score in zip(texts, labels, found, strict=True):
        if text:
            logits = loaded.model(torch.tensor([loaded.tokenizer(text).input_ids])).logits[0]
            assert score.loss == pytest.approx(-float(logits.log_softmax(0)[label]), rel=1e-5)
            assert score.accuracy == float(logits.argmax() == label)


def test_an_unknown_class_is_refused(tmp_path):
    loaded = load_model(tiny_models.save(tiny_models.llama_classifier(), tmp_path), CLASSES)
    with pytest.raises(StageFailure, match="label 3, the model has 3 classes"):
        score_documents(loaded, documents(["text"], [3]), CLASSES, LENGTH, quiet)


BASELINE = ScoredModel(role="baseline", model=ModelRef(uri="s3://hub/models/0", digest="sha256:" + 64 * "0"))


def test_means_are_over_tokens(loaded):
    scores = score_documents(loaded, documents(), LM, LENGTH, quiet)
    total = model_score(BASELINE, scores)
    tokens = sum(score.tokens for score in scores)
    assert (total.tokens, total.documents) == (tokens, sum(score.tokens > 0 for score in scores))
    assert total.loss == pytest.approx(sum(score.loss * score.tokens for score in scores) / tokens)
    assert total.accuracy == pytest.approx(sum(s.accuracy * s.tokens for s in scores) / tokens)
    assert total.perplexity == pytest.approx(math.exp(total.loss))


def test_a_data_set_without_a_token_to_predict_is_refused(loaded):
    scores = score_documents(loaded, documents(["", "x"]), LM, LENGTH, quiet)
    with pytest.raises(StageFailure) as failure:
        model_score(BASELINE, scores)
    assert failure.value.reason is Reason.DATA_EMPTY
