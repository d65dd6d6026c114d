/*---
name: appliance_drift
room: delivery
materialized: view
grain: one row per appliance that is not retired
description: >
  What each appliance says it runs against what it should run. Three things can be wrong with one: it never fetched
  anything, it reported no rule set, or it reported another one than its manifest. The age counts from when the state
  began, against the clock of the last batch (a replay has its own). Withdrawn rules that it may still run stand beside.
owner: team:fleet-delivery
key: [appliance_id]
columns:
  appliance_id: [text, "<site_id>-<MAC>"]
  site_id: [text, the site under its name of today; of the register where there is no manifest]
  agent_version: [text, release of the agent as registered]
  status: [text, online or offline]
  last_checkin: [timestamptz, last sign of life; null where there never was one]
  desired_hash: [text, hash of the rules that it should run; null without a manifest]
  reported_hash: [text, hash of the rules that it said it runs; null where it never said]
  built_at: [timestamptz, when its manifest last changed]
  state_reported_at: [timestamptz, when it last reported its state]
  drift: [text, "in_step, differs (it reported another rule set than the manifest), unreported (it never said what it runs), or no_manifest"]
  since: [timestamptz, since when it drifts; null where in step]
  drift_hours: [double precision, hours since then; null where in step]
  tombstones: [integer, rule versions that it was told of and has not let go]
  never_delivered: [bigint, promoted rule versions of its manifest that it never fetched]
consumers: [the checks of the service levels, flywheel status]
---*/
WITH clock AS (
  SELECT coalesce((SELECT b.as_of FROM refresh_batches AS b ORDER BY b.batch_id DESC LIMIT 1), now()) AS now_at
),
waiting AS (
  SELECT appliance_id, count(*) AS never_delivered
  FROM appliance_commands
  WHERE command_type = 'sync_promoted_rule' AND told_at IS NULL AND status IN ('pending', 'delivered', 'expired')
  GROUP BY appliance_id
),
compared AS (
  SELECT
    a.appliance_id,
    coalesce(m.site_id, a.site_id) AS site_id,
    a.agent_version,
    a.status,
    a.last_checkin,
    t.manifest_hash AS desired_hash,
    a.reported_manifest_hash AS reported_hash,
    m.built_at,
    m.drift_since,
    a.state_reported_at,
    CASE
      WHEN m.appliance_id IS NULL THEN 'no_manifest'
      WHEN a.reported_manifest_hash IS NULL THEN 'unreported'
      WHEN a.reported_manifest_hash = t.manifest_hash THEN 'in_step'
      ELSE 'differs'
    END AS drift,
    coalesce(jsonb_array_length(m.tombstones), 0) AS tombstones,
    a.created_at
  FROM appliances AS a
  LEFT JOIN appliance_manifests AS m ON m.appliance_id = a.appliance_id
  LEFT JOIN manifest_contents AS t ON t.content_hash = m.content_hash
  WHERE a.status <> 'retired'
),
dated AS (
  SELECT
    c.*,
    CASE c.drift
      WHEN 'in_step' THEN NULL
      WHEN 'no_manifest' THEN c.created_at
      ELSE coalesce(c.drift_since, c.built_at)
    END AS since
  FROM compared AS c
)
SELECT
  d.appliance_id::text AS appliance_id,
  d.site_id::text AS site_id,
  d.agent_version::text AS agent_version,
  d.status::text AS status,
  d.last_checkin,
  d.desired_hash::text AS desired_hash,
  d.reported_hash::text AS reported_hash,
  d.built_at,
  d.state_reported_at,
  d.drift::text AS drift,
  d.since,
  CASE
    WHEN d.since IS NOT NULL THEN greatest(extract(epoch FROM k.now_at - d.since) / 3600, 0)
  END::double precision AS drift_hours,
  d.tombstones::integer AS tombstones,
  coalesce(w.never_delivered, 0)::bigint AS never_delivered
FROM dated AS d
CROSS JOIN clock AS k
LEFT JOIN waiting AS w ON w.appliance_id = d.appliance_id
