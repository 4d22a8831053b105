"""Results as files and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = Path("out/bench")

Row = dict[str, Any]

console = Console(highlight=False)
# Progress goes aside, so that the tables can be redirected.
progress = Console(stderr=True, highlight=False)


def write_json(name: str, content: Any) -> Path:
    """Write out/bench/<name>.json below the working directory."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read_json(name: str) -> dict[str, Any]:
    """What `write_json` wrote before; empty if nothing."""
    path = OUT / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def merged(earlier: Sequence[Row], now: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """Both, in the order of the key; of two rows with one key the new one."""
    rows = {tuple(row[name] for name in key): row for row in (*earlier, *now)}
    return [rows[place] for place in sorted(rows)]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def ratio(ours: float, theirs: float | None) -> str:
    return "-" if not theirs else f"{ours / theirs:.2f}"
