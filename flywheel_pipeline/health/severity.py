"""How bad it is that a rule fails: since when, how often since then, and whether that is an error or a warning.

Belongs here: the streak and the grade. Does not belong here: which rules fail, and why (`failing_rules`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW

#: A rule that has failed this long and this often was seen by everybody and stopped by nobody.
SEVERE_DAYS: Final = 7
SEVERE_FAILURES: Final = 100
#: That many failures are severe from the first day.
SEVERE_AT_ONCE: Final = 1_000


@dataclass(frozen=True, slots=True)
class Streak:
    """How long a rule has been failing.

    Attributes:
        rule_id: the rule.
        since: the first day (UTC) with executions after the last week in which it kept the floor; its first day of
            all where it never did.
        days: from that day to the day of its last execution, both included, so at least 1.
        failures: executions since then not reported as success.
    """

    rule_id: str
    since: dt.date
    days: int
    failures: int

    @property
    def severe(self) -> bool:
        """Whether this is an error and no longer a warning."""
        return self.failures >= SEVERE_AT_ONCE or (self.days >= SEVERE_DAYS and self.failures >= SEVERE_FAILURES)


def since_when(streak: Streak | None) -> str:
    """`failing since 2026-02-01, 15 days, 1,204 failures`; without a streak, that the rule kept the floor lately."""
    if streak is None:
        return "it kept the floor in its last week"
    days = "1 day" if streak.days == 1 else f"{streak.days} days"
    return f"failing since {streak.since}, {days}, {streak.failures:,} failures"


def streaks(
    connection: sa.Connection, rule_ids: Sequence[str], *, below: float = BELOW, at_least: int = AT_LEAST
) -> dict[str, Streak]:
    """Since when these rules have been failing; rules that kept the floor to their last day are missing.

    A single good day of two executions ends nothing: a rule kept the floor on a day if at least `at_least` executions
    of the 7 days up to it succeeded to at least `below` (a fraction).
    """
    if not rule_ids:
        return {}
    rows = connection.execute(
        sa.text(
            """
            WITH days AS (
              SELECT rule_id, day, sum(executions) AS executions, sum(raw_successes) AS successes,
                sum(raw_failures) AS failures
              FROM rule_daily_stats
              WHERE rule_id = ANY(:ids) AND executions > 0
              GROUP BY rule_id, day
            ),
            weeks AS (
              SELECT *, sum(executions) OVER week AS week_executions, sum(successes) OVER week AS week_successes
              FROM days
              WINDOW week AS (PARTITION BY rule_id ORDER BY day RANGE BETWEEN '6 days' PRECEDING AND CURRENT ROW)
            ),
            kept AS (
              SELECT rule_id, max(day) AS day
              FROM weeks
              WHERE week_executions >= :at_least AND week_successes >= CAST(:below AS double precision) * week_executions
              GROUP BY rule_id
            )
            SELECT d.rule_id, min(d.day) AS since, max(d.day) - min(d.day) + 1 AS days, sum(d.failures)::bigint AS failures
            FROM days AS d
            LEFT JOIN kept AS k ON k.rule_id = d.rule_id
            WHERE k.day IS NULL OR d.day > k.day
            GROUP BY d.rule_id
            """
        ),
        {"ids": list(rule_ids), "below": below, "at_least": at_least},
    )
    return {row.rule_id: Streak(row.rule_id, row.since, row.days, row.failures) for row in rows}
