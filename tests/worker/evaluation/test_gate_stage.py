"""The gate against a store: each verdict, written once, and repeatable from what it holds."""

from __future__ import annotations

import json

import pytest
import structlog
import tiny_models
import torch
from memory_store import MemoryStore
from safetensors.torch import load_file, save_file

from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.records import DocumentScore, GateVerdict
from tributary_api.release import Gate, GateMetric
from tributary_api.shared import DatasetRef, ModelRef, StoreEndpoint, TaskKind
from tributary_api.tasks import GateTask, ScoredModel
from tributary_store import bundle
from tributary_worker.compression.quantize import quantize_directory
from tributary_worker.failures import StageFailure
from tributary_worker.gate import gate
from tributary_worker.gating.judging import Scored, judge

DATASET, VERDICT = "s3://hub/datasets/public.jsonl", "s3://hub/gates/key.json"
WORDS = ["the quick brown fox", "jumps", "over the lazy dog", "and runs away", "from it all", "fin."]
TEXTS = ["", "x", *(f"{one}, then {two}" for one in WORDS for two in WORDS if one != two)]
PAIRS = len(WORDS) * (len(WORDS) - 1)
"""Documents with something to predict: neither the empty one nor that of one token."""
LOG = structlog.get_logger()
A_MODEL = ModelRef(uri="s3://hub/models/0", digest="sha256:" + 64 * "0")


@pytest.fixture
def store():
    store = MemoryStore()
    store.put_new(DATASET, lines(TEXTS))
    return store


def lines(texts):
    return b"\n".join(json.dumps({"text": text}).encode() for text in texts)


@pytest.fixture
def push(store, tmp_path):
    def push(model, name):
        return bundle.push(store, tiny_models.save(model, tmp_path / name), "s3://hub/models/")

    return push


def int8_of(store, tmp_path, name):
    target = tmp_path / f"{name}-int8"
    target.mkdir()
    quantize_directory(tmp_path / name, target)
    return bundle.push(store, target, "s3://hub/releases/")


def a_gate(margin="0.05", data=None, **fields):
    return Gate(
        dataset=DatasetRef(uri=DATASET, digest=sha256_of(data or lines(TEXTS))),
        metrics=[GateMetric(margin=margin)],
        **fields,
    )


def a_task(candidate, parent, stable=None, *, stable_parent=None, best=None, **fields):
    return GateTask(
        task=TaskKind.CAUSAL_LM,
        candidate=candidate,
        parent=parent,
        stable=stable,
        stable_parent=stable_parent,
        best=best,
        gate=a_gate(**fields),
        store=StoreEndpoint(),
        verdict_uri=VERDICT,
    )


def test_an_int8_model_is_no_worse_than_its_parent(store, push, tmp_path):
    parent = push(tiny_models.llama(), "parent")
    candidate = int8_of(store, tmp_path, "parent")
    verdict = gate(store, a_task(candidate, parent), LOG)
    assert (verdict.verdict, verdict.reason) == ("PASS", "NoWorse")
    (comparison,) = verdict.comparisons
    assert (comparison.against, comparison.model, comparison.finding) == ("parent", parent, "PASS")
    assert comparison.documents <= verdict.documents_planned == PAIRS
    assert comparison.mean_difference < comparison.upper_bound < 0.05
    assert comparison.mean_difference != 0
    assert [score.role for score in verdict.scores] == ["candidate", "parent"]
    assert verdict == GateVerdict.model_validate_json(store.get(VERDICT))


def worse(model, noise=0.2):
    """A model whose head prefers the same wrong tokens everywhere."""
    generator = torch.Generator().manual_seed(1)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight += noise * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("rival", ["stable", "best"])
def test_a_worse_model_fails_by_the_comparison_that_it_fails(store, push, rival):
    good = push(tiny_models.llama(), "good")
    bad = push(worse(tiny_models.llama(tied=False), 0.03), "bad")
    verdict = gate(store, a_task(bad, bad, **{rival: good}, margin="0.001"), LOG)
    assert (verdict.verdict, verdict.reason) == ("FAIL", "Worse")
    assert f"against the {rival} model" in verdict.message
    parent, other = verdict.comparisons
    assert [parent.against, other.against] == ["parent", rival]
    assert parent.mean_difference == parent.upper_bound == 0
    assert other.mean_difference > 0.001


def with_losses(role, losses):
    scores = [DocumentScore(document=f"{i}", tokens=9, loss=x, accuracy=0) for i, x in enumerate(losses)]
    return Scored(ScoredModel(role=role, model=A_MODEL), scores)


SAME, WORSE, BETTER = [0.0, 0.01, -0.01], [1.0, 1.1, 1.2], [-1.0, -1.1, -1.2]
UNCLEAR = [0.5, -0.5, 0.1]


@pytest.mark.parametrize(
    ("parent", "stable", "best", "verdict", "against"),
    [
        (SAME, SAME, SAME, "PASS", None),
        (BETTER, BETTER, BETTER, "PASS", None),
        (SAME, WORSE, SAME, "FAIL", "stable"),
        (WORSE, SAME, SAME, "FAIL", "parent"),
        (SAME, SAME, WORSE, "FAIL", "best"),
        (SAME, UNCLEAR, SAME, "INCONCLUSIVE", "stable"),
        (UNCLEAR, WORSE, SAME, "FAIL", "stable"),
    ],
)
def test_the_worst_comparison_decides(parent, stable, best, verdict, against):
    """`parent`, `stable` and `best`: by how much the candidate's losses lie above theirs."""
    losses = [2.0, 3.0, 4.0] * 10
    candidate = with_losses("candidate", losses)
    others = [
        with_losses(role, [x - d for x, d in zip(losses, differences * 10, strict=True)])
        for role, differences in (("parent", parent), ("stable", stable), ("best", best))
    ]
    found = judge(a_gate(), len(losses), candidate, others)
    reasons = {"PASS": "NoWorse", "FAIL": "Worse", "INCONCLUSIVE": "TooFewDocuments"}
    assert (found.verdict, found.reason) == (verdict, reasons[verdict])
    assert against is None or f"against the {against} model" in found.message


