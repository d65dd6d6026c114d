"""What every command shares: consoles, JSON output, tables, and engines.

Standard output carries the result (or one JSON document), standard error carries progress and messages. Ids, host names and
errors come from agents and are hostile: markup in them is text, and control characters are shown, never sent.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# C0 but tab and newline, DEL, C1, and what turns the direction of text: a terminal obeys them (title, clipboard, erased lines).
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class SafeConsole(Console):
    """A console whose terminal obeys nothing but its own styles: what text would make it do is shown as an escape."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as always, and show control characters in what is text."""
        for segment in super().render(renderable, options):
            if segment.control or not _OBEYED.search(segment.text):
                yield segment
            else:
                yield Segment(_OBEYED.sub(lambda found: ascii(found[0])[1:-1], segment.text), segment.style)


out: Console = SafeConsole(highlight=False)
err: Console = SafeConsole(stderr=True, highlight=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (dt.datetime, dt.date)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    return str(value)


def print_json(value: Any) -> None:
    """Print one JSON document to standard output; what a terminal would obey stands in it as JSON's own escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    out.file.write(_OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def percent(rate: float | None) -> str:
    """Print a fraction as percent; nothing over nothing."""
    return "n/a" if rate is None else f"{rate:.0%}"


def print_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows under headings {key: heading}; numbers to the right, null as a dash."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
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
        table.add_row(*map(Text, cells))
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
