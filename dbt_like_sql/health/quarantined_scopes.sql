/*---
name: quarantined_scopes
room: health
materialized: view
grain: one row per rule and part of the fleet that it is kept from
description: >
  Where a rule must not run although it is in service: at a site, or on a release of the agent.
  The last event of a scope says whether its quarantine stands; it stands for that version of the rule and for every
  copy of it, which shares its pattern or its content, a re-admitted version included. Of several that stand, the
  first is shown.
owner: team:fleet-delivery
key: [rule_id, scope_kind, scope_value]
columns:
  rule_id: [text, the rule that is kept from the scope]
  rule_version: [integer, its version of today]
  scope_kind: [text, site or agent_version]
  scope_value: [text, "the site, under its name of today, or the release; unknown: agents that do not say"]
  origin_rule_id: [text, "the rule that was quarantined there; another one: this rule is a copy of it"]
  origin_version: [integer, its version]
  actor: [text, who decided it]
  reason: [text, why]
  evidence: [jsonb, "W, episodes and window, where a CUSUM decided it"]
  since: [timestamptz, when]
  event_id: [bigint, its row in scope_quarantines]
consumers: [rule_manifests, rule_episodes, flywheel explain, flywheel status]
---*/
WITH standing AS (
  SELECT *
  FROM (
    SELECT DISTINCT ON (rule_id, rule_version, scope_kind, scope_value) *
    FROM scope_quarantines
    ORDER BY rule_id, rule_version, scope_kind, scope_value, event_id DESC
  ) AS last_events
  WHERE kind = 'quarantined'
)
SELECT DISTINCT ON (r.rule_id, s.scope_kind, coalesce(a.site_id, s.scope_value))
  r.rule_id::text AS rule_id,
  r.rule_version,
  s.scope_kind::text AS scope_kind,
  coalesce(a.site_id, s.scope_value)::text AS scope_value,
  s.rule_id::text AS origin_rule_id,
  s.rule_version AS origin_version,
  s.actor::text AS actor,
  s.reason,
  s.evidence,
  s.occurred_at AS since,
  s.event_id
FROM standing AS s
JOIN l1_rules AS r
  ON (r.rule_id = s.rule_id AND r.rule_version = s.rule_version)
  OR r.pattern_key = s.pattern_key
  OR r.content_hash = s.content_hash
LEFT JOIN site_aliases AS a
  ON s.scope_kind = 'site' AND a.alias = s.scope_value AND a.valid_to = 'infinity'
ORDER BY r.rule_id, s.scope_kind, coalesce(a.site_id, s.scope_value), s.event_id
