/*---
name: overdue_deployments
room: delivery
materialized: view
grain: one row per promoted rule version and appliance that wants it and has not delivered or not executed it
description: >
  What stands between promoted and executed, with its age: rules that an appliance should run and never fetched, and
  rules that it fetched and never executed. The latter may be as it should be: nothing drifted there yet. Ages count
  from the promotion or the delivery, against the clock of the last batch (a replay has its own).
owner: team:fleet-delivery
key: [rule_id, rule_version, appliance_id]
columns:
  rule_id: [text, the promoted rule]
  rule_version: [integer, its version]
  appliance_id: [text, "<site_id>-<MAC>"]
  site_id: [text, site of the appliance]
  agent_version: [text, release of its agent]
  problem: [text, never_delivered or never_executed]
  live: [boolean, "whether the appliance was heard of within seven days of that clock; nobody else can fetch anything"]
  since: [timestamptz, "promotion or queueing, whichever is later, for never_delivered; delivery for never_executed"]
  age_hours: [double precision, hours since then; null where nobody knows]
  command_status: [text, state of its command; null where none was queued]
consumers: [the checks of the service levels]
---*/
WITH clock AS (
  SELECT coalesce((SELECT b.as_of FROM refresh_batches AS b ORDER BY b.batch_id DESC LIMIT 1), now()) AS now_at
),
waiting AS (
  SELECT
    d.rule_id,
    d.rule_version,
    d.appliance_id,
    d.site_id,
    CASE WHEN d.delivered_at IS NULL THEN 'never_delivered' ELSE 'never_executed' END AS problem,
    CASE WHEN d.delivered_at IS NULL THEN greatest(d.promoted_at, d.queued_at) ELSE d.delivered_at END AS since,
    d.command_status
  FROM deployments AS d
  WHERE d.wanted AND d.first_executed_at IS NULL
)
SELECT
  w.rule_id,
  w.rule_version,
  w.appliance_id,
  w.site_id,
  a.agent_version::text AS agent_version,
  w.problem::text AS problem,
  coalesce(a.status = 'online' AND a.last_checkin >= k.now_at - interval '7 days', false) AS live,
  w.since,
  CASE
    WHEN w.since IS NOT NULL THEN greatest(extract(epoch FROM k.now_at - w.since) / 3600, 0)
  END::double precision AS age_hours,
  w.command_status
FROM waiting AS w
CROSS JOIN clock AS k
LEFT JOIN appliances AS a ON a.appliance_id = w.appliance_id
