/*---
name: rule_hosts
room: aggregates
materialized: view
grain: one row per L1 rule, site and host
description: >
  The host's view of a rule: on how many hosts it works, beside how often it works.
  A handful of dead hosts that fire every few hours ruins an execution rate and hardly moves the share of healthy hosts.
owner: team:data-platform
key: [rule_id, site_id, hostname]
columns:
  rule_id: [text, the L1 rule]
  site_id: [text, the site under its name of today]
  hostname: [text, the host]
  executions: [bigint, all but synthetic]
  raw_failures: [bigint, not reported as success]
  rated_episodes: [bigint, host-days with a rated outcome]
  successful_episodes: [bigint, host-days healed for good]
  episode_rate: [double precision, "fraction: successful / rated episodes"]
  last_at: [timestamptz, last execution]
consumers: [flywheel explain, failing rules report]
---*/
SELECT
  rule_id,
  site_id,
  hostname,
  sum(executions)::bigint AS executions,
  sum(raw_failures)::bigint AS raw_failures,
  count(*) FILTER (WHERE outcome <> 'unrated') AS rated_episodes,
  count(*) FILTER (WHERE outcome = 'success') AS successful_episodes,
  count(*) FILTER (WHERE outcome = 'success')::double precision / nullif(count(*) FILTER (WHERE outcome <> 'unrated'), 0) AS episode_rate,
  max(last_at) AS last_at
FROM episodes
WHERE level = 'L1'
GROUP BY rule_id, site_id, hostname
