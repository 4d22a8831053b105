"""Is a candidate in order, whatever its quality? What is found here is a verdict, not a failure of the
stage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import groupby

from tributary_api.base import canonical_json
from tributary_api.records import ModelScore, PromptAnswer
from tributary_api.release import GoldenPrompt
from tributary_worker.compression.loading import LoadedModel
from tributary_worker.documents import Document
from tributary_worker.serving.generation import Sampling, generate

BROKEN = "CandidateBroken"
TOO_LARGE = "TooLarge"
WRONG_TOKENIZER = "WrongTokenizer"
WRONG_ANSWER = "WrongAnswer"
DEGENERATE = "DegenerateOutput"
NONSENSE = "Nonsense"

PROMPTS_DEFAULT = 4
PROMPT_CHARACTERS = 80
"""Of a document, as a prompt where the spec has none."""
ANSWER = Sampling(tokens_max=24, temperature=0)
RUN_MAX = 0.5
"""Part of an answer that may be one piece said again and again."""
NONSENSE_NATS = 0.5
"""Above the loss of pure guessing. An untrained model guesses; beyond this a model is sure of what is
wrong.
"""


class RejectedError(Exception):
    """The candidate must not serve. `reason` is one word, the text says what was found and what to change."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_size(weight_bytes: int, bytes_max: int | None) -> None:
    if bytes_max is not None and weight_bytes > bytes_max:
        message = f"the weights take {weight_bytes} bytes, more than gate.maxWeightBytes {bytes_max}"
        raise RejectedError(TOO_LARGE, f"{message}: compress further, or raise it")


def tokens_digest(loaded: LoadedModel, documents: Sequence[Document]) -> str:
    """Of the tokens of the documents: models that cut them otherwise have other tokenizers."""
    encoded = loaded.tokenizer([document.text for document in documents]).input_ids
    return hashlib.sha256(canonical_json(encoded)).hexdigest()


def check_tokens(ours: str, parents: str) -> None:
    if ours != parents:
        message = "the candidate cuts the documents into other tokens than the model that it was made from"
        raise RejectedError(WRONG_TOKENIZER, f"{message}: push it again with its parent's tokenizer")


def prompts(golden: Sequence[GoldenPrompt], documents: Sequence[Document]) -> list[GoldenPrompt]:
    """The prompts of the spec, or beginnings of documents."""
    if golden:
        return list(golden)
    return [GoldenPrompt(prompt=found.text[:PROMPT_CHARACTERS]) for found in documents[:PROMPTS_DEFAULT]]


def answers(loaded: LoadedModel, asked: Sequence[GoldenPrompt]) -> list[PromptAnswer]:
    """What the model says at temperature 0. Raises GenerationError if it gives no finite answer."""
    return [_answer(loaded, golden.prompt) for golden in asked]


def _answer(loaded: LoadedModel, prompt: str) -> PromptAnswer:
    ids = loaded.tokenizer(prompt).input_ids[: loaded.positions - ANSWER.tokens_max]
    pieces = [piece.text for piece in generate(loaded, ids, ANSWER)]
    return PromptAnswer(prompt=prompt, answer="".join(pieces), is_degenerate=is_degenerate(pieces))


def is_degenerate(pieces: Sequence[str]) -> bool:
    """Whether an answer is empty, no text at all, or for more than half one piece in a row."""
    told = [piece for piece in pieces if piece]
    text = "".join(told)
    if not text.strip() or "\ufffd" * 4 in text:
        return True
    longest = max(len(list(run)) for _, run in groupby(told))
    return len(told) > 4 and longest > RUN_MAX * len(told)


def check_answers(
    asked: Sequence[GoldenPrompt], said: Sequence[PromptAnswer], parents: Sequence[PromptAnswer]
) -> None:
    """A weak model may repeat itself; one that does where its parent does not was broken on the way."""
    for golden, found in zip(asked, said, strict=True):
        if golden.contains and golden.contains not in found.answer:
            message = f"the answer to {golden.prompt[:60]!r} is {found.answer[:80]!r}, without"
            raise RejectedError(WRONG_ANSWER, f"{message} {golden.contains[:60]!r}; see gate.goldenPrompts")
    pairs = list(zip(said, parents, strict=True))
    lost = [ours for ours, theirs in pairs if ours.is_degenerate and not theirs.is_degenerate]
    if len(lost) * 2 > len(said):
        message = f"{len(lost)} of {len(said)} answers are degenerate where the parent's are not, as to"
        raise RejectedError(DEGENERATE, f"{message} {lost[0].prompt[:60]!r}: {lost[0].answer[:60]!r}")


def check_sense(total: ModelScore, choices: int) -> None:
    """A model that is worse than guessing among its tokens, or classes, knows something that is not so."""
    guessing = math.log(choices)
    if total.loss > guessing + NONSENSE_NATS:
        message = f"its loss of {total.loss:.2f} nats is worse than guessing among {choices} ({guessing:.2f})"
        raise RejectedError(NONSENSE, f"{message}: the weights do not belong to this model or tokenizer")
