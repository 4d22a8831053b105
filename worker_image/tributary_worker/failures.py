"""How a stage ends badly: one exception, one termination message, one exit code.

Every stage raises `StageFailure`; `run_stage` (called by `__main__`) turns whatever comes out of a stage into
the JSON termination message that the operator reads, and into the exit code of the contract.

The text of an unforeseen exception may quote private data (a parser names the line that it choked on), so for
a stage that touches such data only its type and the place in the code leave the process, never its words.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tributary_api.failures import EXIT_CODES, RETRYABLE, TERMINATION_MESSAGE_PATH, Reason, TerminationMessage

TERMINATION_MESSAGE_PATH_ENV = "TRIBUTARY_TERMINATION_MESSAGE_PATH"
"""Where to write the termination message instead, outside a cluster."""

MESSAGE_CHARACTERS_MAX = 2048
OUT_OF_MEMORY_TYPES = ("OutOfMemoryError", "MemoryError")


class StageFailure(Exception):
    """A failure that a stage understands.

    `reason` is from the contract; `message` says what to change and holds no private data; `retryable` says
    whether another attempt of the same task can help, and follows from the reason unless it is given.
    """

    def __init__(self, reason: Reason, message: str, *, retryable: bool | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.retryable = reason in RETRYABLE if retryable is None else retryable

    def __reduce__(self) -> tuple[Callable[..., StageFailure], tuple[Reason, str, bool]]:
        """Ranks tell one another about failures."""
        return _restored, (self.reason, self.message, self.retryable)


def _restored(reason: Reason, message: str, retryable: bool) -> StageFailure:
    return StageFailure(reason, message, retryable=retryable)


def run_stage(main: Callable[[Sequence[str]], int], argv: Sequence[str], *, is_private: bool) -> int:
    """Run a stage's `main(argv)`; give the process's exit code, the termination message having been written.

    `is_private` says that the stage sees a client's data: the words of unforeseen errors are then withheld.
    """
    try:
        return main(argv)
    except StageFailure as failure:
        return report(failure)
    except Exception as error:
        print(_traceback(error, is_private), file=sys.stderr)
        return report(unforeseen(error, is_private=is_private))


def report(failure: StageFailure) -> int:
    """Write the termination message where the kubelet reads it, and give the exit code that belongs to it."""
    words = failure.message[:MESSAGE_CHARACTERS_MAX]
    message = TerminationMessage(reason=failure.reason, message=words, retryable=failure.retryable)
    text = message.model_dump_json(by_alias=True)
    print(text, file=sys.stderr, flush=True)
    path = termination_message_path()
    if os.access(path if path.exists() else path.parent, os.W_OK):
        path.write_text(text)
    return EXIT_CODES[failure.reason]


def termination_message_path() -> Path:
    return Path(os.environ.get(TERMINATION_MESSAGE_PATH_ENV, TERMINATION_MESSAGE_PATH))


def unforeseen(error: Exception, *, is_private: bool) -> StageFailure:
    """An exception that nobody foresaw, as a failure. Retryable: it may have been the machine."""
    name = type(error).__name__
    if name in OUT_OF_MEMORY_TYPES:
        hint = "out of memory: raise the worker's memory, or lower microBatchSize or maxSequenceLength"
        return StageFailure(Reason.INTERNAL, hint)
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return StageFailure(Reason.INTERNAL, f"{name} at {where}" + ("" if is_private else f": {error}"))


def _traceback(error: Exception, is_private: bool) -> str:
    if not is_private:
        return "".join(traceback.format_exception(error))
    frames = traceback.format_list(traceback.extract_tb(error.__traceback__))
    return "".join(frames) + f"{type(error).__name__} (its words are withheld: they may quote private data)"
