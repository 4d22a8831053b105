"""Candidates that load and are wrong: each is stopped before it serves, and the verdict says why."""

from __future__ import annotations

import json

import pytest
import structlog
import tiny_models
import torch
from memory_store import MemoryStore
from safetensors.torch import load_file, save_file

from tributary_api.base import sha256_of
from tributary_api.release import Fidelity, Gate, GateMetric, GoldenPrompt
from tributary_api.shared import DatasetRef, StoreEndpoint, TaskKind
from tributary_api.tasks import GateTask
from tributary_store import bundle
from tributary_worker.compression.quantize import quantize_directory
from tributary_worker.gate import gate
from tributary_worker.gating.integrity import is_degenerate

WORDS = ["the quick brown fox", "jumps", "over the lazy dog", "and runs away", "from it all", "fin."]
TEXTS = [f"{one}, then {two}" for one in WORDS for two in WORDS if one != two]
DATA = b"\n".join(json.dumps({"text": text}).encode() for text in TEXTS)
DATASET, MODELS = "s3://hub/datasets/public.jsonl", "s3://hub/models/"
LOG = structlog.get_logger()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Two models of one family, as of two rounds: the later one knows more."""
    folder = tmp_path_factory.mktemp("taught")
    early = tiny_models.taught(tiny_models.llama(tied=False), TEXTS, 40)
    tiny_models.save(early, folder / "early")
    tiny_models.save(tiny_models.taught(early, TEXTS, 20), folder / "late")
    for name in ("early", "late"):
        (folder / f"{name}-int8").mkdir()
        quantize_directory(folder / name, folder / f"{name}-int8")
    return folder


@pytest.fixture
def store():
    store = MemoryStore()
    store.put_new(DATASET, DATA)
    return store


@pytest.fixture
def judged(store, taught):
    """The verdict about a directory as a candidate made from the late model."""

    def judged(directory, *, parent=None, stable=None, **fields):
        refs = {name: bundle.push(store, taught / name, MODELS) for name in ("early", "early-int8", "late")}
        digest = sha256_of(DATA)
        task = GateTask(
            task=TaskKind.CAUSAL_LM,
            candidate=bundle.push(store, directory, MODELS),
            parent=bundle.push(store, parent, MODELS) if parent else refs["late"],
            stable=refs["early-int8"] if stable else None,
            stable_parent=refs["early"] if stable else None,
            gate=Gate(
                dataset=DatasetRef(uri=DATASET, digest=digest), metrics=[GateMetric(margin="0.05")], **fields
            ),
            store=StoreEndpoint(),
            verdict_uri="s3://hub/gates/key.json",
        )
        return gate(store, task, LOG)

    return judged


def copied(taught, name, target):
    target.mkdir()
    for file in (taught / name).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def changed(directory, change):
    """The directory with other weights."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return directory


def test_a_good_candidate_passes(judged, taught):
    verdict = judged(taught / "late-int8", stable=True)
    assert (verdict.verdict, verdict.reason) == ("PASS", "NoWorse")
    assert verdict.fidelity.kl < 0.01
    assert verdict.fidelity.previous_kl > 2 * verdict.fidelity.kl
    assert verdict.answers


@pytest.mark.parametrize("factor", [0.0, 1e4, float("nan")])
def test_a_corrupted_scale(judged, taught, tmp_path, factor):
    def change(tensors):
        tensors["model.layers.0.mlp.down_proj.weight_scale"].mul_(factor)

    verdict = judged(changed(copied(taught, "late-int8", tmp_path / "bad"), change))
    assert verdict.verdict == "FAIL"
    assert verdict.reason in {"Worse", "Nonsense", "DegenerateOutput", "CandidateBroken"}
    assert verdict.message


def test_stale_weights_under_a_new_name(judged, taught):
    verdict = judged(taught / "early-int8", stable=True)
    assert (verdict.verdict, verdict.reason) == ("FAIL", "StaleWeights")
    assert "old weights under a new name" in verdict.message


def test_a_model_that_answers_nonsense(judged, taught, tmp_path):
    """Its own parent, so that no comparison can tell: the head's rows belong to other tokens."""

    def change(tensors):
        tensors["lm_head.weight"] = 3 * tensors["lm_head.weight"].roll(7, 0)

    bad = changed(copied(taught, "late", tmp_path / "bad"), change)
    verdict = judged(bad, parent=bad)
    assert (verdict.verdict, verdict.reason) == ("FAIL", "Nonsense")
    assert "worse than guessing among 257" in verdict.message


def test_garbage_output(judged, taught, tmp_path):
    """One token outshines all others everywhere."""

    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 0
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0

    verdict = judged(changed(copied(taught, "late", tmp_path / "bad"), change))
    assert (verdict.verdict, verdict.reason) == ("FAIL", "DegenerateOutput")
    assert any(answer.is_degenerate for answer in verdict.answers)


def test_a_wrong_tokenizer(judged, taught, tmp_path):
    """The same number of tokens for every text, but other ones."""
    bad = copied(taught, "late-int8", tmp_path / "bad")
    tokenizer = json.loads((bad / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["t"], vocabulary["e"] = vocabulary["e"], vocabulary["t"]
    (bad / "tokenizer.json").write_text(json.dumps(tokenizer))
    verdict = judged(bad)
    assert (verdict.verdict, verdict.reason) == ("FAIL", "WrongTokenizer")


def test_a_golden_prompt_with_another_answer(judged, taught):
    asked = [
        GoldenPrompt(prompt="the quick brown", contains="fox"),
        GoldenPrompt(prompt="jumps", contains="!?"),
    ]
    verdict = judged(taught / "late-int8", golden_prompts=asked)
    assert (verdict.verdict, verdict.reason) == ("FAIL", "WrongAnswer")
    assert "jumps" in verdict.message
    assert "fox" in verdict.answers[0].answer


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"max_weight_bytes": 1000}, "TooLarge", "more than gate.maxWeightBytes 1000"),
        ({"fidelity": Fidelity(max_kl="1e-9")}, "UnlikeParent", "gate.fidelity.maxKl 1e-9"),
    ],
)
def test_limits_of_the_spec(judged, taught, fields, reason, words):
    verdict = judged(taught / "late-int8", **fields)
    assert (verdict.verdict, verdict.reason) == ("FAIL", reason)
    assert words in verdict.message


def test_flips_are_counted(judged, taught):
    verdict = judged(taught / "early", fidelity=Fidelity(max_flips="0.001"))
    assert (verdict.verdict, verdict.reason) == ("FAIL", "UnlikeParent")
    assert verdict.fidelity.flips > 0.001


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], True),
        (["  ", "\n"], True),
        (["a"] * 9, True),
        (["a", "b", "a", "b", "a", "b"], False),
        (["yes"], False),
        (list("hello world"), False),
    ],
)
def test_degenerate_answers(pieces, expected):
    assert is_degenerate(pieces) == expected


def test_the_models_are_what_the_tests_say(taught):
    """An oracle of the fixture itself: the later model knows more, and both know something."""
    tokenizer = tiny_models.byte_tokenizer()
    losses = []
    for name in ("early", "late"):
        model = tiny_models.LlamaForCausalLM.from_pretrained(taught / name)
        batch = tokenizer(TEXTS[0], return_tensors="pt")
        with torch.no_grad():
            losses.append(float(model(**batch, labels=batch.input_ids).loss))
    assert losses[1] < losses[0] < 4
