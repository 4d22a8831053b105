"""Prompts as tokens, within the limits of the model."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from tributary_worker.compression.loading import LoadedModel
from tributary_worker.serving.protocol import ApiError


def prompt_tokens(loaded: LoadedModel, prompt: str | Sequence[int] | Sequence[str]) -> list[int]:
    """At least one token: an empty prompt begins where a text begins. Raises ApiError."""
    if isinstance(prompt, str):
        return _encoded(loaded, prompt)
    tokens = [item for item in prompt if isinstance(item, int)]
    if not tokens:
        return _encoded(loaded, "".join(str(text) for text in prompt))
    if max(tokens) >= len(loaded.tokenizer):
        message = f"prompt: token {max(tokens)} is beyond the model's {len(loaded.tokenizer)} tokens"
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param="prompt")
    return tokens


def check_length(prompt: int, completion: int, longest: int) -> None:
    """Raises ApiError if prompt and completion together, in tokens, are longer than what is served."""
    if prompt + completion > longest:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"the prompt's {prompt} tokens and max_tokens {completion} are more than {longest}: shorten one",
            param="max_tokens" if prompt < longest else "prompt",
            code="context_length_exceeded",
        )


def _encoded(loaded: LoadedModel, text: str) -> list[int]:
    tokenizer = loaded.tokenizer
    try:
        tokens = list(tokenizer(text).input_ids)
    except (TypeError, UnicodeError) as error:
        # JSON can spell half a surrogate pair, and UTF-8 cannot.
        raise ApiError(HTTPStatus.BAD_REQUEST, "prompt: not valid Unicode text", param="prompt") from error
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if not tokens and not starts:
        raise ApiError(HTTPStatus.BAD_REQUEST, "prompt: this model needs at least one token", param="prompt")
    return tokens or starts[:1]
