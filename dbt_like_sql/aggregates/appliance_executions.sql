/*---
name: appliance_executions
room: aggregates
materialized: cell
cell: day
grain: one row per site, UTC day, appliance, agent release, L1 rule and refused action form
description: >
  What each appliance ran on a day and what its agent refused, with the event times.
  It answers when a delivered rule was first executed and which agents cannot run an action form, without a look into
  the log. An agent that does not know an action answers `Unknown action: <form>:<argument>`; the form stands in
  refused_form. Synthetic rows are in no count.
owner: team:fleet-delivery
key: [site_id, day, rule_id, appliance_id, agent_version, refused_form]
indexes: [[site_id, rule_id, day], [refused_form]]
columns:
  site_id: [text, the site under its name of today]
  day: [date, UTC day of event time]
  rule_id: [text, "the L1 rule, aliases resolved; empty on other levels, which stand here only where refused"]
  appliance_id: [text, "<site_id>-<MAC>, or unknown where the agent did not say"]
  agent_version: [text, "release of the agent as it said; empty where it did not"]
  refused_form: [text, "the action form that the agent did not know; unknown where it did not say; empty: it ran"]
  executions: [bigint, all but synthetic]
  first_at: [timestamptz, first execution]
  last_at: [timestamptz, last execution]
  event_times: ["timestamptz[]", "event times of all of them, in order"]
consumers: [deployments, capability_findings]
---*/
SELECT
  site_id,
  day,
  rule_id,
  appliance_id,
  coalesce(agent_version, '')::text AS agent_version,
  CASE
    WHEN outcome_class = 'agent_unsupported'
      THEN coalesce(
        substring(error_message FROM '^Unknown action: ([a-z][a-z_]*)'),
        substring(action FROM '^([a-z][a-z_]*)'),
        'unknown'
      )
    ELSE ''
  END::text AS refused_form,
  count(*) AS executions,
  min(event_at) AS first_at,
  max(event_at) AS last_at,
  array_agg(event_at ORDER BY event_at) AS event_times
FROM executions
WHERE outcome_class <> 'synthetic' AND (level = 'L1' OR outcome_class = 'agent_unsupported')
GROUP BY site_id, day, rule_id, appliance_id, coalesce(agent_version, ''), refused_form
