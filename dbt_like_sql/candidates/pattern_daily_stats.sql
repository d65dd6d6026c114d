/*---
name: pattern_daily_stats
room: candidates
materialized: cell
cell: day
grain: one row per site, UTC day and pattern (incident type, runbook, platform)
description: >
  What L2 did about one incident type with one runbook on one platform, at one site on one day.
  It comes from telemetry, so the failures are in it. Placeholders are kept as patterns of their own: never promoted, always seen.
owner: team:data-platform
key: [site_id, day, pattern_key]
indexes: [[site_id, pattern_key, day]]
columns:
  site_id: [text, "the site under its name of today"]
  day: [date, "UTC day of event time"]
  pattern_key: [text, "injective key of the three parts, flywheel_pattern_key"]
  incident_type: [text, "what drifted"]
  runbook_id: [text, "the runbook that L2 chose, or the pseudo-runbook reported"]
  platform: [text, "windows, linux, macos or unknown"]
  executions: [bigint, "all but synthetic"]
  raw_successes: [bigint, "reported as success"]
  raw_failures: [bigint, "not reported as success"]
  synthetic: [bigint, "chaos and test rows; in no other count"]
  agent_unsupported: [bigint, "the agent was too old for the action"]
  not_applicable: [bigint, "the host cannot have this control"]
  unreachable: [bigint, "host, credentials or network"]
  escalated: [bigint, "handed over to a human"]
  suppressed: [bigint, "flap suppression or cooldown"]
  unverified: [bigint, "success reported, verification missing"]
  failures: [bigint, "rated failures"]
  successes: [bigint, "verified successes"]
  refired: [bigint, "verified successes after which the drift came back within 24 hours"]
  episodes: [bigint, "host-days with at least one execution that is not synthetic"]
  rated_episodes: [bigint, "host-days with a rated outcome"]
  successful_episodes: [bigint, "host-days healed for good"]
  first_at: [timestamptz, "first execution"]
  last_at: [timestamptz, "last execution"]
consumers: [pattern_month_stats]
---*/
SELECT
  site_id,
  day,
  flywheel_pattern_key(incident_type, runbook_id, platform) AS pattern_key,
  incident_type,
  runbook_id,
  platform,
  sum(executions)::bigint AS executions,
  sum(raw_successes)::bigint AS raw_successes,
  sum(raw_failures)::bigint AS raw_failures,
  sum(synthetic)::bigint AS synthetic,
  sum(agent_unsupported)::bigint AS agent_unsupported,
  sum(not_applicable)::bigint AS not_applicable,
  sum(unreachable)::bigint AS unreachable,
  sum(escalated)::bigint AS escalated,
  sum(suppressed)::bigint AS suppressed,
  sum(unverified)::bigint AS unverified,
  sum(failures)::bigint AS failures,
  sum(successes)::bigint AS successes,
  sum(refired)::bigint AS refired,
  count(*) FILTER (WHERE executions > 0) AS episodes,
  count(*) FILTER (WHERE outcome <> 'unrated') AS rated_episodes,
  count(*) FILTER (WHERE outcome = 'success') AS successful_episodes,
  min(first_at) AS first_at,
  max(last_at) AS last_at
FROM episodes
WHERE level = 'L2'
GROUP BY site_id, day, incident_type, runbook_id, platform
