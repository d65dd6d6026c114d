/*---
name: rule_month_stats
room: aggregates
materialized: cell
cell: month
grain: one row per site, calendar month (UTC) and L1 rule
description: >
  What each L1 rule did at one site in one month.
  The step between days and all time: a refresh adds up the days of the touched months and then the months, so its
  cost does not grow with the years.
owner: team:data-platform
key: [site_id, month, rule_id]
indexes: [[site_id, rule_id, month]]
columns:
  site_id: [text, "the site under its name of today"]
  month: [date, "first day of the month, UTC"]
  rule_id: [text, "the L1 rule, aliases resolved"]
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
consumers: [rule_site_stats]
---*/
SELECT
  site_id,
  date_trunc('month', day::timestamp)::date AS month,
  rule_id,
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
  sum(episodes)::bigint AS episodes,
  sum(rated_episodes)::bigint AS rated_episodes,
  sum(successful_episodes)::bigint AS successful_episodes,
  min(first_at) AS first_at,
  max(last_at) AS last_at
FROM rule_daily_stats
GROUP BY site_id, date_trunc('month', day::timestamp)::date, rule_id
