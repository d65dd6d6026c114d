/*---
name: executions
room: telemetry
materialized: view
grain: one row per execution in execution_telemetry whose event time is credible
description: >
  Every execution, read once and for all: identities resolved, outcome classified.
  Sites and rules go through their aliases as valid at event time; legacy rows (rule id in runbook_id,
  L2-<action>) are taken apart by the flywheel_* functions of database/routines/10_identity.sql. The outcome class
  is the first that applies: synthetic, then the best class among the matching rows of outcome_class_rules, then
  failure, unverified, success. Rows dated after their arrival (10 minutes) or two years before it are left out
  here and listed by the check no_skewed_clocks.
owner: team:data-platform
key: [execution_id]
columns:
  execution_id: [text, idempotency key given by the agent]
  site_id: [text, the site under its name of today]
  appliance_id: [text, "<site_id>-<MAC>, or unknown"]
  hostname: [text, the host that drifted]
  platform: [text, "windows, linux, macos or unknown"]
  incident_type: [text, what drifted]
  incident_id: [text, the incident this execution belongs to; null where the agent sent none]
  level: [text, "L1 deterministic rule, L2 language model, L3 human, or unknown"]
  rule_id: [text, "the L1 rule that matched, aliases resolved; empty on other levels"]
  runbook_id: [text, the runbook that ran or the pseudo-runbook reported; empty on legacy L1 rows]
  action: [text, what the agent was told to do; null where it did not say]
  agent_version: [text, release of the agent; null where it did not say]
  event_at: [timestamptz, event time]
  day: [date, UTC day of event time]
  created_at: [timestamptz, arrival time]
  duration_seconds: [double precision, as reported]
  success: [boolean, "as reported, before any doubt"]
  outcome_class: [text, "synthetic, agent_unsupported, not_applicable, unreachable, escalated, suppressed, failure, unverified or success"]
  error_message: [text, as reported]
  error_step: [integer, "the step that failed: as reported, else the last one executed; null on a success"]
  os: [text, "operating system, from tags.os, else state_before.os; null where the agent sends neither"]
  hardware: [text, "kind of machine, from tags.hardware, else state_before.hardware; null where the agent sends neither"]
consumers: [episodes, rule_failure_cells, failing rules report]
---*/
WITH signature_classes AS MATERIALIZED (
  SELECT s.error_message, s.failure_type, s.status, c.outcome_class
  FROM (
    SELECT DISTINCT
      coalesce(error_message, '') AS error_message,
      coalesce(failure_type, '') AS failure_type,
      coalesce(status, '') AS status
    FROM execution_telemetry
  ) AS s
  CROSS JOIN LATERAL (
    SELECT r.outcome_class
    FROM outcome_class_rules AS r
    WHERE r.enabled
      AND CASE r.field WHEN 'error_message' THEN s.error_message WHEN 'failure_type' THEN s.failure_type ELSE s.status END
          ILIKE r.pattern
    ORDER BY flywheel_class_rank(r.outcome_class)
    LIMIT 1
  ) AS c
)
SELECT
  t.execution_id::text AS execution_id,
  coalesce(sa.site_id, t.site_id)::text AS site_id,
  t.appliance_id::text AS appliance_id,
  t.hostname::text AS hostname,
  coalesce(nullif(lower(t.platform), ''), 'unknown') AS platform,
  coalesce(nullif(t.incident_type, ''), 'unknown')::text AS incident_type,
  t.incident_id::text AS incident_id,
  flywheel_level(t.resolution_level, t.rule_id, t.runbook_id) AS level,
  coalesce(ra.rule_id, flywheel_rule_ref(flywheel_level(t.resolution_level, t.rule_id, t.runbook_id), t.rule_id, t.runbook_id))::text AS rule_id,
  flywheel_runbook_ref(flywheel_level(t.resolution_level, t.rule_id, t.runbook_id), t.rule_id, t.runbook_id, t.action) AS runbook_id,
  t.action::text AS action,
  t.agent_version::text AS agent_version,
  t.event_at,
  (t.event_at AT TIME ZONE 'UTC')::date AS day,
  t.created_at,
  t.duration_seconds,
  t.success,
  CASE
    WHEN t.chaos_campaign_id IS NOT NULL OR t.tags @> '{"synthetic": true}' THEN 'synthetic'
    WHEN c.outcome_class IS NOT NULL THEN c.outcome_class
    WHEN NOT t.success OR NOT t.verification_passed THEN 'failure'
    WHEN t.verification_passed IS NULL THEN 'unverified'
    ELSE 'success'
  END::text AS outcome_class,
  t.error_message,
  CASE
    WHEN NOT t.success
      THEN coalesce(t.error_step, CASE WHEN jsonb_typeof(t.executed_steps) = 'array' THEN nullif(jsonb_array_length(t.executed_steps), 0) END)
  END AS error_step,
  nullif(btrim(coalesce(t.tags ->> 'os', t.state_before ->> 'os')), '') AS os,
  nullif(btrim(coalesce(t.tags ->> 'hardware', t.state_before ->> 'hardware')), '') AS hardware
FROM execution_telemetry AS t
LEFT JOIN site_aliases AS sa
  ON sa.alias = t.site_id AND t.event_at >= sa.valid_from AND t.event_at < sa.valid_to
LEFT JOIN rule_aliases AS ra
  ON ra.alias = flywheel_rule_ref(flywheel_level(t.resolution_level, t.rule_id, t.runbook_id), t.rule_id, t.runbook_id)
  AND t.event_at >= ra.valid_from AND t.event_at < ra.valid_to
LEFT JOIN signature_classes AS c
  ON c.error_message = coalesce(t.error_message, '')
  AND c.failure_type = coalesce(t.failure_type, '')
  AND c.status = coalesce(t.status, '')
WHERE t.event_at <= t.created_at + interval '10 minutes'
  AND t.event_at >= t.created_at - interval '730 days'
