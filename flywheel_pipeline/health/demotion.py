"""Demotion from the database's side: where every CUSUM stands, and which scopes of a rule leave service.

Belongs here: reading the models of the health room, and the checkpoints that keep a run from reading years. Does not
belong here: the walk over one rule's episodes (`cusum.py`), the decision (`promotion/gates.py`) and its application.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence

import sqlalchemy as sa

from flywheel_pipeline.health.cusum import Attribution, RatedEpisode, ScopeFigure, attribute
from flywheel_pipeline.promotion.policy import Cusum, Policy

WORST = 3  # scopes of each kind that are read for a rule beside those that warn


def load_scopes(
    connection: sa.Connection, policy: Policy, rule_ids: Sequence[str] | None = None
) -> dict[str, tuple[ScopeFigure, ...]]:
    """Return by rule in service the fleet's figure, those that warn, and the worst of each kind; highest W first."""
    found: dict[str, list[ScopeFigure]] = defaultdict(list)
    for row in connection.execute(
        sa.text(
            """
            SELECT rule_id, scope_kind, scope_value, episodes, failures, w, w_peak
            FROM (
              SELECT c.*, row_number() OVER (
                PARTITION BY rule_id, scope_kind ORDER BY failures DESC, w DESC, scope_value) AS nth
              FROM rule_cusum AS c
              WHERE policy_hash = :policy AND (CAST(:ids AS text[]) IS NULL OR rule_id = ANY(CAST(:ids AS text[])))
            ) AS c
            WHERE scope_kind = 'fleet' OR w_peak >= :warn OR nth <= :worst
            ORDER BY rule_id, scope_kind = 'fleet' DESC, w DESC, scope_kind, scope_value
            """
        ),
        {
            "policy": policy.policy_hash,
            "ids": None if rule_ids is None else list(rule_ids),
            "warn": policy.demotion.cusum.warn_at,
            "worst": WORST,
        },
    ):
        found[row.rule_id].append(
            ScopeFigure(
                row.scope_kind, row.scope_value, row.episodes, row.failures, round(row.w, 9), round(row.w_peak, 9)
            )
        )
    return {rule_id: tuple(figures) for rule_id, figures in found.items()}


def attribute_rules(connection: sa.Connection, rule_ids: Sequence[str], c: Cusum) -> dict[str, Attribution]:
    """Walk the episodes of these rules since their version entered service, and say which scopes leave service."""
    episodes: dict[str, list[RatedEpisode]] = defaultdict(list)
    sites: dict[str, set[str]] = defaultdict(set)
    if not rule_ids:
        return {}
    for row in connection.execute(
        sa.text(
            "SELECT rule_id, site_id, agent_version, failed, first_at, counts FROM rule_episodes "
            "WHERE rule_id = ANY(:ids) "
            "ORDER BY rule_id, first_at, site_id, hostname, incident_type, day, runbook_id, platform"
        ),
        {"ids": list(rule_ids)},
    ):
        sites[row.rule_id].add(row.site_id)
        if row.counts:
            episodes[row.rule_id].append(
                RatedEpisode(row.site_id, row.agent_version, row.failed, row.first_at.astimezone(dt.UTC).isoformat())
            )
    out: dict[str, list[str]] = defaultdict(list)
    for row in connection.execute(
        sa.text(
            "SELECT rule_id, scope_value FROM quarantined_scopes WHERE rule_id = ANY(:ids) AND scope_kind = 'site'"
        ),
        {"ids": list(rule_ids)},
    ):
        out[row.rule_id].append(row.scope_value)
    return {
        rule_id: attribute(
            episodes[rule_id], c, sites_out=out[rule_id], sites_run=len(sites[rule_id] | set(out[rule_id]))
        )
        for rule_id in rule_ids
    }


def drop_changed_checkpoints(connection: sa.Connection) -> int:
    """Within a refresh: delete the checkpoints that a written episode lies before; return how many rows went."""
    return connection.execute(
        sa.text(
            "DELETE FROM cusum_checkpoints AS c USING ("
            "  SELECT rule_id, min(day) AS day FROM pg_temp.changed_episodes WHERE level = 'L1' GROUP BY rule_id"
            ") AS e WHERE e.rule_id = c.rule_id AND (e.day::timestamp AT TIME ZONE 'UTC') < c.until"
        )
    ).rowcount


def drop_checkpoints_of_scope(connection: sa.Connection) -> int:
    """Within a rebuild that wrote episodes: delete every checkpoint behind the first day in scope; return how many rows.

    A rebuild does not note which of a million episodes it wrote: noting them took 4 % of its time. What is deleted too
    much costs the next run a reading of these rules' episodes since they entered service.
    """
    return connection.execute(
        sa.text(
            "DELETE FROM cusum_checkpoints "
            "WHERE until > (SELECT min(day) FROM pg_temp.scope_days)::timestamp AT TIME ZONE 'UTC'"
        )
    ).rowcount


