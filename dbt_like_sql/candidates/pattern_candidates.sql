/*---
name: pattern_candidates
room: candidates
materialized: view
grain: one row per pattern (incident type, runbook, platform), seen in telemetry or imported
description: >
  Every pattern with what the gates ask of it: observed counts, exclusions, selection share, the catalogue's word.
  The success-only counts that the old system stored stand beside the observed ones (reported_occurrences) and
  decide nothing. Selection share: of the L2 episodes of this incident type on this platform, the share in which L2
  chose this runbook; a rule would fire on all of them.
owner: team:data-platform
key: [pattern_key]
columns:
  pattern_key: [text, injective key of the three parts]
  incident_type: [text, what drifted]
  runbook_id: [text, "the runbook, or the pseudo-runbook reported"]
  platform: [text, "windows, linux, macos or unknown"]
  pattern_id: [text, id in patterns; null until written there]
  status: [text, "status in patterns: pending, approved, promoted, rejected; null until written there"]
  reported_occurrences: [integer, "what the success-only stream reported; null: never imported"]
  executions: [bigint, L2 executions that are not synthetic]
  raw_successes: [bigint, reported as success]
  raw_rate: [double precision, "fraction: raw successes / executions"]
  excluded: [bigint, "not rated: excluded classes"]
  unverified: [bigint, "success reported, verification missing"]
  rated_episodes: [bigint, host-days with a rated outcome]
  successful_episodes: [bigint, host-days healed for good]
  chosen_episodes: [bigint, L2 episodes of the type in which this runbook was chosen]
  type_episodes: [bigint, all L2 episodes of the type on the platform]
  selection_share: [double precision, "fraction: chosen / all"]
  sites: [bigint, sites that saw it]
  runbook_problem: [text, "why the runbook cannot be served; null: it can"]
  is_disruptive: [boolean, "the catalogue's word; null where it is not in the catalogue"]
  category: [text, "the catalogue's word"]
  first_at: [timestamptz, first execution]
  last_at: [timestamptz, last execution]
consumers: [promotion_decisions, flywheel explain]
---*/
WITH observed AS (
  SELECT
    pattern_key,
    incident_type,
    runbook_id,
    platform,
    sum(executions)::bigint AS executions,
    sum(raw_successes)::bigint AS raw_successes,
    sum(agent_unsupported + not_applicable + unreachable + escalated + suppressed)::bigint AS excluded,
    sum(unverified)::bigint AS unverified,
    sum(rated_episodes)::bigint AS rated_episodes,
    sum(successful_episodes)::bigint AS successful_episodes,
    sum(episodes)::bigint AS chosen_episodes,
    count(*) FILTER (WHERE executions > 0) AS sites,
    min(first_at) AS first_at,
    max(last_at) AS last_at
  FROM pattern_site_stats
  GROUP BY pattern_key, incident_type, runbook_id, platform
  HAVING sum(executions) > 0
),
types AS (
  SELECT incident_type, platform, sum(chosen_episodes)::bigint AS type_episodes
  FROM observed
  GROUP BY incident_type, platform
)
SELECT
  coalesce(o.pattern_key, p.pattern_key)::text AS pattern_key,
  coalesce(o.incident_type, p.incident_type)::text AS incident_type,
  coalesce(o.runbook_id, p.runbook_id)::text AS runbook_id,
  coalesce(o.platform, p.platform)::text AS platform,
  p.pattern_id::text AS pattern_id,
  p.status::text AS status,
  CASE WHEN p.source = 'imported' THEN p.occurrences END AS reported_occurrences,
  coalesce(o.executions, 0) AS executions,
  coalesce(o.raw_successes, 0) AS raw_successes,
  o.raw_successes::double precision / nullif(o.executions, 0) AS raw_rate,
  coalesce(o.excluded, 0) AS excluded,
  coalesce(o.unverified, 0) AS unverified,
  coalesce(o.rated_episodes, 0) AS rated_episodes,
  coalesce(o.successful_episodes, 0) AS successful_episodes,
  coalesce(o.chosen_episodes, 0) AS chosen_episodes,
  coalesce(t.type_episodes, 0) AS type_episodes,
  o.chosen_episodes::double precision / nullif(t.type_episodes, 0) AS selection_share,
  coalesce(o.sites, 0) AS sites,
  flywheel_runbook_problem(coalesce(o.runbook_id, p.runbook_id)::text, coalesce(o.platform, p.platform)::text) AS runbook_problem,
  b.is_disruptive,
  b.category::text AS category,
  o.first_at,
  o.last_at
FROM observed AS o
FULL JOIN (SELECT * FROM patterns WHERE pattern_key IS NOT NULL) AS p ON p.pattern_key = o.pattern_key
LEFT JOIN types AS t ON t.incident_type = o.incident_type AND t.platform = o.platform
LEFT JOIN runbooks AS b ON b.runbook_id = coalesce(o.runbook_id, p.runbook_id)
