"""What a person sees of a long step, on a terminal and in a log."""

import io
import threading

import pytest
from rich.console import Console

from tributary_dev import progress


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream))
    return stream


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (605, "10 min 05 s")]
)
def test_times_read_as_people_say_them(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_a_log_gets_a_line_per_step_and_a_heartbeat(
    output: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.01)
    with progress.step("building etcd"):
        threading.Event().wait(0.1)
    lines = output.getvalue().splitlines()
    assert "building etcd: 0 s so far" in lines[0]
    assert lines[-1].strip() == "building etcd: done, 0 s"


def test_a_failed_step_says_so(output: io.StringIO) -> None:
    with pytest.raises(ValueError, match="no"), progress.step("building etcd"):
        raise ValueError("no")
    assert "building etcd: failed" in output.getvalue()


def test_steps_may_overlap_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True))
    monkeypatch.setattr(progress, "_live", progress._LiveSteps())
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        with progress.step(name):
            barrier.wait(5)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert "one: done" in stream.getvalue()
    assert "two: done" in stream.getvalue()
