/*---
name: rule_failure_cells
room: health
materialized: view
grain: one row per L1 rule, site, host, agent version, os, hardware, UTC day, outcome class and error step
description: >
  What failure attribution searches: the executions of a rule counted by all that may tell where it fails.
  An attribution reads a rule's cells once, packed by host; a million executions on 2,000 hosts are some 400,000 cells. What an agent does not
  send (agent version, os, hardware) is null and never named as a cause. Synthetic rows are left out.
owner: team:data-platform
key: [rule_id, site_id, hostname, agent_version, os, hardware, day, outcome_class, error_step]
columns:
  rule_id: [text, the L1 rule]
  site_id: [text, the site under its name of today]
  hostname: [text, "the host: the cluster of every test; it never leaves the attribution"]
  agent_version: [text, release of the agent; null where it did not say]
  os: [text, operating system; null where the agent did not say]
  hardware: [text, kind of machine; null where the agent did not say]
  day: [date, UTC day of event time]
  outcome_class: [text, as in executions]
  error_step: [integer, the step that failed; null on a success and where unknown]
  executions: [bigint, executions]
  successes: [bigint, reported as success]
consumers: [failure_attribution, flywheel why]
---*/
SELECT
  rule_id,
  site_id,
  hostname,
  agent_version,
  os,
  hardware,
  day,
  outcome_class,
  error_step,
  count(*) AS executions,
  count(*) FILTER (WHERE success) AS successes
FROM executions
WHERE level = 'L1' AND outcome_class <> 'synthetic'
GROUP BY rule_id, site_id, hostname, agent_version, os, hardware, day, outcome_class, error_step
