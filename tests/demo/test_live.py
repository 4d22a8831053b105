"""What the plain view prints: each change once."""

from __future__ import annotations

import io

from demo_objects import CLIENT, ROUND
from rich.console import Console

from docstrings_demo.live import View, lines, picture
from docstrings_demo.observe import Load, Pod, Seen, load_of
from tributary_api.client import FederatedClient
from tributary_api.round import FederatedRound
from tributary_operator import names


def seen(step: int) -> Seen:
    fedround = FederatedRound.model_validate(ROUND)
    pod = Pod("algebra", "p", names.TRAIN, fedround.run_key, "docstrings", 0, "Running", step, 10)
    return Seen([FederatedClient.model_validate(CLIENT)], [fedround], [], [pod])


def test_progress_and_budget_are_said() -> None:
    said = dict(lines(seen(3)))
    assert said["round-1 algebra"] == "1 running step 3 of 10"
    assert "ε spent 4.2, reserved –, left 15.8" in said["algebra"]


def test_only_changes_are_printed() -> None:
    out = io.StringIO()
    with View(Console(file=out, width=200)) as view:
        view.show(seen(3))
        view.show(seen(3))
        view.show(seen(4))
    text = out.getvalue()
    assert text.count("step 3 of 10") == 1
    assert text.count("step 4 of 10") == 1
    assert text.count("15.8") == 1


def test_the_picture_of_a_terminal_shows_every_client() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(picture(seen(3)))
    assert "algebra/docstrings" in out.getvalue()
    assert "step 3 of 10" in out.getvalue()


def test_a_counter_line_of_the_load_generator_is_read_back() -> None:
    line = {"sent": 2, "failed": 1, "per_release": {"a/1": 1}, "errors": ["x"]}
    load = load_of({**line, "p50_seconds": 0.1, "p99_seconds": 0.2, "final": True})
    assert load == Load(2, 1, (("a/1", 1),), ("x",), 0.1, 0.2, True)
