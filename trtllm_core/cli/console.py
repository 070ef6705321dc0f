"""What all commands print with: results on stdout, everything about them on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WIDTH = 160
"""Of tables in a file or a pipe."""


def stdout() -> Console:
    """For results that people read."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def stderr() -> Console:
    """For progress, notes and errors, so that stdout can be piped on."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH)


def print_error(message: str) -> None:
    """One sentence in red."""
    stderr().print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True)


def print_note(message: str) -> None:
    """Something that the user should know, beside the result."""
    stderr().print(f"[dim]note: {escape(message)}[/]", soft_wrap=True)


def print_json(value: Any) -> None:
    """One value as one line of JSON, characters as they are."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table. Cells are text, never markup."""
    table = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")  # a long word goes on in the next line, rather than lose its end
    for row in rows:
        table.add_row(*map(escape, row))
    stdout().print(table)


def print_facts(facts: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """Names and values, one a line; on stdout unless another console is given."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts:
        table.add_row(f"[bold]{escape(name)}[/]", escape(value))
    (console or stdout()).print(table)


def size(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[0]}" if power == 0 else f"{count:.2f} {_UNITS[power]}"