def advance_checkpoints(connection: sa.Connection, policy: Policy, now: dt.datetime) -> int:
    """Move the checkpoints up to midnight some days ago, for rules without an alarm; return how many rules moved.

    `checkpoint_days` leave time for outcomes to settle (24 hours) and for late rows; a row that comes later still
    deletes the checkpoint in the refresh that reads it, and the next run begins at the version's first episode.
    """
    horizon = dt.datetime.combine(now.astimezone(dt.UTC).date(), dt.time(), dt.UTC) - dt.timedelta(
        days=policy.demotion.cusum.checkpoint_days
    )
    values: dict[str, object] = {
        "policy": policy.policy_hash,
        "until": horizon,
        "limit": policy.demotion.cusum.quarantine_at,
    }
    behind = list(
        connection.execute(
            sa.text(
                """
                SELECT r.rule_id
                FROM l1_rules AS r
                WHERE r.enabled
                  AND NOT EXISTS (
                    SELECT 1 FROM cusum_checkpoints AS c WHERE c.policy_hash = :policy AND c.rule_id = r.rule_id
                      AND c.scope_kind = 'fleet' AND c.until >= :until)
                ORDER BY r.rule_id
                """
            ),
            values,
        ).scalars()
    )
    if not behind:
        return 0
    # Once for both questions below: the walk over the episodes is what costs.
    connection.execute(
        sa.text(
            """
            CREATE TEMP TABLE present_steps ON COMMIT DROP AS
            SELECT rule_id, rule_version, scope_kind, scope_value, first_at, failed, nth, w
            FROM cusum_steps
            WHERE policy_hash = :policy AND rule_id = ANY(:behind)
            """
        ),
        {**values, "behind": behind},
    )
    due = list(
        connection.execute(
            sa.text(
                """
                SELECT k.rule_id
                FROM (
                  SELECT rule_id, w FROM present_steps
                  UNION ALL
                  SELECT c.rule_id, c.w
                  FROM cusum_checkpoints AS c
                  JOIN l1_rules AS r ON r.rule_id = c.rule_id AND r.rule_version = c.rule_version AND r.enabled
                  WHERE c.policy_hash = :policy AND c.rule_id = ANY(:behind)
                ) AS k
                GROUP BY k.rule_id
                HAVING max(k.w) < :limit
                ORDER BY k.rule_id
                """
            ),
            {**values, "behind": behind},
        ).scalars()
    )
    if not due:
        connection.execute(sa.text("DROP TABLE present_steps"))
        return 0
    connection.execute(
        sa.text(
            """
            CREATE TEMP TABLE advanced_checkpoints ON COMMIT DROP AS
            SELECT rule_id, rule_version, scope_kind, scope_value, count(*) AS episodes,
                   count(*) FILTER (WHERE failed) AS failures, (array_agg(w ORDER BY nth DESC))[1] AS w
            FROM present_steps
            WHERE rule_id = ANY(:due) AND first_at < :until
            GROUP BY rule_id, rule_version, scope_kind, scope_value
            """
        ),
        {**values, "due": due},
    )
    connection.execute(
        sa.text(
            """
            UPDATE cusum_checkpoints AS c SET until = :until
            FROM l1_rules AS r
            WHERE c.policy_hash = :policy AND c.rule_id = ANY(:due) AND r.rule_id = c.rule_id
              AND r.rule_version = c.rule_version
            """
        ),
        {**values, "due": due},
    )
    connection.execute(
        sa.text(
            """
            INSERT INTO cusum_checkpoints AS c
              (policy_hash, rule_id, rule_version, scope_kind, scope_value, until, episodes, failures, w)
            SELECT :policy, rule_id, rule_version, scope_kind, scope_value, :until, episodes, failures, w
            FROM advanced_checkpoints
            ON CONFLICT (policy_hash, rule_id, rule_version, scope_kind, scope_value) DO UPDATE SET
              until = excluded.until, episodes = c.episodes + excluded.episodes,
              failures = c.failures + excluded.failures, w = excluded.w
            """
        ),
        values,
    )
    connection.execute(sa.text("DROP TABLE present_steps, advanced_checkpoints"))
    connection.execute(
        sa.text(
            "DELETE FROM cusum_checkpoints AS c WHERE NOT EXISTS (SELECT 1 FROM l1_rules AS r "
            "WHERE r.rule_id = c.rule_id AND r.rule_version = c.rule_version AND r.enabled)"
        )
    )
    # Without figures the planner pairs each step with every checkpoint of its rule.
    connection.execute(sa.text("ANALYZE cusum_checkpoints"))
    return len(due)
