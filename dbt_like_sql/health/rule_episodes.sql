/*---
name: rule_episodes
room: health
materialized: view
grain: one row per rated episode of a rule in service, since its version entered service
description: >
  What a CUSUM may look at, in one place: rated episodes of the version in service, and whether they still count.
  An episode counts unless its site or its release of the agent is quarantined for the rule, or was and the quarantine
  was lifted after it began: a lift begins anew. It is not counted twice: what a smaller scope has answered for, a
  larger one does not see.
owner: team:data-platform
key: [rule_id, site_id, day, incident_type, runbook_id, platform, hostname]
columns:
  rule_id: [text, the rule]
  rule_version: [integer, its version in service]
  since: [timestamptz, when this version entered service]
  site_id: [text, the site]
  day: [date, UTC day of event time]
  incident_type: [text, what drifted]
  runbook_id: [text, the runbook that ran]
  platform: [text, "windows, linux, macos or unknown"]
  hostname: [text, the host]
  agent_version: [text, "release of the agent at its last rated execution, or unknown"]
  first_at: [timestamptz, first execution]
  failed: [boolean, the drift stayed or came back]
  counts: [boolean, whether it is outside every scope that is or was quarantined]
consumers: [cusum_steps, demotion]
---*/
WITH watched AS (
  SELECT r.rule_id, r.rule_version, r.pattern_key, r.content_hash, v.since
  FROM l1_rules AS r
  CROSS JOIN LATERAL (
    SELECT min(e.occurred_at) AS since
    FROM rule_events AS e
    WHERE e.rule_id = r.rule_id AND e.rule_version = r.rule_version AND e.to_state IN ('canary', 'ring', 'fleet')
  ) AS v
  WHERE r.enabled AND v.since IS NOT NULL
),
lifts AS (
  SELECT
    r.rule_id,
    q.scope_kind,
    coalesce(a.site_id, q.scope_value) AS scope_value,
    max(q.occurred_at) AS lifted_at
  FROM scope_quarantines AS q
  JOIN watched AS r
    ON (r.rule_id = q.rule_id AND r.rule_version = q.rule_version)
    OR r.pattern_key = q.pattern_key
    OR r.content_hash = q.content_hash
  LEFT JOIN site_aliases AS a
    ON q.scope_kind = 'site' AND a.alias = q.scope_value AND a.valid_to = 'infinity'
  WHERE q.kind = 'lifted'
  GROUP BY r.rule_id, q.scope_kind, coalesce(a.site_id, q.scope_value)
)
SELECT
  w.rule_id::text AS rule_id,
  w.rule_version,
  w.since,
  e.site_id,
  e.day,
  e.incident_type,
  e.runbook_id,
  e.platform,
  e.hostname,
  e.agent_version,
  e.first_at,
  e.outcome = 'failure' AS failed,
  qs.rule_id IS NULL
  AND qa.rule_id IS NULL
  AND e.first_at >= coalesce(ls.lifted_at, '-infinity')
  AND e.first_at >= coalesce(la.lifted_at, '-infinity') AS counts
FROM watched AS w
JOIN episodes AS e
  ON e.level = 'L1' AND e.rule_id = w.rule_id AND e.first_at >= w.since AND e.outcome <> 'unrated'
LEFT JOIN quarantined_scopes AS qs
  ON qs.rule_id = w.rule_id AND qs.scope_kind = 'site' AND qs.scope_value = e.site_id
LEFT JOIN quarantined_scopes AS qa
  ON qa.rule_id = w.rule_id AND qa.scope_kind = 'agent_version' AND qa.scope_value = e.agent_version
LEFT JOIN lifts AS ls
  ON ls.rule_id = w.rule_id AND ls.scope_kind = 'site' AND ls.scope_value = e.site_id
LEFT JOIN lifts AS la
  ON la.rule_id = w.rule_id AND la.scope_kind = 'agent_version' AND la.scope_value = e.agent_version
