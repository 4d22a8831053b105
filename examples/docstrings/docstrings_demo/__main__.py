"""`python -m docstrings_demo`: runs the demo, shows it, judges it. See examples/docstrings/README.md."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from docstrings_demo import outcome, stage, summary
from docstrings_demo.live import View
from docstrings_demo.owners import CHECKOUT
from docstrings_demo.problems import DemoError
from docstrings_demo.stage import Stage
from docstrings_demo.story import Demo
from tributary_dev.doctor import MachineError
from tributary_dev.health import UnhealthyError
from tributary_dev.images import ImageError
from tributary_dev.network import NoSubnetError
from tributary_dev.shell import CommandError
from tributary_store.errors import StoreError

SET_UP_ERRORS = (MachineError, UnhealthyError, ImageError, NoSubnetError, CommandError)
"""Of the embedded cluster; each one's text says what to do."""
SUMMARY_PATH = CHECKOUT / "out" / "demo" / "summary.json"


def main() -> int:
    arguments = parsed()
    console = Console()
    try:
        with View(console) as view:
            demo = Demo(set_up(arguments, view), view)
            seen, load = demo.run()
        result = outcome.summary(demo.stage.admin_store(), seen, load, view.seconds)
        return judged(console, result, outcome.budgets(seen))
    except (DemoError, StoreError, *SET_UP_ERRORS) as error:
        console.print(f"\nThe demo has failed. {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped. The cluster is still up: `make down` removes it, `make demo` starts over.")
        return 130


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m docstrings_demo", description=__doc__)
    parser.add_argument("--context", help="a context of your kubeconfig, instead of the embedded cluster")
    parser.add_argument("--cluster", help="name of an embedded cluster apart from this checkout's usual one")
    return parser.parse_args()


def set_up(arguments: argparse.Namespace, view: View) -> Stage:
    if arguments.context:
        view.headline(f"The cluster of context {arguments.context}")
        return stage.existing(arguments.context)
    view.headline("The embedded cluster; its programs and images are built the first time (20 minutes)")
    return stage.embedded(arguments.cluster)


def judged(console: Console, result: summary.Summary, budgets: list[summary.Budget]) -> int:
    """Write and show the summary; 0 if it holds what the demo promises."""
    summary.write(result, SUMMARY_PATH)
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in summary.table_rows(result, {budget.namespace: budget for budget in budgets}):
        table.add_row(*row)
    console.print(table)
    console.print(f"Written to {SUMMARY_PATH}")
    missed = summary.shortfalls(result, budgets)
    for text in missed:
        console.print(f"NOT AS PROMISED: {text}", style="bold red")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
