/*---
name: deployments
room: delivery
materialized: view
grain: one row per promoted rule, version and appliance that should run it, is kept from it, or was told of it
description: >
  How far each promoted rule got on each appliance: promoted, queued, delivered, acknowledged and executed are five
  different things, and withheld is a sixth. In the system before, two months lay between the first two and nobody
  saw it. Built-in rules are not here, they ship with the agent. An execution counts from the delivery
  of its version to that of the next (an imported rule was delivered before anybody kept record); where the
  agent did not say which appliance it runs on, it counts for the only appliance of its site. What the agent
  refused as an unknown action is no execution. Executions are as of the last refresh; the log is not read.
owner: team:fleet-delivery
key: [rule_id, rule_version, appliance_id]
columns:
  rule_id: [text, the promoted rule]
  rule_version: [integer, its version]
  appliance_id: [text, "<site_id>-<MAC>"]
  site_id: [text, site of the appliance; null where the appliance is gone]
  wanted: [boolean, whether its manifest holds this version now]
  state: [text, "withheld where the agent cannot run it; else the furthest it got: promoted, queued, delivered, acknowledged or executed"]
  command_status: [text, "pending, delivered, acknowledged, failed, expired or superseded; null: never queued"]
  withheld_reason: [text, why the appliance cannot run it]
  promoted_at: [timestamptz, when this version entered service; null where the ledger does not say]
  queued_at: [timestamptz, when the command was first queued]
  delivered_at: [timestamptz, when the appliance first fetched the command]
  acknowledged_at: [timestamptz, when the appliance said it was done]
  first_executed_at: [timestamptz, first execution there after the delivery]
consumers: [flywheel status, service levels of delivery]
---*/
WITH told AS (
  SELECT
    rule_id,
    rule_version,
    appliance_id,
    status,
    created_at AS queued_at,
    coalesce(told_at, delivered_at) AS delivered_at,
    acknowledged_at
  FROM appliance_commands
  WHERE command_type = 'sync_promoted_rule' AND rule_id IS NOT NULL AND rule_version IS NOT NULL
),
listed AS MATERIALIZED (
  SELECT c.content_hash, r.rule_id, r.rule_version, NULL::text AS withheld_reason
  FROM manifest_contents AS c
  CROSS JOIN LATERAL unnest(c.rule_ids, c.rule_versions) AS r(rule_id, rule_version)
  UNION ALL
  SELECT
    c.content_hash,
    w.rule ->> 'rule_id' AS rule_id,
    (w.rule ->> 'version')::integer AS rule_version,
    w.rule ->> 'reason' AS withheld_reason
  FROM manifest_contents AS c
  CROSS JOIN LATERAL jsonb_array_elements(c.withheld) AS w(rule)
  WHERE w.rule ->> 'source' <> 'builtin'
),
desired AS (
  SELECT
    m.appliance_id,
    c.rule_id,
    c.rule_version,
    c.withheld_reason
  FROM appliance_manifests AS m
  JOIN listed AS c ON c.content_hash = m.content_hash
),
pairs AS (
  SELECT
    coalesce(d.rule_id, c.rule_id) AS rule_id,
    coalesce(d.rule_version, c.rule_version) AS rule_version,
    coalesce(d.appliance_id, c.appliance_id) AS appliance_id,
    d.appliance_id IS NOT NULL AND d.withheld_reason IS NULL AS wanted,
    d.withheld_reason,
    c.status AS command_status,
    c.queued_at,
    c.delivered_at,
    c.acknowledged_at,
    lead(c.delivered_at) OVER (
      PARTITION BY coalesce(d.rule_id, c.rule_id), coalesce(d.appliance_id, c.appliance_id)
      ORDER BY coalesce(d.rule_version, c.rule_version)
    ) AS replaced_at
  FROM desired AS d
  FULL JOIN told AS c
    ON c.rule_id = d.rule_id AND c.rule_version = d.rule_version AND c.appliance_id = d.appliance_id
),
homes AS (
  SELECT
    a.appliance_id,
    coalesce(m.site_id, a.site_id) AS site_id,
    count(*) FILTER (WHERE a.status <> 'retired') OVER (PARTITION BY coalesce(m.site_id, a.site_id)) = 1 AS alone
  FROM appliances AS a
  LEFT JOIN appliance_manifests AS m ON m.appliance_id = a.appliance_id
),
promotions AS (
  SELECT rule_id, rule_version, min(occurred_at) AS promoted_at,
    min(occurred_at) FILTER (WHERE kind = 'imported') AS imported_at
  FROM rule_events
  WHERE to_state IN ('canary', 'ring', 'fleet')
  GROUP BY rule_id, rule_version
),
executed AS (
  SELECT p.rule_id, p.rule_version, p.appliance_id, x.first_executed_at
  FROM pairs AS p
  JOIN homes AS h ON h.appliance_id = p.appliance_id
  LEFT JOIN promotions AS v ON v.rule_id = p.rule_id AND v.rule_version = p.rule_version
  JOIN rule_site_stats AS s
    ON s.site_id = h.site_id AND s.rule_id = p.rule_id AND s.last_at >= coalesce(p.delivered_at, v.imported_at)
  CROSS JOIN LATERAL (
    SELECT
      (
        SELECT min(t.at) FROM unnest(e.event_times) AS t(at)
        WHERE t.at >= coalesce(p.delivered_at, v.imported_at) AND t.at < coalesce(p.replaced_at, 'infinity')
      ) AS first_executed_at
    FROM appliance_executions AS e
    WHERE e.site_id = h.site_id
      AND e.rule_id = p.rule_id
      AND e.refused_form = ''
      AND e.day >= (coalesce(p.delivered_at, v.imported_at) AT TIME ZONE 'UTC')::date
      AND e.last_at >= coalesce(p.delivered_at, v.imported_at)
      AND e.first_at < coalesce(p.replaced_at, 'infinity')
      AND (e.appliance_id = p.appliance_id OR (e.appliance_id = 'unknown' AND h.alone))
      AND EXISTS (
        SELECT 1 FROM unnest(e.event_times) AS t(at)
        WHERE t.at >= coalesce(p.delivered_at, v.imported_at) AND t.at < coalesce(p.replaced_at, 'infinity')
      )
    ORDER BY e.day, 1
    LIMIT 1
  ) AS x
)
SELECT
  p.rule_id::text AS rule_id,
  p.rule_version::integer AS rule_version,
  p.appliance_id::text AS appliance_id,
  h.site_id::text AS site_id,
  p.wanted,
  CASE
    WHEN p.withheld_reason IS NOT NULL THEN 'withheld'
    WHEN x.first_executed_at IS NOT NULL THEN 'executed'
    WHEN p.acknowledged_at IS NOT NULL THEN 'acknowledged'
    WHEN p.delivered_at IS NOT NULL THEN 'delivered'
    WHEN p.command_status = 'pending' THEN 'queued'
    ELSE 'promoted'
  END AS state,
  p.command_status::text AS command_status,
  p.withheld_reason::text AS withheld_reason,
  v.promoted_at,
  p.queued_at,
  p.delivered_at,
  p.acknowledged_at,
  x.first_executed_at
FROM pairs AS p
LEFT JOIN homes AS h ON h.appliance_id = p.appliance_id
LEFT JOIN executed AS x
  ON x.rule_id = p.rule_id AND x.rule_version = p.rule_version AND x.appliance_id = p.appliance_id
LEFT JOIN promotions AS v ON v.rule_id = p.rule_id AND v.rule_version = p.rule_version
