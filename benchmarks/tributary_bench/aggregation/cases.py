"""What is measured: models, numbers of clients, strategies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tributary_api.aggregation import DeltaEncoding, StrategyName

VOCABULARY = 50257
POSITIONS = 1024

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model shaped like GPT-2. `distinct_deltas` objects are shared by all clients; 0: the base's own."""

    name: str
    layers: int
    width: int
    distinct_deltas: int

    @property
    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every weight, in the order of a file; the output layer is tied."""
        return dict(sorted(self._tensors()))

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors.values())

    def _tensors(self) -> Iterator[tuple[str, Shape]]:
        width = self.width
        yield "transformer.wte.weight", (VOCABULARY, width)
        yield "transformer.wpe.weight", (POSITIONS, width)
        for layer in range(self.layers):
            block = f"transformer.h.{layer}"
            yield from _with_bias(f"{block}.ln_1", (width,))
            yield from _with_bias(f"{block}.attn.c_attn", (width, 3 * width))
            yield from _with_bias(f"{block}.attn.c_proj", (width, width))
            yield from _with_bias(f"{block}.ln_2", (width,))
            yield from _with_bias(f"{block}.mlp.c_fc", (width, 4 * width))
            yield from _with_bias(f"{block}.mlp.c_proj", (4 * width, width))
        yield from _with_bias("transformer.ln_f", (width,))


TINY = ModelShape("16 M", layers=4, width=256, distinct_deltas=4)
SMALL = ModelShape("124 M", layers=12, width=768, distinct_deltas=4)
MEDIUM = ModelShape("355 M", layers=24, width=1024, distinct_deltas=2)
LARGE = ModelShape("5 GB", layers=42, width=1536, distinct_deltas=0)


@dataclass(frozen=True, slots=True)
class Case:
    """An aggregation. FedAvg of fp32 deltas is compared with Flower, everything else with that."""

    model: ModelShape
    clients: int
    strategy: StrategyName = StrategyName.FED_AVG
    byzantine_clients: int | None = None
    encoding: DeltaEncoding = DeltaEncoding.FLOAT32
    repeats: int = 3

    @property
    def label(self) -> str:
        return f"{self.clients} × {self.model.name} {self.strategy} {self.encoding}"

    @property
    def settings(self) -> dict[str, object]:
        """The round's `aggregation`."""
        given = {"strategy": self.strategy, "byzantineClients": self.byzantine_clients}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def is_plain(self) -> bool:
        return self.strategy is StrategyName.FED_AVG and self.encoding is DeltaEncoding.FLOAT32


CASES: dict[str, tuple[Case, ...]] = {
    "small": (Case(TINY, 4, repeats=1), Case(TINY, 4, encoding=DeltaEncoding.INT8, repeats=1)),
    "124m": tuple(Case(SMALL, clients) for clients in (4, 8, 16)),
    "355m": (Case(MEDIUM, 8, repeats=2),),
    "5gb": tuple(Case(LARGE, clients, repeats=1) for clients in (4, 8, 12, 16)),
    "strategies": (
        Case(SMALL, 8, StrategyName.MEDIAN),
        Case(SMALL, 8, StrategyName.TRIMMED_MEAN, byzantine_clients=2),
        Case(SMALL, 8, encoding=DeltaEncoding.INT8),
    ),
}
ALL = ("124m", "strategies", "355m", "5gb")


def chosen(names: str) -> list[Case]:
    """The cases of a list such as `124m,5gb-4` (the one with 4 clients); `all` for every one.

    Raises ValueError with what there is.
    """
    wanted = list(ALL) if names == "all" else names.replace(",", " ").split()
    found = {name: _named(name) for name in wanted}
    unknown = sorted(name for name, cases in found.items() if not cases)
    if unknown or not wanted:
        raise ValueError(f"no cases {', '.join(unknown)}: choose all or some of {', '.join(CASES)}")
    return [case for name in wanted for case in found[name]]


def _named(name: str) -> list[Case]:
    group, _, clients = name.partition("-")
    return [case for case in CASES.get(group, ()) if clients in ("", str(case.clients))]


def _with_bias(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[-1:]
