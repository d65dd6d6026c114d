"""History for a backtest: what L2 did with each pattern, episode by episode, from the database.

Belongs here: reading patterns and their episodes as `backtest.py` takes them. Does not belong here: replaying them.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.promotion.backtest import Candidate, EpisodeLog, replay_history, summary
from flywheel_pipeline.promotion.decide import load_pattern_evidence
from flywheel_pipeline.promotion.policy import Policy

_EPISODES = sa.text(
    """
    SELECT flywheel_pattern_key(incident_type, runbook_id, platform) AS pattern_key, site_id, hostname, first_at,
           CASE outcome WHEN 'unrated' THEN NULL ELSE outcome = 'success' END AS succeeded, executions, raw_successes
    FROM episodes
    WHERE level = 'L2' AND executions > 0
      AND (CAST(:since AS date) IS NULL OR day >= :since) AND (CAST(:until AS date) IS NULL OR day <= :until)
    ORDER BY first_at, site_id, hostname
    """
)


@dataclass(frozen=True)
class History:
    """Candidates with their logs; times are days since `origin` (midnight, UTC), and there is a look at each midnight."""

    origin: dt.datetime | None
    candidates: tuple[Candidate, ...]
    looks: tuple[float, ...]

    def day(self, at: float | None) -> str | None:
        """Return the UTC day that ended at a look, ISO; None for none."""
        if at is None or self.origin is None:
            return None
        return (self.origin + dt.timedelta(days=at - 1)).date().isoformat()


def load_history(
    connection: sa.Connection,
    batch: Batch,
    policy: Policy,
    *,
    since: dt.date | None = None,
    until: dt.date | None = None,
) -> History:
    """Return every pattern that L2 executed in these days, both ends included, as history of this policy.

    Runbook, agents, shadowed rules, approvers and rejections are those of now; the checks of past days are taken as
    green, and every pattern begins as new.
    """
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    moments: list[dt.datetime] = []
    for row in connection.execute(_EPISODES, {"since": since, "until": until}):
        moments.append(row.first_at)
        rows[row.pattern_key].append(
            (row.first_at, row.site_id, row.hostname, row.succeeded, row.executions, row.raw_successes)
        )
    if not moments:
        return History(None, (), ())
    origin = min(moments).astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)

    def days(at: dt.datetime) -> float:
        return (at - origin).total_seconds() / 86400

    facts = load_pattern_evidence(connection, batch, policy, sorted(rows))
    candidates = tuple(
        Candidate(
            replace(fact, stage="none", attempt=1, checks_green=True),
            EpisodeLog.of((days(at), *rest) for at, *rest in rows[fact.pattern_key]),
        )
        for fact in facts
    )
    # Up to the first midnight by which the last episode has settled.
    last = int(days(max(moments))) + 2
    return History(origin, candidates, tuple(float(day) for day in range(1, last + 1)))


def backtest_history(
    connection: sa.Connection,
    batch: Batch,
    policies: Sequence[Policy],
    *,
    since: dt.date | None = None,
    until: dt.date | None = None,
) -> list[dict[str, Any]]:
    """Replay history through each policy, one look a day; return a row per pattern and policy as JSON types.

    Days are ISO dates (UTC): `served_day` is the day whose end first put the rule on a machine, `fleet_day` on all;
    `later_episodes` and `later_failures` are what came after. `steps` lists every step with its day.
    """
    found: list[tuple[str, int, dict[str, Any]]] = []
    for number, policy in enumerate(policies):
        history = load_history(connection, batch, policy, since=since, until=until)
        results = replay_history(history.candidates, policy, history.looks)
        for result, row in zip(results, summary(results), strict=True):
            dated = {
                **row,
                "served_day": history.day(result.served_at),
                "fleet_day": history.day(result.fleet_at),
                "steps": [
                    {"day": history.day(m.at), "to": m.to_state, "step": m.step, "episodes": m.episodes}
                    for m in result.moves
                ],
            }
            found.append((result.pattern_key, number, dated))
    return [row for _, _, row in sorted(found, key=lambda item: item[:2])]
