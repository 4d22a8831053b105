"""What the training engine must do, as functions of how an engine is made: the honest tests call them with
the shipped engine, the seeded bugs with a defective one. Each raises AssertionError; some give a figure.

Sections 4.1 to 4.4 of the specification. All work on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import private_engines as engines
import tiny_models
import torch
import torch.distributed as dist
from privacy_proofs.statistics import ALPHA, is_uncorrelated
from scipy import stats
from torch.func import functional_call, grad, vmap
from torch.profiler import ProfilerActivity, profile

from tributary_worker import lora
from tributary_worker.objectives import IGNORED_LABEL, Batch, causal_lm
from tributary_worker.privacy.engine import PrivateEngine
from tributary_worker.privacy.errors import PrivacyError, UnsupportedError
from tributary_worker.privacy.noise import GaussianNoise

MakeEngine = Callable[..., PrivateEngine]
"""(model, **settings of `private_engines.engine`) -> engine"""

UNCLIPPED = engines.MECHANISM.model_copy(update={"max_grad_norm": 1e6})
BOOK_CASES = [(0, 3), (1, 1), (1, 3), (2, 1), (2, 3), (2, 8), (3, 3)]
"""(ZeRO stage, micro-batch size)"""
PAIRS, PAIR_RECORDS = 1000, 4
COORDINATES = 1_000_000
BROKEN_SCALES = (float("nan"), float("inf"), -float("inf"))


def trained(private: PrivateEngine) -> Any:
    """Names, parameters and number of all trained elements."""
    return private.trained


def models() -> dict[str, Any]:
    """Every shape that the engine covers, in the middle of a training: no trained factor is zero."""
    made = {
        "gpt2, tied head adapted": engines.adapted_gpt2(),
        "gpt2, tied head adapted, A trained": engines.adapted_gpt2(freeze_a=False),
        "llama": engines.adapted_llama(),
        "llama, A trained": engines.adapted_llama(freeze_a=False),
        "gpt2, all weights, tied": engines.full_gpt2(),
        "llama, all weights, tied": tiny_models.llama(width=16),
        "llama, all weights": tiny_models.llama(width=16, tied=False),
    }
    torch.manual_seed(1)
    for parameter in (p for model in made.values() for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def ragged(size: int) -> Batch:
    """Records of different lengths; the first has no token that counts, unless it is the only one."""
    ids = torch.randint(1, 257, (size, engines.LENGTH), generator=torch.Generator().manual_seed(size))
    lengths = torch.tensor([0, 2, 5, engines.LENGTH, 7])[:size] if size > 1 else torch.tensor([7])
    labels = torch.where(torch.arange(engines.LENGTH) < lengths[:, None], ids, IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def check_norms_per_record(make: MakeEngine) -> float:
    """4.1: what the engine takes as a record's gradient has the norm that vmap(grad) finds; gives the largest
    relative error."""
    errors = []
    for name, model in models().items():
        private = make(model, mechanism=UNCLIPPED, zero_stage=0)
        for size in (1, 5):
            found, expected = norms_found(private, ragged(size), size), norms_due(model, ragged(size))
            error = ((found - expected).abs() / expected.clamp(min=1e-3)).max()
            assert error <= 1e-5, f"{name}: norms {found.tolist()}, due are {expected.tolist()}"
            errors.append(float(error))
    return max(errors)


def norms_found(private: PrivateEngine, batch: Batch, size: int) -> torch.Tensor:
    """Norm of the sum over record i alone, which is not clipped."""
    alone = torch.eye(size)
    return torch.stack([private.clipped_sum(batch, weights).double().norm() for weights in alone])


def norms_due(model: Any, batch: Batch) -> torch.Tensor:
    """Norms by vmap(grad) of a functional call: another way through other code of torch."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        def call(attention_mask: Any = None, **inputs: Any) -> Any:
            return functional_call(model, parameters | frozen, (), inputs)

        one = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": labels[None]}
        return causal_lm(call, one)[0]

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(trained, batch["input_ids"], batch["labels"])
    return torch.stack([g.flatten(1).double().square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def check_step_by_the_book(make: MakeEngine) -> None:
    """4.3: the optimizers are handed (sum of clipped gradients) / qN plus the noise of the key, in every
    stage."""
    expected = [book_gradient(engines.data_set(), step) for step in (0, 1)]
    for stage, micro_batch_size in BOOK_CASES:
        private = make(engines.adapted_gpt2(), zero_stage=stage, micro_batch_size=micro_batch_size)
        for step, due in enumerate(expected):
            found = engines.received(private, engines.data_set(), step).double()
            error = float((found - due).norm() / due.norm())
            assert error <= 1e-5, f"stage {stage}, micro-batch {micro_batch_size}, step {step}: {error:g}"


def book_gradient(data: torch.Tensor, step: int) -> torch.Tensor:
    """Algorithm 1 of Abadi et al. 2016, one record at a time, without DeepSpeed and without our clipping."""
    shipped = engines.engine(engines.adapted_gpt2(), zero_stage=0)
    model, mechanism = engines.adapted_gpt2(), engines.MECHANISM
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(trained(shipped).numel, dtype=torch.float64)
    for index in shipped.sampler.records(step):
        gradients = torch.autograd.grad(causal_lm(model, engines.load(data, [int(index)])).sum(), parameters)
        flat = torch.cat([g.flatten() for g in gradients]).double()
        total += flat * min(1.0, mechanism.max_grad_norm / float(flat.norm()))
    std = mechanism.noise_multiplier * mechanism.max_grad_norm / mechanism.expected_batch_size
    return total / mechanism.expected_batch_size + torch.from_numpy(
        GaussianNoise(engines.NOISE_KEY, std).draw(step, 0, trained(shipped).numel)
    )


def check_sensitivity(make: MakeEngine) -> float:
    """4.2: emptying one record moves the sum by C at most, over random pairs of all scales, NaN and Inf;
    gives the largest movement over C."""
    return max(largest_movement(make(model(), zero_stage=0)) for model in engines.MODELS.values())


def largest_movement(private: PrivateEngine) -> float:
    """Of the sum by one record, over C."""
    generator, losses = np.random.default_rng(0), private.losses
    private.losses = lambda batch: losses(batch) * batch["scale"]
    limit, largest, everyone = private.mechanism.max_grad_norm, 0.0, torch.ones(PAIR_RECORDS)
    for _ in range(PAIRS // PAIR_RECORDS):
        batch = random_records(generator)
        whole = private.clipped_sum(batch, everyone).double()
        for record in range(PAIR_RECORDS):
            moved = whole - private.clipped_sum(emptied(batch, record), everyone).double()
            ratio = float(moved.norm()) / limit
            assert ratio <= 1 + 1e-6, (
                f"one record of scale {batch['scale'][record]:g} moved the sum by {ratio} C"
            )
            largest = max(largest, ratio)
    assert largest > 0.99, "no record was clipped: the pairs prove nothing"
    return largest


def random_records(generator: np.random.Generator) -> Batch:
    """Records with gradients of wildly different sizes, some of them broken."""
    ids = torch.from_numpy(generator.integers(1, 257, size=(PAIR_RECORDS, engines.LENGTH)))
    scale = torch.from_numpy(10.0 ** generator.uniform(-6, 6, size=PAIR_RECORDS)).float()
    broken = torch.from_numpy(generator.random(PAIR_RECORDS) < 0.2)
    scale = torch.where(broken, torch.tensor(generator.choice(BROKEN_SCALES)), scale)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "scale": scale}


def emptied(batch: Batch, record: int) -> Batch:
    """The neighbouring data set: the record's place stays and holds nothing."""
    other = {name: rows.clone() for name, rows in batch.items()}
    other["input_ids"][record], other["labels"][record], other["scale"][record] = 0, IGNORED_LABEL, 1.0
    return other


def check_same_work(make: MakeEngine) -> None:
    """4.2: the very same operations on the same shapes, collectives among them, whatever is in the records
    and however many were drawn."""
    due = trace_of(make, 1.0, max)
    assert any("reduce" in name for name, _ in due), "no collective was seen: the trace proves nothing"
    for case, scale, which in (
        ("a step with few records", 1.0, min),
        ("a record that is not a number", float("nan"), max),
        ("an emptied record", 0.0, max),
    ):
        trace = trace_of(make, scale, which)
        assert trace == due, f"{case}: {len(trace)} operations instead of {len(due)}, or other shapes"


def trace_of(make: MakeEngine, scale: float, which: Callable[..., int]) -> list[tuple[str, str]]:
    """Operations of the step with the fewest or the most records, one of which has its loss times `scale`."""
    private = make(engines.adapted_gpt2(), zero_stage=2)
    losses = private.losses
    private.losses = lambda batch: losses(batch) * batch["scale"]
    step = which(range(1, 10), key=lambda step: len(private.sampler.records(step)))
    factors = torch.ones(engines.NUM_EXAMPLES)
    factors[private.sampler.records(step)[0]] = scale

    def load(indices: Any) -> Batch:
        rows = list(indices)
        return dict(engines.load(engines.data_set(), rows)) | {"scale": factors[rows]}

    # The first step also makes the optimizer's state.
    private.train_step(0, load)
    return operations(lambda: private.train_step(step, load))


def operations(work: Callable[[], None]) -> list[tuple[str, str]]:
    """(name, shapes) of every operation of torch, in order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        work()
    return [(event.name, str(event.input_shapes)) for event in trace.events()]


def check_coverage(make: MakeEngine) -> None:
    """3: a trainable parameter of a layer without a gradient per record is refused by its name, never left
    out."""
    model = engines.adapted_gpt2()
    model.unsupported = torch.nn.PReLU()
    refusal = ""
    try:
        make(model)
    except (PrivacyError, UnsupportedError) as error:
        refusal = str(error)
    assert "unsupported" in refusal, "a model with a layer that is not covered was taken"


def check_noise_at_the_optimizer(make: MakeEngine) -> float:
    """4.4: on zero data the optimizers are handed Gaussian noise of std sigma C / qN, never twice the same;
    gives the relative error of the std over a million coordinates."""
    private = make(wide_model())
    steps = -(-COORDINATES // trained(private).numel)
    std = private.mechanism.noise_multiplier * private.mechanism.max_grad_norm
    std /= private.mechanism.expected_batch_size
    noise = np.stack([handed_over(private, step) for step in range(steps)]) / std
    error = abs(float(noise.std()) - 1.0)
    assert error <= 0.005, f"the standard deviation is {noise.std():.4f} times the one that is due"
    half = noise.shape[1] // 2
    assert is_uncorrelated(noise[1:], noise[:-1]), "the noise of a step is that of the one before"
    assert is_uncorrelated(noise[:, :half], noise[:, half : 2 * half]), (
        "parts of the weights share their noise"
    )
    assert is_uncorrelated(noise[:, 1:], noise[:, :-1]), "neighbouring weights share their noise"
    assert stats.kstest(noise.ravel(), "norm").pvalue > ALPHA, "the noise is not Gaussian"
    assert len(np.unique(noise)) > 0.6 * noise.size, "the noise is drawn in too low a precision"
    return error


def wide_model() -> Any:
    """Some 22 thousand trained elements, so that a million coordinates take few steps."""
    model = tiny_models.gpt2(width=16)
    lora.add_adapters(model, lora.LoraSettings(64, 64.0, True, engines.ODD_TARGETS), seed="a round")
    return model


def handed_over(private: PrivateEngine, step: int) -> np.ndarray:
    """The whole gradient that the optimizers of all ranks are handed when no record has one, by place."""
    mine = private.record(torch.zeros(trained(private).numel), step)
    whole, owners = torch.zeros(trained(private).numel), torch.zeros(trained(private).numel)
    for run in private.optimizer.layout:
        whole[run.offset : run.offset + run.length] = mine[run.local : run.local + run.length]
        owners[run.offset : run.offset + run.length] = 1
    dist.all_reduce(whole)
    dist.all_reduce(owners)
    return (whole / owners).double().numpy()


def check_noise_lies_on_a_grid(make: MakeEngine) -> None:
    """4.4: what the optimizer is handed is a multiple of a power of two that does not depend on the data, so
    that the low bits of a floating-point number tell nothing (Mironov 2012)."""
    private = make(engines.adapted_gpt2())
    grid = GaussianNoise(engines.NOISE_KEY, private.noise_std).grid
    places = engines.received(private, engines.data_set(), 0).double().numpy() / grid
    assert np.array_equal(places, np.round(places)), "the noised gradient keeps low bits of the private one"
