"""Aliases: other names of rules and sites, valid for a time.

Belongs here: naming that one id means another, and listing it. Does not belong here: resolving ids; reading
does that (`dbt_like_sql/telemetry/executions.sql`), and raw rows are never rewritten.

Triggers keep aliases one to one at any moment and without chains, and touch the cells that they re-attribute.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import psycopg
import sqlalchemy as sa

from flywheel_pipeline.database.tables import rule_aliases, site_aliases
from flywheel_pipeline.errors import UsageError

Kind = Literal["rule", "site"]

_TABLES: Final[dict[Kind, tuple[sa.Table, str]]] = {
    "rule": (rule_aliases, "rule_id"),
    "site": (site_aliases, "site_id"),
}


@dataclass(frozen=True, slots=True)
class Alias:
    """`alias` means `target` for rows with valid_from <= event time < valid_to; None: without that end."""

    id: int
    kind: Kind
    alias: str
    target: str
    valid_from: datetime | None
    valid_to: datetime | None
    actor: str
    reason: str
    created_at: datetime


def add_rule_alias(
    connection: sa.Connection,
    alias: str,
    rule_id: str,
    valid_from: datetime | None = None,
    valid_to: datetime | None = None,
    *,
    actor: str,
    reason: str,
) -> int:
    """Let `alias` on telemetry rows mean the rule `rule_id`, old rows included; returns the alias's id.

    `valid_from` and `valid_to` (aware) bound the event time, None leaves that end open. Saying the same again
    changes nothing.

    Raises UsageError for a blank name, actor or reason, an empty time, an alias that already means something
    during part of that time, and a chain of aliases.
    """
    return _add(connection, "rule", alias, rule_id, valid_from, valid_to, actor, reason)


def add_site_alias(
    connection: sa.Connection,
    alias: str,
    site_id: str,
    valid_from: datetime | None = None,
    valid_to: datetime | None = None,
    *,
    actor: str,
    reason: str,
) -> int:
    """Let `alias` on telemetry rows mean the site `site_id`, as a renamed site does; see `add_rule_alias`."""
    return _add(connection, "site", alias, site_id, valid_from, valid_to, actor, reason)


def list_aliases(connection: sa.Connection, kind: Kind) -> list[Alias]:
    """Aliases of rules or of sites, by name and time."""
    table, target = _TABLES[kind]
    rows = connection.execute(
        sa.select(
            table.c.id,
            table.c.alias,
            table.c[target].label("target"),
            _finite(table.c.valid_from),
            _finite(table.c.valid_to),
            table.c.actor,
            table.c.reason,
            table.c.created_at,
        ).order_by(table.c.alias, table.c.valid_from)
    )
    return [Alias(kind=kind, **row) for row in rows.mappings()]


def _finite(column: sa.Column[datetime]) -> sa.Label[datetime | None]:
    return sa.case((sa.func.isfinite(column), column)).label(column.name)


def _add(
    connection: sa.Connection,
    kind: Kind,
    alias: str,
    target: str,
    valid_from: datetime | None,
    valid_to: datetime | None,
    actor: str,
    reason: str,
) -> int:
    for name, text in (("alias", alias), (f"{kind}_id", target), ("actor", actor), ("reason", reason)):
        if not text.strip():
            raise UsageError(f"The {name} of an alias must not be blank.")
    if alias == target:
        raise UsageError(f"{alias} already is its own name; an alias must be another one.")
    if valid_from is not None and valid_to is not None and valid_from >= valid_to:
        raise UsageError(f"The alias {alias} would end at {valid_to} before it begins at {valid_from}.")
    for at in (valid_from, valid_to):
        if at is not None and at.tzinfo is None:
            raise UsageError(f"The time {at} of the alias {alias} names no UTC offset.")
    table, column = _TABLES[kind]
    begins = sa.text("'-infinity'::timestamptz") if valid_from is None else sa.literal(valid_from)
    ends = sa.text("'infinity'::timestamptz") if valid_to is None else sa.literal(valid_to)
    known = connection.execute(
        sa.select(table.c.id).where(
            table.c.alias == alias,
            table.c[column] == target,
            table.c.valid_from == begins,
            table.c.valid_to == ends,
        )
    ).scalar_one_or_none()
    if known is not None:
        return int(known)
    try:
        with connection.begin_nested():
            return int(
                connection.execute(
                    sa.insert(table)
                    .values(
                        {
                            "alias": alias,
                            column: target,
                            "valid_from": begins,
                            "valid_to": ends,
                            "actor": actor,
                            "reason": reason,
                        }
                    )
                    .returning(table.c.id)
                ).scalar_one()
            )
    except sa.exc.DatabaseError as error:
        if not isinstance(error.orig, psycopg.errors.RaiseException | psycopg.errors.UniqueViolation):
            raise
        sentence = error.orig.diag.message_primary or str(error.orig)
        raise UsageError(
            f"{sentence[0].upper()}{sentence[1:].rstrip('.')}.",
            hint=error.orig.diag.message_hint or "End the first alias where the second begins.",
        ) from error
