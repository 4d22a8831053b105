"""The one model of a server, from loading to draining."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from http import HTTPStatus

import torch

from tributary_worker.compression.loading import LoadedModel
from tributary_worker.serving.cpus import usable_cpus
from tributary_worker.serving.generation import GenerationError, Piece, Sampling, generate
from tributary_worker.serving.generations import BusyError, Generations
from tributary_worker.serving.metrics import Metrics
from tributary_worker.serving.prompts import check_length, prompt_tokens
from tributary_worker.serving.protocol import ApiError, CompletionRequest

GENERATIONS_PARALLEL_MAX = 4
"""More at a time only share the same CPUs, and each holds a cache of keys and values."""
GENERATIONS_OPEN_MAX = 64
"""More would wait longer than a client does; they are told to come back (429)."""

WARM_UP = Sampling(tokens_max=8, temperature=0)
WARM_UP_PROMPT = "Hello"


def warm_up(loaded: LoadedModel) -> None:
    """One real generation, so that a ready server has answered before. Raises GenerationError."""
    pieces = list(generate(loaded, prompt_tokens(loaded, WARM_UP_PROMPT), WARM_UP))
    if not pieces or pieces[-1].finish is None:
        raise GenerationError("the model generated nothing")


@dataclass(slots=True)
class Service:
    """What the server serves, and whether it wants requests. It belongs to the event loop."""

    release: str
    revision: str
    sequence_max: int
    """Prompt and completion together, in tokens."""
    metrics: Metrics
    open_max: int = GENERATIONS_OPEN_MAX
    """Generations running or waiting; one more is refused."""
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    _loaded: LoadedModel | None = None
    _generations: Generations | None = None

    @classmethod
    def of(cls, release: str, revision: str, sequence_max: int) -> Service:
        return cls(release, revision, sequence_max, Metrics(release, revision))

    @property
    def identity(self) -> str:
        """What every response names: the release and its revision."""
        return f"{self.release}/{self.revision}"

    @property
    def is_ready(self) -> bool:
        return self._generations is not None and not self.is_draining

    def open(self, loaded: LoadedModel) -> None:
        """Begin to accept requests for a warm model."""
        cpus = usable_cpus()
        parallel = min(cpus, GENERATIONS_PARALLEL_MAX)
        torch.set_num_threads(max(1, cpus // parallel))
        self._loaded = loaded
        self._generations = Generations(loaded, parallel=parallel, open_max=self.open_max)
        self.metrics.open_generations.set_function(lambda: self._generations.open if self._generations else 0)
        self.metrics.ready.set_function(lambda: float(self.is_ready))

    def close(self) -> None:
        if self._generations is not None:
            self._generations.close()

    def start(self, request: CompletionRequest) -> tuple[int, AsyncGenerator[Piece, None]]:
        """(tokens of the prompt, pieces of the completion). Raises ApiError."""
        if self._loaded is None or self._generations is None:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the model is being loaded; try again in a moment")
        if request.model not in (None, self.release):
            message = f"there is no model {request.model!r} here, only {self.release!r}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
        prompt = prompt_tokens(self._loaded, request.prompt)
        check_length(len(prompt), request.max_tokens, min(self.sequence_max, self._loaded.positions))
        try:
            return len(prompt), self._generations.start(prompt, request.sampling())
        except BusyError as error:
            message = f"{self.open_max} requests are being answered; try again in a moment"
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="rate_limit_exceeded") from error
