-- Identity: which rule, which runbook and which level a telemetry row speaks of. The one place that knows the
-- legacy forms (the RULE id in runbook_id on L1 rows, L2-<action> on L2 rows). Plain SQL, so PostgreSQL inlines it.

CREATE OR REPLACE FUNCTION flywheel_level(resolution_level text, rule_id text, runbook_id text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE
    WHEN resolution_level IN ('L1', 'L2', 'L3') THEN resolution_level  -- nearly all rows: spelled as it should be
    WHEN upper(btrim(resolution_level)) IN ('L1', 'L2', 'L3') THEN upper(btrim(resolution_level))
    WHEN coalesce(rule_id, '') <> '' OR runbook_id LIKE 'L1-%' OR runbook_id LIKE 'RB-AUTO-%' THEN 'L1'
    WHEN runbook_id LIKE 'L2-%' THEN 'L2'
    ELSE 'unknown'
  END
$$;

CREATE OR REPLACE FUNCTION flywheel_action_runbook(action text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE  -- each row of the log is asked this: a regular expression took 30 times as long
    WHEN action LIKE 'run\_windows\_runbook:_%' THEN substr(action, 21)
    WHEN action LIKE 'run\_runbook:_%' THEN substr(action, 13)
    WHEN action LIKE 'run\_linux\_runbook:_%' THEN substr(action, 19)
    WHEN action LIKE 'run\_macos\_runbook:_%' THEN substr(action, 19)
  END
$$;

COMMENT ON FUNCTION flywheel_action_runbook(text) IS 'run_windows_runbook:RB-WIN-SEC-016 -> RB-WIN-SEC-016; null where an action names no runbook';

CREATE OR REPLACE FUNCTION flywheel_rule_ref(level text, rule_id text, runbook_id text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN level = 'L1' THEN coalesce(nullif(rule_id, ''), runbook_id) ELSE '' END
$$;

COMMENT ON FUNCTION flywheel_rule_ref(text, text, text) IS 'The rule an L1 row was matched by, before aliases; '''' on other levels';

CREATE OR REPLACE FUNCTION flywheel_runbook_ref(level text, rule_id text, runbook_id text, action text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT coalesce(flywheel_action_runbook(action), CASE
    WHEN level = 'L1' AND coalesce(rule_id, '') IN ('', runbook_id) THEN ''
    WHEN runbook_id LIKE 'L2-_%' THEN coalesce(flywheel_action_runbook(substr(runbook_id, 4)), runbook_id)
    ELSE runbook_id
  END)
$$;

COMMENT ON FUNCTION flywheel_runbook_ref(text, text, text, text) IS 'The runbook that ran, or the pseudo-runbook reported; '''' on legacy L1 rows, which never said';

CREATE OR REPLACE FUNCTION flywheel_pattern_key(incident_type text, runbook_id text, platform text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT replace(replace(incident_type, '%', '%25'), '~', '%7E') || '~'
      || replace(replace(runbook_id, '%', '%25'), '~', '%7E') || '~'
      || replace(replace(platform, '%', '%25'), '~', '%7E')
$$;

COMMENT ON FUNCTION flywheel_pattern_key(text, text, text) IS 'Injective: two patterns share a key only if all three parts are equal. Twin of candidates.keys.pattern_key';

CREATE OR REPLACE FUNCTION flywheel_is_placeholder(runbook_id text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT coalesce(btrim(runbook_id), '') = ''
      OR upper(btrim(runbook_id) COLLATE "C") LIKE ANY (ARRAY['AUTO-%', 'L2-%', 'ESC-%', 'UNASSIGNED-%'])
      OR upper(btrim(runbook_id) COLLATE "C") IN ('ESCALATE', 'GENERAL', 'UNKNOWN')
$$;

COMMENT ON FUNCTION flywheel_is_placeholder(text) IS 'On the runbook field only, never on a rule id: RB-AUTO-FIREWALL is a good rule. Twin of promotion.runbook_ids.is_placeholder';

CREATE OR REPLACE FUNCTION flywheel_class_rank(outcome_class text) RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT array_position(ARRAY['synthetic', 'agent_unsupported', 'not_applicable', 'unreachable', 'escalated', 'suppressed'], outcome_class)
$$;

CREATE OR REPLACE FUNCTION flywheel_refuse_alias() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  target_column text := CASE TG_TABLE_NAME WHEN 'site_aliases' THEN 'site_id' ELSE 'rule_id' END;
  clash boolean;
BEGIN
  -- One alias names one thing at any moment, and never another alias: the reading join stays one to one.
  PERFORM pg_advisory_xact_lock(hashtext('flywheel:' || TG_TABLE_NAME));
  EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE alias = $1 AND id <> $2 AND valid_from < $4 AND valid_to > $3)', TG_TABLE_NAME)
    INTO clash USING NEW.alias, NEW.id, NEW.valid_from, NEW.valid_to;
  IF clash THEN
    RAISE EXCEPTION 'alias % already holds during part of that time', NEW.alias USING HINT = 'end the first alias where the second begins';
  END IF;
  EXECUTE format('SELECT EXISTS (SELECT FROM %1$I WHERE id <> $1 AND (alias = $2 OR %2$I = $3))', TG_TABLE_NAME, target_column)
    INTO clash USING NEW.id, to_jsonb(NEW) ->> target_column, NEW.alias;
  IF clash THEN
    RAISE EXCEPTION 'alias % -> % would make a chain of aliases', NEW.alias, to_jsonb(NEW) ->> target_column
      USING HINT = 'point every alias at the name in use today';
  END IF;
  RETURN NEW;
END $$;

DROP TRIGGER IF EXISTS flywheel_refuse_alias ON site_aliases;
CREATE TRIGGER flywheel_refuse_alias BEFORE INSERT OR UPDATE ON site_aliases FOR EACH ROW EXECUTE FUNCTION flywheel_refuse_alias();
DROP TRIGGER IF EXISTS flywheel_refuse_alias ON rule_aliases;
CREATE TRIGGER flywheel_refuse_alias BEFORE INSERT OR UPDATE ON rule_aliases FOR EACH ROW EXECUTE FUNCTION flywheel_refuse_alias();
