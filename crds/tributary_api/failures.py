"""How a worker says what went wrong: an exit code for programs, a termination message for people."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tributary_api.base import ApiModel

TERMINATION_MESSAGE_PATH = "/dev/termination-log"


class Reason(StrEnum):
    """Why a stage failed. Names what to change; says nothing about a private record."""

    TASK_INVALID = "TaskInvalid"
    MODEL_MISSING = "ModelMissing"
    MODEL_DIGEST_MISMATCH = "ModelDigestMismatch"
    MODEL_UNSUPPORTED = "ModelUnsupported"
    DATA_UNREACHABLE = "DataUnreachable"
    DATA_EMPTY = "DataEmpty"
    DATA_UNPARSEABLE = "DataUnparseable"
    DATASET_DIGEST_MISMATCH = "DatasetDigestMismatch"
    CONSENT_REFUSED = "ConsentRefused"
    GRANT_REFUSED = "GrantRefused"
    LEDGER_REFUSED = "LedgerRefused"
    SELF_TEST_FAILED = "SelfTestFailed"
    NON_FINITE_DELTA = "NonFiniteDelta"
    QUORUM_BROKEN = "QuorumBroken"
    STORE_UNREACHABLE = "StoreUnreachable"
    STORE_DENIED = "StoreDenied"
    RENDEZVOUS_TIMED_OUT = "RendezvousTimedOut"
    DATA_TOO_SMALL = "DataTooSmall"
    INTERNAL = "InternalError"
    """The last, so that its exit code is the highest: of several processes that failed it knows the least."""


RETRYABLE = frozenset(
    {
        Reason.DATA_UNREACHABLE,
        Reason.STORE_UNREACHABLE,
        Reason.RENDEZVOUS_TIMED_OUT,
        Reason.INTERNAL,
    }
)
"""Another attempt may succeed; the other reasons need a change of the spec, the data or the policy."""

EXIT_CODES = {reason: 10 + i for i, reason in enumerate(Reason)}
"""Below 10 and above 125 codes belong to Python, the shell and signals (137 is out of memory or SIGKILL)."""


class TerminationMessage(ApiModel):
    reason: Reason
    message: Annotated[str, Field(max_length=2048)] = ""
    retryable: bool = False
