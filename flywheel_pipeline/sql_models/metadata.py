"""Turning values from the database and from numpy into values that Dagster metadata accepts.

Belongs here: coercion, small markdown tables and plots as text, for all rooms. Does not belong here: what is worth showing.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import io
import math
import pathlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_CELL = 120
# What telemetry reports is text, never a link, an image or a style of the page that shows it.
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*[|"} | {"<": "&lt;", "&": "&amp;"})
# What GitHub's Markdown, and with it Dagster's UI, makes a link of without any markup.
_AUTOLINK = re.compile(r"://|@|(?<=www)\.", re.IGNORECASE)
_LOOKALIKES = {"://": ":⁄⁄", "@": "＠", ".": "․"}


def as_metadata(value: object) -> Any:
    """Coerce a value to what Dagster metadata, and JSON, can hold.

    numpy scalars and arrays, Decimal, dates, UUID, sets, enums, paths, dataclasses and bytes become plain
    Python; containers are coerced through and through. A whole Decimal becomes an int, another one a float.
    Times are ISO 8601. Not-a-number and infinities become strings, since JSON has no word for them.
    Durations are seconds.

    Args:
        value: anything a query, numpy or a model gives.

    Returns:
        bool, int, float, str, None, or lists and dicts of these; a Dagster value where one was given.

    Raises:
        TypeError: a type of which nobody said how to show it; better than a `repr` that nobody can read.
    """
    if type(value).__module__.partition(".")[0] == "dagster":
        return value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return as_metadata(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            return str(value)
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, uuid.UUID | pathlib.PurePath):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Mapping):
        return {str(as_metadata(key)): as_metadata(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_metadata(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Set):
        return sorted((as_metadata(item) for item in value), key=lambda item: (str(type(item)), str(item)))
    if isinstance(value, Sequence):
        return [as_metadata(item) for item in value]
    tolist = getattr(value, "tolist", None)  # numpy scalars and arrays, pandas series
    if callable(tolist):
        return as_metadata(tolist())
    dump = getattr(value, "model_dump", None)  # pydantic
    if callable(dump):
        return as_metadata(dump())
    raise TypeError(f"no way to show a {type(value).__name__} in metadata")


def markdown_table(
    rows: Iterable[Mapping[str, object]], columns: Sequence[str] | None = None, *, longest_cell: int = _LONGEST_CELL
) -> str:
    """Give a markdown table; long cells are cut, null is an empty cell.

    Args:
        rows: one mapping a row.
        columns: which to show, in order; None takes those of the first row.
        longest_cell: characters after which a cell is cut.

    Returns:
        The table, or "no rows" where there is none.
    """
    listed = [dict(row) for row in rows]
    if not listed:
        return "no rows"
    shown = list(columns if columns is not None else listed[0])
    lines = [
        "| " + " | ".join(_cell(column, longest_cell) for column in shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(_cell(row.get(column), longest_cell) for column in shown) + " |" for row in listed),
    ]
    return "\n".join(lines)


def _cell(value: Any, longest: int) -> str:
    plain = as_metadata(value)
    if plain is None:
        return ""
    text = str(plain)
    if isinstance(plain, float):
        text = f"{plain:.4g}" if abs(plain) < 1000 else f"{plain:.1f}"
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return escape_markdown(text)


def escape_markdown(text: str) -> str:
    """Text as Markdown that shows it as it is: `<n>` is no HTML, `[x](y)` no link, a bar ends no cell, no address a link.

    The UI looks for addresses in the source, and once more in the text that came of it: no escape or entity hides one.
    An empty comment parts the text in two, and is not shown.
    """
    return _AUTOLINK.sub(lambda found: f"<!-- -->{found[0]}", text.translate(_MARKDOWN))


def unlinked(text: str) -> str:
    """A sentence for wherever it may be shown: no HTML, link or address is one in a page, a log or a terminal.

    Signs that look alike stand for those that would make it one: Dagster's UI renders descriptions as Markdown and looks for
    addresses in log lines, and a terminal shows the same sentence as it is.
    """
    plain = text.replace("<", "‹").replace(">", "›").replace("](", "] (")
    return _AUTOLINK.sub(lambda found: _LOOKALIKES[found[0]], plain)


def png_uri(figure: Figure, longest: int) -> str:
    """A drawn figure as a PNG `data:` URI, in the finest of a few resolutions that needs at most `longest` characters.

    Where even the coarsest needs more, it is the coarsest. 64 colours are enough for bars and lines, and need a third
    of the characters that all colours do.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s: not at import
    from PIL import Image

    uri = ""
    canvas = FigureCanvasAgg(figure)
    for dpi in (110, 80, 60, 45, 30):
        figure.set_dpi(dpi)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
        drawn = Image.frombuffer("RGBA", canvas.get_width_height(), pixels.tobytes())
        image = io.BytesIO()
        drawn.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(image, format="png")
        uri = "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()
        if len(uri) <= longest:
            break
    return uri
