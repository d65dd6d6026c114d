-- What the planner cannot know of expressions over telemetry: without these it takes 0.5 % of the rows for L1 and every
-- error message for another one, sorts on disk and never goes parallel. Counting 1 M rows by rule, day and outcome class
-- took 6.9 s without and 1.1 s with them. They live by ANALYZE, so an insert pays nothing.

CREATE STATISTICS IF NOT EXISTS flywheel_levels
  ON (flywheel_level(resolution_level, rule_id, runbook_id)) FROM execution_telemetry;

CREATE STATISTICS IF NOT EXISTS flywheel_signatures (ndistinct)
  ON (coalesce(error_message, '')), (coalesce(failure_type, '')), (coalesce(status, '')) FROM execution_telemetry;

CREATE STATISTICS IF NOT EXISTS flywheel_rule_days (ndistinct)
  ON (flywheel_rule_ref(flywheel_level(resolution_level, rule_id, runbook_id), rule_id, runbook_id)),
     ((event_at AT TIME ZONE 'UTC')::date) FROM execution_telemetry;

-- How many rules there are by the columns that name them: a count by rule then goes parallel as a whole (1 M rows: 0.57 s
-- without, 0.47 s with). An empty table that nobody analysed is taken for forty aliases, which spoils the estimate.
CREATE STATISTICS IF NOT EXISTS flywheel_rule_names (ndistinct)
  ON resolution_level, rule_id, runbook_id FROM execution_telemetry;

-- How many rows the recount leaves out: without these the planner expects 0.2 % of the rows to remain, and sorts on disk
-- (1 M rows: 1.0 s without, 0.5 s with).
CREATE STATISTICS IF NOT EXISTS flywheel_clock_leads
  ON (event_at - created_at) FROM execution_telemetry;

CREATE STATISTICS IF NOT EXISTS flywheel_synthetic
  ON (coalesce(tags @> '{"synthetic": true}', false)) FROM execution_telemetry;

ANALYZE rule_aliases, site_aliases;
