"""What a report is made of, and how it becomes one HTML file.

Belongs here: the parts of a page as values, and the one template. Does not belong here: any query. Every string may
come from an agent and is hostile: the template escapes all of them by itself, holds no script, and forbids the browser
to run one or to ask anything of a network (Content-Security-Policy). Charts stand in it as images, in which nothing
runs either.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class Tile:
    """One figure with its name; `tone` is good, bad or empty."""

    label: str
    value: Any
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column: the key of a row, its heading, and its kind.

    Kinds: text; code (an id, in fixed width); number; rate (a fraction, shown as percent); state (a word with a
    colour); time (a datetime or text).
    """

    key: str
    heading: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows under headings. `of` is how many there are in all, where not all are shown; `empty` stands for no rows."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""
    empty: str = "None."
    of: int | None = None

    @property
    def block(self) -> str:
        """The kind of block, for the template."""
        return "table"


@dataclass(frozen=True)
class Chart:
    """A drawing as SVG text, with its words for those who do not see it."""

    svg: str
    alt: str
    caption: str = ""

    @property
    def block(self) -> str:
        """The kind of block, for the template."""
        return "chart"

    @property
    def uri(self) -> str:
        """The drawing as a `data:` address for an image."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True)
class Prose:
    """A paragraph; `tone` is good, bad or empty."""

    text: str
    tone: str = ""

    @property
    def block(self) -> str:
        """The kind of block, for the template."""
        return "prose"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    note: str = ""

    @property
    def block(self) -> str:
        """The kind of block, for the template."""
        return "heading"


Block = Table | Chart | Prose | Heading


@dataclass(frozen=True)
class Section:
    """A part of the page under its title; `anchor` is a word of ours, the target of its link."""

    anchor: str
    title: str
    lead: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report: title, facts of its making {name: value}, tiles and sections."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    tiles: Sequence[Tile]
    sections: Sequence[Section] = field(default_factory=tuple)


def percent(rate: Any) -> str:
    """A fraction as percent with one decimal; nothing over nothing is a dash."""
    return "–" if rate is None else f"{float(rate) * 100:.1f} %"


def _shown(value: Any, kind: str) -> str:
    if value is None or value == "":
        return "–"
    if kind == "rate":
        return percent(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, dt.datetime):
        return f"{value.astimezone(dt.UTC):%Y-%m-%d %H:%M}"
    return str(value)


_TONES = {
    **dict.fromkeys(
        ("fleet", "pass", "promote", "advance", "keep", "executed", "acknowledged", "good", "approved"), "good"
    ),
    **dict.fromkeys(("quarantined", "fail", "error", "reject", "rejected", "quarantine", "withheld", "failed"), "bad"),
    **dict.fromkeys(("canary", "ring", "shadow", "warn", "hold", "held", "inconclusive", "pending", "queued"), "wait"),
}


def _tone(value: Any) -> str:
    return _TONES.get(str(value), "")


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = _shown
    environment.filters["tone"] = _tone
    return environment.from_string((Path(__file__).parent / "page.html.j2").read_text("utf-8"))


def render(page: Page) -> str:
    """Return the page as one HTML document."""
    return _template().render(page=page)
