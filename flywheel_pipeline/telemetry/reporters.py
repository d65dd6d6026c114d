"""Reporters: which appliance sent a row, and whether it may report that row.

Belongs here: the scope of an appliance (its site under all names of today) and holding a row against it. Does not
belong here: tokens and HTTP (`delivery`), the contract (`contract`).

The same question is asked when a row arrives over HTTP and when a reject of that appliance is tried again: otherwise a
row for another site, refused today for a date in the future, would land with tomorrow's retry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from flywheel_pipeline.telemetry.contract import COLUMNS, UNKNOWN_APPLIANCE, ParsedRow, Reject

#: Rejects that an authenticated appliance sent have this source, followed by its id.
SOURCE_PREFIX: Final = "appliance:"

_SITE: Final = COLUMNS.index("site_id")
_APPLIANCE: Final = COLUMNS.index("appliance_id")
_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True, slots=True)
class Reporter:
    """An appliance and the names of its site: the one in use and the aliases of today, compared byte for byte."""

    appliance_id: str
    sites: frozenset[str]

    @property
    def source(self) -> str:
        """What stands as source at its rejects."""
        return SOURCE_PREFIX + self.appliance_id


def confine(
    rows: Iterable[ParsedRow], reporter: Reporter, colleagues: Callable[[set[str]], set[str]]
) -> list[ParsedRow | Reject]:
    """Hold rows against the scope of their reporter, in their order.

    A row of another site is refused, and so is a row of an appliance that is not registered at the reporter's site;
    `colleagues` answers which of the given appliance ids are. A row that names no appliance is given the reporter's:
    releases before 1.0.70 never send it, and the token knows.
    """
    found = list(rows)
    others = {str(row.values[_APPLIANCE]) for row in found} - {reporter.appliance_id, UNKNOWN_APPLIANCE}
    known = colleagues(others) if others else set()
    return [_confined(row, reporter, known) for row in found]


def _confined(row: ParsedRow, reporter: Reporter, colleagues: set[str]) -> ParsedRow | Reject:
    site_id, appliance_id = row.values[_SITE], row.values[_APPLIANCE]
    if site_id not in reporter.sites:
        return Reject("foreign_site", f"site_id {_shown(site_id)} is not the site of appliance {reporter.appliance_id}")
    if appliance_id == reporter.appliance_id or appliance_id in colleagues:
        return row
    if appliance_id == UNKNOWN_APPLIANCE:
        values = list(row.values)
        values[_APPLIANCE] = reporter.appliance_id
        return row._replace(values=tuple(values))
    return Reject(
        "foreign_appliance",
        f"appliance_id {_shown(appliance_id)} is not registered at the site of appliance {reporter.appliance_id}",
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def registered_at(connection: psycopg.Connection[Any], sites: frozenset[str], appliance_ids: set[str]) -> set[str]:
    """Which of these appliances are registered at a site of these names."""
    rows = connection.execute(
        "SELECT appliance_id FROM appliances WHERE appliance_id = ANY (%s) AND site_id = ANY (%s)",
        (sorted(appliance_ids), sorted(sites)),
    )
    return {appliance_id for (appliance_id,) in rows}


def load_reporter(connection: psycopg.Connection[Any], appliance_id: str) -> Reporter:
    """The reporter of a reject's source, as registered today; one that is not registered may report for no site."""
    row = connection.execute(
        "SELECT flywheel_site_names(site_id) FROM appliances WHERE appliance_id = %s", (appliance_id,)
    ).fetchone()
    return Reporter(appliance_id, frozenset(row[0]) if row else frozenset())
