"""An independent recount: the counters against plain SQL over the log, sharing no text with the models.

Belongs here: queries that return offenders. Does not belong here: the Dagster check around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa


@dataclass(frozen=True)
class Recount:
    """What a recount found. `offenders` lists at most 20 differences; `differences` counts them all."""

    cells: int
    rules: int
    differences: int
    offenders: tuple[dict[str, object], ...]


# Cells that wait in the outbox (with the day before them, under every name of their site) are left out: they changed
# after the refresh, and outbox and log are read in one snapshot.
_CELLS = """
CREATE TEMP TABLE recount_cells ON COMMIT DROP AS
WITH seen AS (
  SELECT DISTINCT coalesce(a.site_id, t.site_id)::text AS site_id, (t.event_at AT TIME ZONE 'UTC')::date AS day
  FROM execution_telemetry t
  LEFT JOIN site_aliases a ON a.alias = t.site_id AND t.event_at >= a.valid_from AND t.event_at < a.valid_to
  UNION
  SELECT site_id, day FROM rule_daily_stats
),
moving AS (
  SELECT site_id, day FROM touched_cells
  UNION SELECT a.site_id, c.day FROM touched_cells c JOIN site_aliases a ON a.alias = c.site_id
)
SELECT s.site_id, s.day FROM seen s
WHERE NOT EXISTS (SELECT 1 FROM moving m WHERE m.site_id = s.site_id AND s.day IN (m.day, m.day - 1))
  AND NOT EXISTS (SELECT 1 FROM sealed_days d WHERE d.day = s.day)
ORDER BY {order} {limit}
"""
_DIFFERENCES = """
WITH recounted AS (
  SELECT coalesce(sa.site_id, t.site_id)::text AS site_id, (t.event_at AT TIME ZONE 'UTC')::date AS day,
         coalesce(ra.rule_id, x.named)::text AS rule_id,
         count(*) AS matches, sum(t.success::int) AS successes, sum((NOT t.success)::int) AS failures
  FROM execution_telemetry t
  CROSS JOIN LATERAL (SELECT CASE WHEN t.rule_id <> '' THEN t.rule_id ELSE t.runbook_id END AS named) x
  LEFT JOIN site_aliases sa ON sa.alias = t.site_id AND t.event_at >= sa.valid_from AND t.event_at < sa.valid_to
  LEFT JOIN rule_aliases ra ON ra.alias = x.named AND t.event_at >= ra.valid_from AND t.event_at < ra.valid_to
  WHERE flywheel_level(t.resolution_level, t.rule_id, t.runbook_id) = 'L1'
    AND t.chaos_campaign_id IS NULL AND NOT coalesce(t.tags @> '{"synthetic": true}', false)
    AND NOT EXISTS (
      SELECT 1 FROM outcome_class_rules o
      WHERE o.enabled AND o.outcome_class = 'synthetic'
        AND CASE o.field WHEN 'error_message' THEN t.error_message WHEN 'failure_type' THEN t.failure_type ELSE t.status END
            ILIKE o.pattern
    )
    AND t.event_at - t.created_at BETWEEN interval '-730 days' AND interval '10 minutes'
  GROUP BY 1, 2, 3
)
SELECT coalesce(r.site_id, s.site_id) AS site_id, coalesce(r.day, s.day) AS day, coalesce(r.rule_id, s.rule_id) AS rule_id,
       s.executions AS counted_matches, r.matches AS recounted_matches,
       s.raw_successes AS counted_successes, r.successes AS recounted_successes
FROM (SELECT q.* FROM recounted q JOIN recount_cells USING (site_id, day)) r
FULL JOIN (SELECT q.* FROM rule_daily_stats q JOIN recount_cells USING (site_id, day) WHERE q.executions > 0) s
  ON (s.site_id, s.day, s.rule_id) = (r.site_id, r.day, r.rule_id)
WHERE (s.executions, s.raw_successes, s.raw_failures) IS DISTINCT FROM (r.matches, r.successes, r.failures)
"""
_ROLLED_UP = """
SELECT r.rule_id, r.match_count AS counted_matches, coalesce(sum(d.executions), 0)::bigint AS recounted_matches,
       r.success_count AS counted_successes, coalesce(sum(d.raw_successes), 0)::bigint AS recounted_successes
FROM l1_rules r LEFT JOIN rule_daily_stats d ON d.rule_id = r.rule_id
GROUP BY r.rule_id, r.match_count, r.success_count, r.failure_count
HAVING (r.match_count, r.success_count, r.failure_count) IS DISTINCT FROM
       (coalesce(sum(d.executions), 0), coalesce(sum(d.raw_successes), 0), coalesce(sum(d.raw_failures), 0))
"""


def recount(engine: sa.Engine, *, sample_cells: int | None = None) -> Recount:
    """Compare every counter with a recount from the log, in one snapshot.

    Args:
        engine: the database.
        sample_cells: recount so many site-days drawn at random; None recounts all of them. The roll-up of all days
            into the counters of `l1_rules` is compared in full either way.

    Returns:
        The differences; none means equal.
    """
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        order, limit = ("site_id, day", "") if sample_cells is None else ("random()", f"LIMIT {int(sample_cells)}")
        connection.exec_driver_sql(_CELLS.format(order=order, limit=limit))
        # Each site-day of the log looks itself up here; the planner expects one of them, and without an index scans.
        connection.exec_driver_sql("CREATE UNIQUE INDEX ON recount_cells (site_id, day)")
        connection.exec_driver_sql("ANALYZE recount_cells")
        cells = connection.exec_driver_sql("SELECT count(*) FROM recount_cells").scalar_one()
        rules = connection.exec_driver_sql("SELECT count(*) FROM l1_rules").scalar_one()
        found = [dict(row) for row in connection.exec_driver_sql(_DIFFERENCES).mappings()]
        found += [dict(row) for row in connection.exec_driver_sql(_ROLLED_UP).mappings()]
    return Recount(cells, rules, len(found), tuple(found[:20]))
