/*---
name: cusum_steps
room: health
materialized: view
grain: one row per policy on record, rule in service, scope, and episode after the rule's checkpoint
description: >
  The CUSUM of each rule in service, episode by episode in event order, in three scopes: site, agent_version and fleet.
  An episode adds ln(bad/good) if it held and ln((1-bad)/(1-good)) if it failed; S is the running sum, W how far it
  stands above its lowest point, zero included: two window functions. Sums begin at the rule's checkpoint where there
  is one, with the W that it holds, so that a run reads days and not years. The rates stand in the policy; ask with
  WHERE policy_hash = …, which every window is partitioned by.
owner: team:data-platform
key: [policy_hash, rule_id, scope_kind, scope_value, site_id, day, incident_type, runbook_id, platform, hostname]
columns:
  policy_hash: [text, the policy whose rates are taken]
  rule_id: [text, the rule]
  rule_version: [integer, its version in service]
  scope_kind: [text, "site, agent_version or fleet"]
  scope_value: [text, "the site, the release, or all"]
  site_id: [text, the site]
  day: [date, UTC day of event time]
  incident_type: [text, what drifted]
  runbook_id: [text, the runbook that ran]
  platform: [text, "windows, linux, macos or unknown"]
  hostname: [text, the host]
  first_at: [timestamptz, first execution]
  failed: [boolean, the drift stayed or came back]
  nth: [bigint, position in event order since the checkpoint]
  s: [double precision, "running sum since the checkpoint, begun with the W that stood there"]
  w: [double precision, "W: the evidence that the rule has become bad in this scope, as a log likelihood ratio"]
consumers: [rule_cusum]
---*/
WITH rates AS MATERIALIZED (
  SELECT
    policy_hash,
    ln((document #>> '{demotion,cusum,bad}')::double precision / (document #>> '{demotion,cusum,good}')::double precision) AS held,
    ln(
      (1 - (document #>> '{demotion,cusum,bad}')::double precision)
      / (1 - (document #>> '{demotion,cusum,good}')::double precision)
    ) AS missed
  FROM policy_documents
  WHERE document #> '{demotion,cusum}' IS NOT NULL
),
scoped AS (
  SELECT
    p.policy_hash::text AS policy_hash,
    e.*,
    x.scope_kind,
    x.scope_value,
    CASE WHEN e.failed THEN p.missed ELSE p.held END AS llr,
    coalesce(c.w, 0) AS w_before
  FROM rule_episodes AS e
  CROSS JOIN rates AS p
  CROSS JOIN LATERAL (
    VALUES ('site', e.site_id), ('agent_version', e.agent_version), ('fleet', 'all')
  ) AS x (scope_kind, scope_value)
  LEFT JOIN cusum_checkpoints AS b
    ON b.policy_hash = p.policy_hash AND b.rule_id = e.rule_id AND b.rule_version = e.rule_version
    AND b.scope_kind = 'fleet' AND b.scope_value = 'all'
  LEFT JOIN cusum_checkpoints AS c
    ON c.policy_hash = p.policy_hash AND c.rule_id = e.rule_id AND c.rule_version = e.rule_version
    AND c.scope_kind = x.scope_kind AND c.scope_value = x.scope_value
  WHERE e.counts AND e.first_at >= coalesce(b.until, '-infinity')
),
summed AS (
  SELECT
    s.*,
    row_number() OVER in_order AS nth,
    s.w_before + sum(s.llr) OVER in_order AS s
  FROM scoped AS s
  WINDOW in_order AS (
    PARTITION BY s.policy_hash, s.rule_id, s.scope_kind, s.scope_value
    ORDER BY s.first_at, s.site_id, s.hostname, s.incident_type, s.day, s.runbook_id, s.platform
    ROWS UNBOUNDED PRECEDING
  )
)
SELECT
  u.policy_hash,
  u.rule_id,
  u.rule_version,
  u.scope_kind,
  u.scope_value,
  u.site_id,
  u.day,
  u.incident_type,
  u.runbook_id,
  u.platform,
  u.hostname,
  u.first_at,
  u.failed,
  u.nth,
  u.s,
  u.s - least(
    0,
    min(u.s) OVER (
      PARTITION BY u.policy_hash, u.rule_id, u.scope_kind, u.scope_value
      ORDER BY u.first_at, u.site_id, u.hostname, u.incident_type, u.day, u.runbook_id, u.platform
      ROWS UNBOUNDED PRECEDING
    )
  ) AS w
FROM summed AS u
