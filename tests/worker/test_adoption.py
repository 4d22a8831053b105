"""A delta in the way is adopted if it is ours but for rounding, in every encoding, and not otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from tributary_api.aggregation import DeltaEncoding
from tributary_worker.adoption import is_ours
from tributary_worker.delta_file import write_delta
from tributary_worker.privacy.keystream import Keystream

SHAPES = {f"layers.{i}": (33, 4 + i) for i in range(14)}


@pytest.fixture(params=list(DeltaEncoding))
def written(request, tmp_path):
    """Writes tensors in one encoding, as any attempt of this owner does."""

    def write(name, tensors):
        path = tmp_path / name
        write_delta(path, tensors, {}, request.param, Keystream(bytes(32)))
        return path

    return write


def noise(seed):
    random = np.random.default_rng(seed)
    return {name: (0.03 * random.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def test_other_rounding_is_ours(written):
    random = np.random.default_rng(9)
    ours = noise(0)
    moved = {n: v * (1 + 1e-5 * random.standard_normal(v.shape)).astype(np.float32) for n, v in ours.items()}
    assert is_ours(written("a", ours), written("b", moved))


def test_other_noise_or_none_is_not(written):
    own = written("a", noise(0))
    assert not is_ours(own, written("b", noise(1)))
    assert not is_ours(own, written("c", {n: np.zeros_like(v) for n, v in noise(0).items()}))
    doubled = {n: 2 * v for n, v in noise(0).items()}
    assert not is_ours(own, written("d", doubled))


def test_other_tensors_are_not(written):
    ours = noise(0)
    own = written("a", ours)
    renamed = {f"x{n}": v for n, v in ours.items()}
    assert not is_ours(own, written("b", renamed))
    assert not is_ours(own, written("c", {n: v for n, v in ours.items() if n != "layers.3"}))
    broken = own.with_name("d")
    broken.write_bytes(own.read_bytes()[:-4])
    assert not is_ours(own, broken)
    broken.write_bytes(b"no safetensors")
    assert not is_ours(own, broken)
