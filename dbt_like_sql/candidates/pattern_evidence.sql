/*---
name: pattern_evidence
room: candidates
materialized: view
grain: one row per rated L2 episode of a pattern
description: >
  The rated episodes of each pattern in the order of event time, numbered by host and by site for the caps.
  The gate takes the first 3 of a host and the first 10 of a site, the earliest ones, so that evidence cannot be
  picked; and only episodes that are settled, 24 hours after their last execution.
owner: team:data-platform
key: [pattern_key, site_id, day, hostname]
columns:
  pattern_key: [text, injective key of the three parts]
  site_id: [text, the site under its name of today]
  day: [date, UTC day of event time]
  hostname: [text, the host]
  succeeded: [boolean, healed for good]
  first_at: [timestamptz, first execution]
  last_at: [timestamptz, last execution]
  nth_of_host: [bigint, position among the episodes of this host]
consumers: [promotion_decisions]
---*/
SELECT
  flywheel_pattern_key(incident_type, runbook_id, platform) AS pattern_key,
  site_id,
  day,
  hostname,
  outcome = 'success' AS succeeded,
  first_at,
  last_at,
  row_number() OVER (
    PARTITION BY flywheel_pattern_key(incident_type, runbook_id, platform), site_id, hostname ORDER BY first_at, day
  ) AS nth_of_host
FROM episodes
WHERE level = 'L2' AND outcome <> 'unrated'
