/*---
name: telemetry_violations
room: telemetry
materialized: cell
cell: day
grain: one row per execution that breaks the telemetry contract
description: >
  Rows that came past the intake, by plain SQL or before Flywheel, and break its contract.
  The intake refuses such rows; here they are seen. Skewed clocks (dated after arrival, or two years before it) are
  left out of every figure; the other violations are counted and block promotion while they are recent.
owner: team:data-platform
key: [site_id, day, execution_id]
columns:
  site_id: [text, the site under its name of today]
  day: [date, UTC day of event time]
  execution_id: [text, the offending row]
  problem: [text, "skewed_clock, blank_identity, unknown_level, bad_duration or contradiction"]
  sentence: [text, what is wrong with it]
  created_at: [timestamptz, arrival time]
consumers: [telemetry_contract check, no_skewed_clocks check]
---*/
WITH judged AS (
  SELECT
    coalesce(sa.site_id, t.site_id)::text AS site_id,
    (t.event_at AT TIME ZONE 'UTC')::date AS day,
    t.execution_id::text AS execution_id,
    CASE
      WHEN t.event_at > t.created_at + interval '10 minutes' OR t.event_at < t.created_at - interval '730 days' THEN 'skewed_clock'
      WHEN btrim(t.execution_id) = '' OR btrim(t.site_id) = '' OR btrim(t.hostname) = '' OR btrim(t.runbook_id) = '' THEN 'blank_identity'
      WHEN flywheel_level(t.resolution_level, t.rule_id, t.runbook_id) = 'unknown' THEN 'unknown_level'
      WHEN t.duration_seconds < 0 OR t.completed_at < t.started_at THEN 'bad_duration'
      WHEN (t.success AND t.status = 'failure') OR (NOT t.success AND t.status = 'success') THEN 'contradiction'
    END AS problem,
    t.event_at,
    t.created_at,
    t.resolution_level,
    t.success,
    t.status
  FROM execution_telemetry AS t
  LEFT JOIN site_aliases AS sa
    ON sa.alias = t.site_id AND t.event_at >= sa.valid_from AND t.event_at < sa.valid_to
)
SELECT
  site_id,
  day,
  execution_id,
  problem,
  CASE problem
    WHEN 'skewed_clock' THEN 'dated ' || (event_at AT TIME ZONE 'UTC')::text || ' UTC, arrived ' || (created_at AT TIME ZONE 'UTC')::text || ' UTC'
    WHEN 'blank_identity' THEN 'execution_id, site_id, hostname or runbook_id is blank'
    WHEN 'unknown_level' THEN 'resolution_level is ' || coalesce(resolution_level, 'missing') || ', not L1, L2 or L3'
    WHEN 'bad_duration' THEN 'it ends before it begins, or its duration is negative'
    ELSE 'success is ' || success::text || ' but status is ' || status
  END AS sentence,
  created_at
FROM judged
WHERE problem IS NOT NULL
