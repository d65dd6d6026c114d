/*---
name: telemetry_daily_volume
room: telemetry
materialized: cell
cell: day
grain: one row per site, UTC day, level and agent version
description: >
  How much telemetry there is, from whom, and when the last of it arrived.
  A site or an agent release that stops reporting shows here first. Chaos and test rows are counted, and are no sign of life.
owner: team:data-platform
key: [site_id, day, level, agent_version]
columns:
  site_id: [text, the site under its name of today]
  day: [date, UTC day of event time]
  level: [text, "L1, L2, L3 or unknown"]
  agent_version: [text, release of the agent; unknown where it did not say]
  executions: [bigint, rows with a credible event time]
  raw_successes: [bigint, reported as success]
  synthetic: [bigint, chaos and test rows among them]
  last_event_at: [timestamptz, newest event that is not synthetic; null where all are]
  last_arrival_at: [timestamptz, newest arrival of such an event]
consumers: [telemetry_freshness check, agent_releases_report check, flywheel status]
---*/
SELECT
  site_id,
  day,
  level,
  coalesce(agent_version, 'unknown') AS agent_version,
  count(*) AS executions,
  count(*) FILTER (WHERE success) AS raw_successes,
  count(*) FILTER (WHERE outcome_class = 'synthetic') AS synthetic,
  max(event_at) FILTER (WHERE outcome_class <> 'synthetic') AS last_event_at,
  max(created_at) FILTER (WHERE outcome_class <> 'synthetic') AS last_arrival_at
FROM executions
GROUP BY site_id, day, level, coalesce(agent_version, 'unknown')
