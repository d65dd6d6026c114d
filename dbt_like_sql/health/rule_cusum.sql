/*---
name: rule_cusum
room: health
materialized: view
grain: one row per policy on record, rule in service and scope
description: >
  Where the CUSUM of each rule in service stands in each scope, and when it first alarmed.
  Warn and quarantine are the policy's two limits on W. An alarm is looked for since the rule's checkpoint: what
  stood above the limit before it has been acted upon.
owner: team:data-platform
key: [policy_hash, rule_id, scope_kind, scope_value]
columns:
  policy_hash: [text, the policy whose rates and limits are taken]
  rule_id: [text, the rule]
  rule_version: [integer, its version in service]
  scope_kind: [text, "site, agent_version or fleet"]
  scope_value: [text, "the site, the release, or all"]
  episodes: [bigint, rated episodes of this version that count]
  failures: [bigint, those that failed]
  s: [double precision, running sum since the checkpoint]
  w: [double precision, W after the last episode]
  w_peak: [double precision, highest W since the checkpoint]
  warned_at: [timestamptz, "first episode with W at the limit to warn; null: none"]
  alarmed_at: [timestamptz, "first episode with W at the limit to quarantine; null: none"]
  alarmed_nth: [bigint, its position since the checkpoint]
consumers: [demotion, flywheel explain]
---*/
WITH limits AS MATERIALIZED (
  SELECT
    policy_hash::text AS policy_hash,
    (document #>> '{demotion,cusum,warn_at}')::double precision AS warn_at,
    (document #>> '{demotion,cusum,quarantine_at}')::double precision AS quarantine_at
  FROM policy_documents
),
walked AS (
  SELECT
    t.policy_hash,
    t.rule_id,
    t.rule_version,
    t.scope_kind,
    t.scope_value,
    count(*) AS episodes,
    count(*) FILTER (WHERE t.failed) AS failures,
    (array_agg(t.s ORDER BY t.nth DESC))[1] AS s,
    (array_agg(t.w ORDER BY t.nth DESC))[1] AS w,
    max(t.w) AS w_peak,
    min(t.first_at) FILTER (WHERE t.w >= l.warn_at) AS warned_at,
    min(t.first_at) FILTER (WHERE t.w >= l.quarantine_at) AS alarmed_at,
    min(t.nth) FILTER (WHERE t.w >= l.quarantine_at) AS alarmed_nth
  FROM cusum_steps AS t
  JOIN limits AS l ON l.policy_hash = t.policy_hash
  GROUP BY t.policy_hash, t.rule_id, t.rule_version, t.scope_kind, t.scope_value
),
stood AS (
  SELECT c.*
  FROM cusum_checkpoints AS c
  JOIN l1_rules AS r ON r.rule_id = c.rule_id AND r.rule_version = c.rule_version AND r.enabled
)
SELECT
  coalesce(k.policy_hash, c.policy_hash)::text AS policy_hash,
  coalesce(k.rule_id, c.rule_id)::text AS rule_id,
  coalesce(k.rule_version, c.rule_version) AS rule_version,
  coalesce(k.scope_kind, c.scope_kind)::text AS scope_kind,
  coalesce(k.scope_value, c.scope_value)::text AS scope_value,
  coalesce(k.episodes, 0) + coalesce(c.episodes, 0) AS episodes,
  coalesce(k.failures, 0) + coalesce(c.failures, 0) AS failures,
  coalesce(k.s, c.w) AS s,
  coalesce(k.w, c.w) AS w,
  greatest(k.w_peak, c.w) AS w_peak,
  k.warned_at,
  k.alarmed_at,
  k.alarmed_nth
FROM walked AS k
FULL JOIN stood AS c
  ON c.policy_hash = k.policy_hash
  AND c.rule_id = k.rule_id
  AND c.rule_version = k.rule_version
  AND c.scope_kind = k.scope_kind
  AND c.scope_value = k.scope_value
