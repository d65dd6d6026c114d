/*---
name: episodes
room: aggregates
materialized: cell
cell: day
grain: one row per site, UTC day, level, rule, incident type, runbook, platform and host
description: >
  The unit of evidence: what one rule or runbook did about one drift on one host in one day.
  Executions of a day collapse to one episode, so a dead host that is tried every few hours counts once. A verified
  success counts only where the same host did not drift again in the same way within 24 hours, whoever healed it
  then. Synthetic rows are counted in their own column and enter no other.
owner: team:data-platform
key: [site_id, day, level, rule_id, incident_type, runbook_id, platform, hostname]
indexes: [[rule_id, first_at]]
columns:
  site_id: [text, the site under its name of today]
  day: [date, UTC day of event time]
  level: [text, "L1, L2, L3 or unknown"]
  rule_id: [text, the L1 rule that matched; empty on other levels]
  incident_type: [text, what drifted]
  runbook_id: [text, the runbook that ran or the pseudo-runbook reported]
  platform: [text, "windows, linux, macos or unknown"]
  hostname: [text, the host]
  first_at: [timestamptz, first execution that is not synthetic; null where all are]
  last_at: [timestamptz, "last such execution; the outcome is settled 24 hours later"]
  executions: [bigint, all but synthetic]
  raw_successes: [bigint, reported as success]
  raw_failures: [bigint, not reported as success]
  synthetic: [bigint, chaos and test rows; in no other count]
  agent_unsupported: [bigint, the agent was too old for the action]
  not_applicable: [bigint, the host cannot have this control]
  unreachable: [bigint, "host, credentials or network"]
  escalated: [bigint, handed over to a human]
  suppressed: [bigint, flap suppression or cooldown]
  unverified: [bigint, "success reported, verification missing"]
  failures: [bigint, "failed, or reported success against its own verification"]
  successes: [bigint, verified successes]
  refired: [bigint, verified successes after which the same drift came back within 24 hours]
  outcome: [text, "success, failure, or unrated where no execution was rated"]
  agent_version: [text, "release of the agent at the last rated execution; unknown where it did not say or none was rated"]
consumers: [rule_daily_stats, pattern_daily_stats, pattern_evidence, rule_hosts, rule_episodes]
---*/
WITH marked AS (
  SELECT
    e.execution_id,
    e.site_id,
    e.hostname,
    e.platform,
    e.incident_type,
    e.level,
    e.rule_id,
    e.runbook_id,
    e.agent_version,
    e.event_at,
    e.day,
    e.success,
    e.outcome_class,
    max(e.event_at) FILTER (WHERE e.outcome_class <> 'synthetic') OVER (
      PARTITION BY e.site_id, e.hostname, e.incident_type
      ORDER BY e.event_at
      RANGE BETWEEN CURRENT ROW AND '24 hours' FOLLOWING
    ) > e.event_at AS came_back
  FROM executions AS e
)
SELECT
  site_id,
  day,
  level,
  rule_id,
  incident_type,
  runbook_id,
  platform,
  hostname,
  min(event_at) FILTER (WHERE outcome_class <> 'synthetic') AS first_at,
  max(event_at) FILTER (WHERE outcome_class <> 'synthetic') AS last_at,
  count(*) FILTER (WHERE outcome_class <> 'synthetic') AS executions,
  count(*) FILTER (WHERE outcome_class <> 'synthetic' AND success) AS raw_successes,
  count(*) FILTER (WHERE outcome_class <> 'synthetic' AND NOT success) AS raw_failures,
  count(*) FILTER (WHERE outcome_class = 'synthetic') AS synthetic,
  count(*) FILTER (WHERE outcome_class = 'agent_unsupported') AS agent_unsupported,
  count(*) FILTER (WHERE outcome_class = 'not_applicable') AS not_applicable,
  count(*) FILTER (WHERE outcome_class = 'unreachable') AS unreachable,
  count(*) FILTER (WHERE outcome_class = 'escalated') AS escalated,
  count(*) FILTER (WHERE outcome_class = 'suppressed') AS suppressed,
  count(*) FILTER (WHERE outcome_class = 'unverified') AS unverified,
  count(*) FILTER (WHERE outcome_class = 'failure') AS failures,
  count(*) FILTER (WHERE outcome_class = 'success') AS successes,
  count(*) FILTER (WHERE outcome_class = 'success' AND came_back) AS refired,
  CASE
    WHEN count(*) FILTER (WHERE outcome_class IN ('success', 'failure')) = 0 THEN 'unrated'
    WHEN bool_or(outcome_class = 'success' AND came_back) THEN 'failure'
    WHEN (array_agg(outcome_class ORDER BY event_at DESC, execution_id COLLATE "C" DESC) FILTER (WHERE outcome_class IN ('success', 'failure')))[1] = 'success' THEN 'success'
    ELSE 'failure'
  END AS outcome,
  coalesce(
    (array_agg(agent_version ORDER BY event_at DESC, execution_id COLLATE "C" DESC) FILTER (WHERE outcome_class IN ('success', 'failure')))[1],
    'unknown'
  ) AS agent_version
FROM marked
GROUP BY site_id, day, level, rule_id, incident_type, runbook_id, platform, hostname
