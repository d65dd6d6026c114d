/*---
name: rule_manifests
room: delivery
materialized: view
grain: one row per appliance that is not retired
description: >
  What each appliance should run: deterministic and hashed. Thousands of appliances share a few contents, so what stands
  per appliance names its content, and a content names the entries of its rules: each stands once. Rules that its agent cannot run, or has shown that it cannot,
  are withheld and listed with the reason. What it was told of and must drop stands there as a tombstone until it has let
  go.
owner: team:fleet-delivery
key: [appliance_id]
columns:
  appliance_id: [text, "<site_id>-<MAC>"]
  site_id: [text, its site under the name of today]
  manifest_hash: [text, SHA-256 of the rules; appliances with equal rules share it]
  rules: [jsonb, "what this appliance should run, in its deterministic order"]
  withheld: [jsonb, "enabled rules it cannot run, with the reason"]
  rule_count: [integer, how many rules it should run]
  batch_id: [bigint, the batch that last wrote it]
  built_at: [timestamptz, when its content last changed]
  tombstones: [jsonb, "promoted rules it was told of and must drop: {rule_id, version, reason, since}"]
  content_hash: [text, its row of manifest_contents]
  commanded_hash: [text, the content that its commands were last brought in line with]
  drift_since: [timestamptz, "since when the appliance has not reported this rule set; null: it has"]
consumers: [GET /agent/sync, appliance_commands, deployments, appliance_drift]
---*/
SELECT
  m.appliance_id::text AS appliance_id,
  m.site_id::text AS site_id,
  c.manifest_hash::text AS manifest_hash,
  flywheel_manifest_rules(c.entry_ids) AS rules,
  c.withheld,
  c.rule_count,
  m.batch_id,
  m.built_at,
  m.tombstones,
  m.content_hash::text AS content_hash,
  m.commanded_hash::text AS commanded_hash,
  m.drift_since
FROM appliance_manifests AS m
JOIN manifest_contents AS c ON c.content_hash = m.content_hash
