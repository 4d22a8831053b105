"""The completions API of OpenAI, as far as it is served: requests, responses, errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tributary_worker.serving.generation import FinishReason, Sampling

TOKENS_DEFAULT = 16
"""OpenAI's default of max_tokens."""
STOPS_MAX = 4
"""OpenAI's limit."""
STOP_CHARACTERS_MAX = 256
SEED_MAX = 2**63 - 1

Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS_MAX)]
TokenId = Annotated[int, Field(ge=0)]


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field that is wrong."""

    def __init__(self, status: HTTPStatus, message: str, *, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return error_body(self.status, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str = "") -> dict[str, Any]:
    kinds = {HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error"}
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    kind = kinds.get(HTTPStatus(status), kind)
    return {"error": {"message": message, "type": kind, "param": param, "code": code or None}}


class CompletionRequest(BaseModel):
    """POST /v1/completions. A field that is not here is refused: ignoring it would change what is asked."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | list[TokenId] | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = TOKENS_DEFAULT
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=1)] = 1
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    stream: bool = False
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_MAX)] | None = None
    seed: Annotated[int, Field(ge=-SEED_MAX, le=SEED_MAX)] | None = None
    user: str | None = None

    def sampling(self) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(self.max_tokens, self.temperature, self.top_p, tuple(stops), self.seed)


def parse_request(body: bytes) -> CompletionRequest:
    """The request in a body. Raises ApiError that names the first field at fault."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ApiError(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
    try:
        return CompletionRequest.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        param = str(fault["loc"][0])
        raise ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {fault['msg']}", param=param) from error


@dataclass(frozen=True, slots=True)
class Completion:
    """What all responses to one request share. `created` in seconds since 1970."""

    id: str
    created: int
    model: str

    def response(
        self, text: str, finish: FinishReason | None, prompt_tokens: int, tokens: int
    ) -> dict[str, Any]:
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        return {**self.chunk(text, finish), "usage": usage}

    def chunk(self, text: str, finish: FinishReason | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        kind: Literal["text_completion"] = "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }


def model_list(model: str, created: int) -> dict[str, Any]:
    entry = {"id": model, "object": "model", "created": created, "owned_by": "tributary"}
    return {"object": "list", "data": [entry]}


def server_sent_event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
