/*---
name: unresolved_rule_ids
room: aggregates
materialized: view
grain: one row per rule id that L1 telemetry names and the registry does not know
description: >
  Rule ids nobody registered, with how often and since when; they are counted and listed, never dropped.
  An alias (flywheel aliases add-rule) or a registration resolves one.
owner: team:data-platform
key: [rule_id]
columns:
  rule_id: [text, the id as telemetry names it]
  executions: [bigint, executions that are not synthetic]
  raw_successes: [bigint, reported as success]
  sites: [bigint, sites that report it]
  first_seen: [timestamptz, first execution]
  last_seen: [timestamptz, last execution]
consumers: [unresolved ids check, flywheel status]
---*/
SELECT
  s.rule_id,
  sum(s.executions)::bigint AS executions,
  sum(s.raw_successes)::bigint AS raw_successes,
  count(DISTINCT s.site_id) AS sites,
  min(s.first_at) AS first_seen,
  max(s.last_at) AS last_seen
FROM rule_site_stats AS s
WHERE NOT EXISTS (SELECT 1 FROM l1_rules AS r WHERE r.rule_id = s.rule_id)
GROUP BY s.rule_id
