/*---
name: rule_scorecard
room: aggregates
materialized: view
grain: one row per rule in the registry or seen in telemetry
description: >
  Each rule with its state and its rates side by side: raw, rated executions, episodes.
  A rule with telemetry that the registry does not know stands here as state unknown; nothing is dropped. A rate
  over nothing is null.
owner: team:data-platform
key: [rule_id]
columns:
  rule_id: [text, the L1 rule]
  source: [text, "builtin, promoted; null: unknown to the registry"]
  state: [text, "state in the ledger, or unknown"]
  enabled: [boolean, whether it is served]
  runbook_id: [text, the runbook it runs]
  platform: [text, the platform it is for]
  rule_version: [integer, version in the ledger]
  matches: [bigint, executions that are not synthetic]
  raw_successes: [bigint, reported as success]
  raw_failures: [bigint, not reported as success]
  success_rate: [double precision, "fraction: raw successes / matches"]
  successes: [bigint, verified successes]
  failures: [bigint, rated failures]
  rated_rate: [double precision, "fraction: verified successes / rated executions"]
  excluded: [bigint, "executions with no rating: excluded classes and unverified"]
  refired: [bigint, verified successes that did not hold for 24 hours]
  rated_episodes: [bigint, host-days with a rated outcome]
  successful_episodes: [bigint, host-days healed for good]
  episode_rate: [double precision, "fraction: successful / rated episodes"]
  synthetic: [bigint, chaos and test rows; in no other count]
  agent_unsupported: [bigint, the agent was too old for the action]
  not_applicable: [bigint, the host cannot have this control]
  unreachable: [bigint, "host, credentials or network"]
  escalated: [bigint, handed over to a human]
  suppressed: [bigint, flap suppression or cooldown]
  unverified: [bigint, "success reported, verification missing"]
  sites: [bigint, sites where it matched]
  first_at: [timestamptz, first execution]
  last_at: [timestamptz, last execution]
consumers: [failing_rules check, flywheel status, flywheel explain]
---*/
WITH stats AS (
  SELECT
    rule_id,
    sum(executions)::bigint AS matches,
    sum(raw_successes)::bigint AS raw_successes,
    sum(raw_failures)::bigint AS raw_failures,
    sum(successes)::bigint AS successes,
    sum(failures)::bigint AS failures,
    sum(refired)::bigint AS refired,
    sum(rated_episodes)::bigint AS rated_episodes,
    sum(successful_episodes)::bigint AS successful_episodes,
    sum(synthetic)::bigint AS synthetic,
    sum(agent_unsupported)::bigint AS agent_unsupported,
    sum(not_applicable)::bigint AS not_applicable,
    sum(unreachable)::bigint AS unreachable,
    sum(escalated)::bigint AS escalated,
    sum(suppressed)::bigint AS suppressed,
    sum(unverified)::bigint AS unverified,
    count(*) FILTER (WHERE executions > 0) AS sites,
    min(first_at) AS first_at,
    max(last_at) AS last_at
  FROM rule_site_stats
  GROUP BY rule_id
)
SELECT
  coalesce(r.rule_id, s.rule_id)::text AS rule_id,
  r.source::text AS source,
  coalesce(r.state, 'unknown')::text AS state,
  coalesce(r.enabled, false) AS enabled,
  r.runbook_id::text AS runbook_id,
  r.platform::text AS platform,
  r.rule_version,
  coalesce(s.matches, 0) AS matches,
  coalesce(s.raw_successes, 0) AS raw_successes,
  coalesce(s.raw_failures, 0) AS raw_failures,
  s.raw_successes::double precision / nullif(s.matches, 0) AS success_rate,
  coalesce(s.successes, 0) AS successes,
  coalesce(s.failures, 0) AS failures,
  s.successes::double precision / nullif(s.successes + s.failures, 0) AS rated_rate,
  coalesce(s.matches - s.successes - s.failures, 0) AS excluded,
  coalesce(s.refired, 0) AS refired,
  coalesce(s.rated_episodes, 0) AS rated_episodes,
  coalesce(s.successful_episodes, 0) AS successful_episodes,
  s.successful_episodes::double precision / nullif(s.rated_episodes, 0) AS episode_rate,
  coalesce(s.synthetic, 0) AS synthetic,
  coalesce(s.agent_unsupported, 0) AS agent_unsupported,
  coalesce(s.not_applicable, 0) AS not_applicable,
  coalesce(s.unreachable, 0) AS unreachable,
  coalesce(s.escalated, 0) AS escalated,
  coalesce(s.suppressed, 0) AS suppressed,
  coalesce(s.unverified, 0) AS unverified,
  coalesce(s.sites, 0) AS sites,
  s.first_at,
  s.last_at
FROM l1_rules AS r
FULL JOIN stats AS s ON s.rule_id = r.rule_id