def test_an_inconclusive_verdict_says_how_many_documents_would_tell():
    losses = [1.0] * 30
    other = with_losses("parent", [1.0 + 0.1 * (-1) ** i for i in range(30)])
    found = judge(a_gate(margin="0.02"), 30, with_losses("candidate", losses), [other])
    wanted = int(found.message.split("about ")[1].split()[0])
    assert wanted == pytest.approx((1.645 + 1.282) ** 2 * (0.1 / 0.02) ** 2, rel=0.25)


def test_the_test_stops_as_soon_as_it_is_sure(store, push):
    one, two = push(tiny_models.llama(), "one"), push(tiny_models.llama(), "two")
    model = push(worse(tiny_models.llama(tied=False), 0.001), "three")
    store.objects[DATASET] = lines(many := [f"{text} {i}" for text in TEXTS for i in range(5)])
    verdict = gate(store, a_task(model, one, two, data=lines(many), margin="0.5"), LOG)
    assert verdict.verdict == "PASS"
    assert {c.documents for c in verdict.comparisons} == {len(many) // 4}
    assert {len(found) for found in verdict.per_document.values()} == {len(many) // 4}


def scored(verdict, role, model):
    return Scored(ScoredModel(role=role, model=model), verdict.per_document[role])


def test_anybody_can_repeat_the_test(store, push):
    one, two = push(tiny_models.llama(), "one"), push(tiny_models.llama(seed=1), "two")
    task = a_task(one, one, two)
    verdict = gate(store, task, LOG)
    roles = [score.role for score in verdict.scores]
    candidate, *others = [scored(verdict, r, s.model) for r, s in zip(roles, verdict.scores, strict=True)]
    again = judge(task.gate, verdict.documents_planned, candidate, others)
    assert again == verdict.model_copy(update={"fidelity": None, "answers": []})


def test_a_document_that_is_repeated_counts_once(store, push):
    model = push(tiny_models.llama(), "model")
    store.objects[DATASET] = lines(TEXTS * 3)
    assert gate(store, a_task(model, model, data=lines(TEXTS * 3)), LOG).documents_planned == PAIRS


def with_nan(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})


def without_a_layer(directory):
    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1" not in k}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"), [(with_nan, "not finite"), (without_a_layer, "missing keys")], ids=["nan", "in-part"]
)
def test_a_broken_candidate_fails(store, push, tmp_path, spoil, words):
    parent = push(tiny_models.llama(), "parent")
    tiny_models.save(tiny_models.llama(), tmp_path / "broken")
    spoil(tmp_path / "broken")
    candidate = bundle.push(store, tmp_path / "broken", "s3://hub/models/")
    verdict = gate(store, a_task(candidate, parent), LOG)
    assert (verdict.verdict, verdict.reason) == ("FAIL", "CandidateBroken")
    assert words in verdict.message


def test_a_broken_parent_is_a_failure_of_the_stage(store, push):
    broken = tiny_models.llama()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(StageFailure, match="the parent model s3://hub/models/") as failure:
        gate(store, a_task(push(tiny_models.llama(), "good"), push(broken, "broken")), LOG)
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED
    assert VERDICT not in store.objects


def test_a_missing_candidate_is_a_failure_of_the_stage(store, push):
    gone = ModelRef(uri="s3://hub/releases/gone", digest="sha256:" + 64 * "0")
    with pytest.raises(StageFailure) as failure:
        gate(store, a_task(gone, push(tiny_models.llama(), "parent")), LOG)
    assert failure.value.reason is Reason.MODEL_MISSING


def test_models_with_other_tokens_are_not_compared(store, push, tmp_path):
    one = push(tiny_models.llama(), "one")
    directory = tiny_models.save(tiny_models.llama(vocab_size=258), tmp_path / "two")
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(directory)
    two = bundle.push(store, directory, "s3://hub/models/")
    verdict = gate(store, a_task(one, one, two), LOG)
    assert (verdict.verdict, verdict.reason, verdict.comparisons) == ("INCONCLUSIVE", "NotComparable", [])


def test_too_few_documents_are_refused(store, push):
    store.objects[DATASET] = lines(few := TEXTS[:21])
    model = push(tiny_models.llama(), "model")
    with pytest.raises(StageFailure, match=r"has 19 different documents .* at least 20: add") as failure:
        gate(store, a_task(model, model, data=lines(few)), LOG)
    assert failure.value.reason is Reason.DATA_TOO_SMALL
    assert VERDICT not in store.objects


def test_a_second_attempt_finds_the_verdict(store, push):
    model = push(tiny_models.llama(), "model")
    task = a_task(model, model)
    verdict = gate(store, task, LOG)
    assert verdict.verdict == "PASS"
    for uri in [uri for uri in store.objects if uri.startswith("s3://hub/models/")]:
        del store.objects[uri]
    assert gate(store, task, LOG) == verdict
