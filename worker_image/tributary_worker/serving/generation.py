"""Generation of one completion, token by token, with the keys and values of earlier tokens kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tributary_worker.compression.loading import LoadedModel
from tributary_worker.serving.text import Detokenizer, StopFilter

FinishReason = Literal["stop", "length"]


class GenerationError(Exception):
    """The model gave no usable answer."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. Temperature 0 takes the likeliest; `seed` None draws a fresh one."""

    tokens_max: int
    temperature: float = 1.0
    top_p: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to append. The last piece of a completion has `finish`; `tokens` counts those generated so far."""

    text: str
    tokens: int
    finish: FinishReason | None = None


def generate(
    loaded: LoadedModel,
    prompt: Sequence[int],
    sampling: Sampling,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """The pieces of one completion of a prompt of at least one token; fewer if it is cancelled.

    Raises GenerationError if the model's answer is not finite.
    """
    detokenizer, stops, ends = Detokenizer(loaded.tokenizer), StopFilter(sampling.stops), end_tokens(loaded)
    for count, token in enumerate(_tokens(loaded, prompt, sampling), start=1):
        if is_cancelled():
            return
        if token in ends:
            yield Piece(_rest(detokenizer, stops), count, "stop")
            return
        text = stops.push(detokenizer.push(token))
        if stops.is_stopped:
            yield Piece(text, count, "stop")
            return
        if count == sampling.tokens_max:
            rest = _rest(detokenizer, stops)
            yield Piece(text + rest, count, "stop" if stops.is_stopped else "length")
            return
        yield Piece(text, count)


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The tokens after which the model says no more."""
    declared = loaded.model.generation_config.eos_token_id
    ends = declared if isinstance(declared, list) else [declared, loaded.tokenizer.eos_token_id]
    return frozenset(int(token) for token in ends if token is not None)


def choose(logits: Tensor, sampling: Sampling, randomness: torch.Generator) -> int:
    """A token by its logits (vocabulary,), by nucleus sampling (Holtzman et al. 2020, section 3.1)."""
    if not bool(torch.isfinite(logits).all()):
        raise GenerationError("the model's answer is not finite")
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Subtracting the largest first keeps tiny temperatures from overflowing.
    ordered, tokens = ((logits - logits.max()) / sampling.temperature).softmax(0).sort(descending=True)
    before = ordered.cumsum(0) - ordered
    nucleus = ordered * (before < sampling.top_p)
    return int(tokens[torch.multinomial(nucleus, 1, generator=randomness)])


def _rest(detokenizer: Detokenizer, stops: StopFilter) -> str:
    return stops.push(detokenizer.flush()) + stops.flush()


def _tokens(loaded: LoadedModel, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    randomness = torch.Generator()
    if sampling.seed is None:
        randomness.seed()
    else:
        randomness.manual_seed(sampling.seed)
    ids, cache = list(prompt), None
    while True:
        logits, cache = _step(loaded, ids, cache)
        token = choose(logits, sampling, randomness)
        yield token
        ids = [token]


@torch.inference_mode()
def _step(loaded: LoadedModel, ids: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
    """Logits (vocabulary,) after the given tokens, in float64 on the CPU, and the cache with them in it."""
    output = loaded.model(
        input_ids=torch.tensor([ids], device=loaded.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    # An embedding may be padded beyond the tokenizer's last token.
    logits = output.logits[0, -1, : len(loaded.tokenizer)]
    return logits.to("cpu", torch.float64), output.past_key_values
