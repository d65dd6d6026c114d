"""What every command shares: consoles, JSON output, tables, and engines.

Standard output carries the result (or one JSON document), standard error carries progress and messages.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (dt.datetime, dt.date)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    return str(value)


def print_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    out.file.write(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def percent(rate: float | None) -> str:
    """Print a fraction as percent; nothing over nothing."""
    return "n/a" if rate is None else f"{rate:.0%}"


def print_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows under headings {key: heading}; numbers to the right, null as a dash."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for key, heading in columns.items():
        number = any(isinstance(row.get(key), (int, float)) and not isinstance(row.get(key), bool) for row in rows)
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        cells = []
        for key in columns:
            value = row.get(key)
            if value is None:
                cells.append("-")
            elif isinstance(value, int) and not isinstance(value, bool):
                cells.append(f"{value:,}")
            else:
                cells.append(str(value))
        table.add_row(*cells)
    out.print(table)


@contextmanager
def progress(message: str) -> Iterator[Progress]:
    """Show a spinner with the step at work, on standard error; nothing where that is no terminal."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        bar.add_task(message, total=None)
        yield bar


def open_database(*, upgraded: bool = True) -> sa.Engine:
    """Open the database in use; with `upgraded`, refuse one whose schema is not that of this release.

    Raises:
        DatabaseUnavailable: it cannot be reached or started.
        SchemaMismatch: it holds no Flywheel schema, or an older or newer one.
    """
    from flywheel_pipeline.database.current import require_current
    from flywheel_pipeline.database.engine import open_engine

    engine = open_engine()
    if upgraded:
        with engine.connect() as connection:
            require_current(connection)
    return engine
