"""When a rule last matched in earnest: chaos and test rows stand in its first and last times, and are no match."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

import sqlalchemy as sa


def last_matches(connection: sa.Connection, rule_ids: Iterable[str]) -> dict[str, dt.datetime]:
    """The last execution of these rules that is not synthetic, to the day where both kinds share a host's day.

    Rules without any are missing. The roll-up answers for rules that never saw a synthetic row; only the others are
    looked up by day.
    """
    rows = connection.execute(
        sa.text(
            "SELECT rule_id, max(last_at) FILTER (WHERE executions > 0) AS last_at, sum(synthetic) > 0 AS mixed "
            "FROM rule_site_stats WHERE rule_id = ANY(:ids) GROUP BY rule_id"
        ),
        {"ids": list(rule_ids)},
    ).all()
    found = {row.rule_id: row.last_at for row in rows if row.last_at is not None}
    mixed = [row.rule_id for row in rows if row.mixed and row.last_at is not None]
    if mixed:
        found.update(
            (row.rule_id, row.last_at)
            for row in connection.execute(
                sa.text(
                    "SELECT rule_id, max(last_at) AS last_at FROM rule_daily_stats "
                    "WHERE rule_id = ANY(:ids) AND executions > 0 GROUP BY rule_id"
                ),
                {"ids": mixed},
            )
        )
    return found
