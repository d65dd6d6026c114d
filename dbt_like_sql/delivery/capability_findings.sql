/*---
name: capability_findings
room: delivery
materialized: view
grain: one row per site, appliance, agent release and action form that the agent answered with `Unknown action`
description: >
  Which agents have shown in telemetry that they cannot run an action form, whatever their release or their report
  says. Where the claim and the telemetry contradict each other, telemetry wins: while a finding is open, its appliances
  get the form no more, but an older equivalent one or nothing. It is open until the appliance runs another release;
  where the report named no release, until the appliance reports something under the release it has now. Reports that
  name no appliance count for every appliance of their site.
owner: team:fleet-delivery
key: [site_id, appliance_id, agent_version, action_form]
columns:
  site_id: [text, the site under its name of today]
  appliance_id: [text, "<site_id>-<MAC>, or unknown where the agent did not say"]
  agent_version: [text, release of the agent as it said; empty where it did not]
  action_form: [text, "the form that it did not know; unknown where it did not say"]
  executions: [bigint, reports of it]
  first_seen: [timestamptz, the first of them]
  last_seen: [timestamptz, the last of them]
  rule_ids: ["text[]", rules whose execution ended so]
  open_on: ["text[]", appliances that get the form no more for it; empty where none runs that release any more]
  claimed_by: [text, "report or version: by what one of those appliances claims to run the form; null: none does"]
consumers: [rule_manifests, the check agents_run_what_they_claim]
---*/
WITH refused AS (
  SELECT
    site_id,
    appliance_id,
    agent_version,
    refused_form AS action_form,
    sum(executions)::bigint AS executions,
    min(first_at) AS first_seen,
    max(last_at) AS last_seen,
    array_remove(array_agg(DISTINCT rule_id), '') AS rule_ids
  FROM appliance_executions
  WHERE refused_form > ''
  GROUP BY site_id, appliance_id, agent_version, refused_form
),
homes AS (
  SELECT
    a.appliance_id,
    coalesce(m.site_id, a.site_id) AS site_id,
    a.agent_version,
    a.capabilities
  FROM appliances AS a
  LEFT JOIN appliance_manifests AS m ON m.appliance_id = a.appliance_id
  WHERE a.status <> 'retired'
),
held AS (
  SELECT
    r.site_id,
    r.appliance_id,
    r.agent_version,
    r.action_form,
    array_agg(h.appliance_id::text ORDER BY h.appliance_id) AS open_on,
    min(flywheel_claims(h.agent_version, h.capabilities, r.action_form)) AS claimed_by
  FROM refused AS r
  JOIN homes AS h
    ON h.appliance_id = r.appliance_id OR (r.appliance_id = 'unknown' AND h.site_id = r.site_id)
  WHERE CASE
    WHEN coalesce(h.agent_version, '') = '' THEN true
    WHEN r.agent_version <> ''
      THEN coalesce(flywheel_version(h.agent_version)::text, h.agent_version)
        = coalesce(flywheel_version(r.agent_version)::text, r.agent_version)
    ELSE NOT EXISTS (
      SELECT 1 FROM appliance_executions AS e
      WHERE e.site_id = r.site_id
        AND e.appliance_id IN (h.appliance_id, r.appliance_id)
        AND e.last_at > r.last_seen
        AND e.day >= (r.last_seen AT TIME ZONE 'UTC')::date
        AND e.agent_version = h.agent_version
    )
  END
  GROUP BY r.site_id, r.appliance_id, r.agent_version, r.action_form
)
SELECT
  r.site_id,
  r.appliance_id,
  r.agent_version,
  r.action_form,
  r.executions,
  r.first_seen,
  r.last_seen,
  r.rule_ids,
  coalesce(h.open_on, '{}'::text[]) AS open_on,
  h.claimed_by
FROM refused AS r
LEFT JOIN held AS h
  ON h.site_id = r.site_id AND h.appliance_id = r.appliance_id
  AND h.agent_version = r.agent_version AND h.action_form = r.action_form
