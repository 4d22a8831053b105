"""Distillation: the divergences against torch's own, and a pruned student that gets nearer to its teacher."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tributary_api.release import Distill, Divergence, Prune
from tributary_api.shared import TaskKind
from tributary_worker.compression.distill import distill_directory, distillation_loss, divergence, pace
from tributary_worker.compression.loading import load_model
from tributary_worker.compression.prune import prune_directory
from tributary_worker.compression.texts import sampled_texts
from tributary_worker.documents import Document
from tributary_worker.failures import StageFailure

LM = TaskKind.CAUSAL_LM
TEXTS = [f"the {one} fox and the {two} dog" for one in ("quick", "brown") for two in ("lazy", "old", "red")]
DOCUMENTS = [Document(f"{i}", text) for i, text in enumerate(TEXTS)]


def quiet(_done, _total):
    pass


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 7, generator=generator).double().log_softmax(-1) for _ in range(2)]


def kl(p, q):
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@given(st.integers(0, 1000), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_divergences_are_those_of_torch(seed, beta):
    p, q = rows(seed)
    mixture = (beta * p.exp() + (1 - beta) * q.exp()).log()
    expected = {
        Divergence.FORWARD: kl(p, q),
        Divergence.REVERSE: kl(q, p),
        Divergence.JENSEN_SHANNON: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
    }
    for kind, values in expected.items():
        step = Distill(steps=1, divergence=kind, beta=f"{beta:.12f}")
        assert torch.allclose(divergence(p, q, step), values, atol=1e-9)
        assert torch.allclose(divergence(p, p, step), torch.zeros(5).double(), atol=1e-12)


def test_alpha_0_is_the_texts_own_loss_and_padding_counts_nothing():
    teacher, student = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    own = F.cross_entropy(student.transpose(1, 2), targets, ignore_index=-100)
    assert torch.allclose(distillation_loss(teacher, student, targets, Distill(steps=1, alpha="0")), own)
    teacher[1, 2:] = 1e3
    whole = distillation_loss(teacher, student, targets, Distill(steps=1))
    cut = torch.cat(
        [
            kl(t.log_softmax(-1), s.log_softmax(-1))
            for t, s in ((teacher[0], student[0]), (teacher[1, :2], student[1, :2]))
        ]
    ).mean()
    assert torch.allclose(whole, cut)


def test_the_learning_rate_rises_and_falls():
    paces = [pace(n, 50) for n in range(50)]
    assert max(paces) == 1
    assert paces.index(1) in range(1, 6)
    assert paces[-1] < 0.01


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A teacher that knows something, and its pruned student."""
    folder = tmp_path_factory.mktemp("family")
    tiny_models.save(tiny_models.taught(tiny_models.llama(), TEXTS), folder / "teacher")
    (folder / "student").mkdir()
    prune_directory(folder / "teacher", folder / "student", Prune(depth_fraction="0.5"), LM, DOCUMENTS)
    return folder


def apart(directory, teacher):
    """Mean KL(teacher, student) over the texts, in nats per token."""
    models = [load_model(d, LM) for d in (teacher, directory)]
    values = []
    with torch.no_grad():
        for text in TEXTS:
            ids = models[0].tokenizer(text, return_tensors="pt").input_ids
            values.append(kl(*(m.model(ids).logits[0].log_softmax(-1) for m in models)))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize(("kind", "part"), zip(Divergence, ["0", "1", "0.5"], strict=True))
def test_the_student_gets_nearer_to_its_teacher(family, tmp_path, kind, part):
    """On public text alone, on what the teacher writes alone, and on both."""
    step = Distill(
        steps=25, batch_size=8, learning_rate="1e-3", max_sequence_length=32, divergence=kind,
        sampled_fraction=part, sampled_texts=32,
    )  # fmt: skip
    distill_directory(
        family / "student", tmp_path, step, teacher=family / "teacher", documents=DOCUMENTS, report=quiet
    )
    assert apart(tmp_path, family / "teacher") < 0.7 * apart(family / "student", family / "teacher")


def test_equal_inputs_give_equal_bytes(family, tmp_path):
    step = Distill(steps=3, batch_size=4, max_sequence_length=16, sampled_texts=8)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        distill_directory(
            family / "student", tmp_path / name, step,
            teacher=family / "teacher", documents=DOCUMENTS, report=quiet,
        )  # fmt: skip
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_sampled_texts_are_distributed_as_the_model_says(family):
    loaded = load_model(family / "teacher", LM)
    texts = sampled_texts(loaded, 600, 2, seed=0)
    with torch.no_grad():
        chances = loaded.model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    token = int(chances.argmax())
    share = sum(text[1] == token for text in texts) / len(texts)
    spread = float((chances[token] * (1 - chances[token]) / len(texts)).sqrt())
    assert abs(share - float(chances[token])) < 5 * spread


def test_a_dataset_without_text_is_refused(family, tmp_path):
    with pytest.raises(StageFailure, match=r"distill\.dataset"):
        distill_directory(
            family / "student",
            tmp_path,
            Distill(steps=1),
            teacher=family / "teacher",
            documents=[],
            report=quiet,
        )
