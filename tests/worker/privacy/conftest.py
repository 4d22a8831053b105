"""Figures that the proofs measure; with TRIBUTARY_PRIVACY_REPORT=<file> they are written there at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from privacy_proofs.figures import Figures

REPORT_ENV = "TRIBUTARY_PRIVACY_REPORT"
FIGURES = pytest.StashKey[Figures]()


@pytest.fixture(scope="session")
def figures(pytestconfig):
    return pytestconfig.stash.setdefault(FIGURES, Figures())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A report is whole or is not written: a figure that was not measured must not look measured."""
    if REPORT_ENV not in os.environ or exitstatus != pytest.ExitCode.OK:
        return
    measured = session.config.stash.get(FIGURES, Figures())
    if measured.missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    else:
        measured.write(Path(os.environ[REPORT_ENV]))


def pytest_terminal_summary(terminalreporter, config):
    measured = config.stash.get(FIGURES, None)
    if measured is None or not measured.seeded_bugs:
        return
    terminalreporter.section("seeded bugs")
    for line in measured.lines():
        terminalreporter.line(line)
    if REPORT_ENV in os.environ and measured.missing:
        terminalreporter.line(f"no report: nothing measured {', '.join(measured.missing)}", red=True)
