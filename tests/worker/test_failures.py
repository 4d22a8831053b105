from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from tributary_api.failures import EXIT_CODES, Reason
from tributary_worker.__main__ import main
from tributary_worker.failures import TERMINATION_MESSAGE_PATH_ENV, StageFailure, run_stage


@pytest.fixture
def message(tmp_path, monkeypatch):
    path = tmp_path / "termination-log"
    monkeypatch.setenv(TERMINATION_MESSAGE_PATH_ENV, str(path))
    return lambda: json.loads(path.read_text())


def raising(error):
    def stage(argv):
        raise error

    return stage


@pytest.mark.parametrize("reason", list(Reason))
def test_a_failure_becomes_its_exit_code_and_termination_message(reason, message):
    code = run_stage(raising(StageFailure(reason, "change this")), [], is_private=True)
    assert code == EXIT_CODES[reason]
    assert message()["reason"] == reason
    assert message()["message"] == "change this"


def test_the_code_of_an_internal_error_is_the_highest():
    """Of several processes that failed at once, the one with the lowest code knows why."""
    assert EXIT_CODES[Reason.INTERNAL] == max(EXIT_CODES.values())


def test_success_is_silent(message):
    assert run_stage(lambda argv: 0, [], is_private=True) == 0
    with pytest.raises(FileNotFoundError):
        message()


def test_the_words_of_an_unforeseen_error_stay_in_a_private_stage(message, capfd):
    code = run_stage(raising(ValueError("patient Doe, 1970")), [], is_private=True)
    assert code == EXIT_CODES[Reason.INTERNAL]
    assert message()["message"].startswith("ValueError at test_failures.py:")
    assert "Doe" not in message()["message"] + "".join(capfd.readouterr())


def test_they_are_shown_where_nothing_is_private(message):
    run_stage(raising(ValueError("no such tensor")), [], is_private=False)
    assert "no such tensor" in message()["message"]


def test_a_private_cause_of_a_foreseen_failure_is_not_shown(message, capfd):
    def stage(argv):
        try:
            raise ValueError("patient Doe")
        except ValueError as error:
            raise StageFailure(Reason.DATA_UNPARSEABLE, "nothing parses") from error

    run_stage(stage, [], is_private=True)
    assert "Doe" not in "".join(capfd.readouterr())


def test_out_of_memory_says_what_to_change(message):
    run_stage(raising(MemoryError()), [], is_private=True)
    assert "microBatchSize" in message()["message"]
    assert message()["retryable"] is True


def test_a_long_message_is_cut(message):
    run_stage(raising(StageFailure(Reason.INTERNAL, "x" * 10_000)), [], is_private=True)
    assert len(message()["message"]) == 2048


def test_failures_travel_between_ranks():
    failure = pickle.loads(pickle.dumps(StageFailure(Reason.CONSENT_REFUSED, "no", retryable=True)))
    assert (failure.reason, failure.message, failure.retryable) == (Reason.CONSENT_REFUSED, "no", True)


@pytest.mark.parametrize("argv", [[], ["unknown"]])
def test_an_unknown_stage_is_a_usage_error(argv, capsys):
    assert main(argv) == 2
    assert "train" in capsys.readouterr().err


def test_a_stage_is_loaded_only_when_it_is_asked_for():
    modules = "sys, tributary_worker.__main__, tributary_worker.distributed"
    program = f"import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_task_that_is_missing_or_broken_is_named(message, monkeypatch):
    monkeypatch.setenv("TRIBUTARY_TASK", '{"grant": 7}')
    assert main(["train"]) == EXIT_CODES[Reason.TASK_INVALID]
    assert "TrainTask" in message()["message"]
