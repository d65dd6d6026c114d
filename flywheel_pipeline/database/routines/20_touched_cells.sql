-- The outbox. Statement-level triggers with transition tables append the touched (site, UTC day) cells in the
-- writer's own transaction: whatever commits is in the outbox, whatever rolls back is not, in any commit order.
-- Append-only and without a key, so that concurrent writers never wait for each other.
-- The NOTIFY is a hint for a waiting sensor; the outbox is the truth.

CREATE OR REPLACE FUNCTION flywheel_touch_inserted() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO touched_cells (site_id, day) SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date FROM new_rows;
  PERFORM pg_notify('flywheel_telemetry', '');
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_deleted() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO touched_cells (site_id, day) SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date FROM old_rows;
  PERFORM pg_notify('flywheel_telemetry', '');
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_updated() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO touched_cells (site_id, day)
  SELECT site_id, (event_at AT TIME ZONE 'UTC')::date FROM old_rows
  UNION
  SELECT site_id, (event_at AT TIME ZONE 'UTC')::date FROM new_rows;

  INSERT INTO execution_corrections (execution_id, before, after)
  SELECT o.execution_id, d.before, d.after
  FROM old_rows o
  JOIN new_rows n USING (id)
  CROSS JOIN LATERAL (
    SELECT jsonb_object_agg(a.key, b.value) AS before, jsonb_object_agg(a.key, a.value) AS after
    FROM jsonb_each(to_jsonb(n)) a
    JOIN jsonb_each(to_jsonb(o)) b USING (key)
    WHERE a.value IS DISTINCT FROM b.value
  ) d
  WHERE d.before IS NOT NULL;
  PERFORM pg_notify('flywheel_telemetry', '');
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_all() RETURNS bigint LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  cells bigint;
BEGIN
  INSERT INTO touched_cells (site_id, day)
  SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date FROM execution_telemetry;
  GET DIAGNOSTICS cells = ROW_COUNT;
  PERFORM pg_notify('flywheel_telemetry', '');
  RETURN cells;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_truncated() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
BEGIN
  PERFORM flywheel_touch_all();  -- before the rows go: TRUNCATE has no transition table
  RETURN NULL;
END $$;

DROP TRIGGER IF EXISTS flywheel_touch_inserted ON execution_telemetry;
CREATE TRIGGER flywheel_touch_inserted AFTER INSERT ON execution_telemetry
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION flywheel_touch_inserted();
DROP TRIGGER IF EXISTS flywheel_touch_updated ON execution_telemetry;
CREATE TRIGGER flywheel_touch_updated AFTER UPDATE ON execution_telemetry
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION flywheel_touch_updated();
DROP TRIGGER IF EXISTS flywheel_touch_deleted ON execution_telemetry;
CREATE TRIGGER flywheel_touch_deleted AFTER DELETE ON execution_telemetry
  REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION flywheel_touch_deleted();
DROP TRIGGER IF EXISTS flywheel_touch_truncated ON execution_telemetry;
CREATE TRIGGER flywheel_touch_truncated BEFORE TRUNCATE ON execution_telemetry
  FOR EACH STATEMENT EXECUTE FUNCTION flywheel_touch_truncated();

-- A changed alias or class rule changes how old rows read, never the rows: it touches the cells it may change.

CREATE OR REPLACE FUNCTION flywheel_touch_site(alias text, target text) RETURNS void LANGUAGE sql
SET search_path = public, pg_temp AS $$
  INSERT INTO touched_cells (site_id, day)
  SELECT s.site_id, d.day
  FROM (SELECT DISTINCT (event_at AT TIME ZONE 'UTC')::date AS day FROM execution_telemetry WHERE site_id = alias) d
  CROSS JOIN (VALUES (alias), (target)) s (site_id);
  SELECT pg_notify('flywheel_telemetry', '');
$$;

CREATE OR REPLACE FUNCTION flywheel_touch_rule(alias text) RETURNS void LANGUAGE sql
SET search_path = public, pg_temp AS $$
  INSERT INTO touched_cells (site_id, day)
  SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date
  FROM execution_telemetry t
  WHERE flywheel_rule_ref(flywheel_level(t.resolution_level, t.rule_id, t.runbook_id), t.rule_id, t.runbook_id) = alias;
  SELECT pg_notify('flywheel_telemetry', '');
$$;

CREATE OR REPLACE FUNCTION flywheel_touch_class_rule(rule outcome_class_rules) RETURNS void LANGUAGE sql
SET search_path = public, pg_temp AS $$
  INSERT INTO touched_cells (site_id, day)
  SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date
  FROM execution_telemetry t
  WHERE (CASE rule.field WHEN 'error_message' THEN t.error_message WHEN 'failure_type' THEN t.failure_type ELSE t.status END) ILIKE rule.pattern;
  SELECT pg_notify('flywheel_telemetry', '');
$$;

CREATE OR REPLACE FUNCTION flywheel_touch_reading() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
BEGIN
  -- OLD is null on INSERT, NEW on DELETE.
  IF TG_TABLE_NAME = 'site_aliases' THEN
    IF TG_OP <> 'INSERT' THEN PERFORM flywheel_touch_site(OLD.alias, OLD.site_id); END IF;
    IF TG_OP <> 'DELETE' THEN PERFORM flywheel_touch_site(NEW.alias, NEW.site_id); END IF;
  ELSIF TG_TABLE_NAME = 'rule_aliases' THEN
    IF TG_OP <> 'INSERT' THEN PERFORM flywheel_touch_rule(OLD.alias); END IF;
    IF TG_OP <> 'DELETE' THEN PERFORM flywheel_touch_rule(NEW.alias); END IF;
  ELSE
    IF TG_OP <> 'INSERT' AND OLD.enabled THEN PERFORM flywheel_touch_class_rule(OLD); END IF;
    IF TG_OP <> 'DELETE' AND NEW.enabled THEN PERFORM flywheel_touch_class_rule(NEW); END IF;
  END IF;
  RETURN NULL;
END $$;

DROP TRIGGER IF EXISTS flywheel_touch_reading ON site_aliases;
CREATE TRIGGER flywheel_touch_reading AFTER INSERT OR UPDATE OR DELETE ON site_aliases FOR EACH ROW EXECUTE FUNCTION flywheel_touch_reading();
DROP TRIGGER IF EXISTS flywheel_touch_reading ON rule_aliases;
CREATE TRIGGER flywheel_touch_reading AFTER INSERT OR UPDATE OR DELETE ON rule_aliases FOR EACH ROW EXECUTE FUNCTION flywheel_touch_reading();
DROP TRIGGER IF EXISTS flywheel_touch_reading ON outcome_class_rules;
CREATE TRIGGER flywheel_touch_reading AFTER INSERT OR UPDATE OR DELETE ON outcome_class_rules FOR EACH ROW EXECUTE FUNCTION flywheel_touch_reading();

CREATE OR REPLACE FUNCTION flywheel_refuse_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'TRUNCATE of % is refused', TG_TABLE_NAME USING HINT = 'delete the rows: only then are the cells they change recomputed';
END $$;
DROP TRIGGER IF EXISTS flywheel_refuse_truncate ON site_aliases;
CREATE TRIGGER flywheel_refuse_truncate BEFORE TRUNCATE ON site_aliases FOR EACH STATEMENT EXECUTE FUNCTION flywheel_refuse_truncate();
DROP TRIGGER IF EXISTS flywheel_refuse_truncate ON rule_aliases;
CREATE TRIGGER flywheel_refuse_truncate BEFORE TRUNCATE ON rule_aliases FOR EACH STATEMENT EXECUTE FUNCTION flywheel_refuse_truncate();
DROP TRIGGER IF EXISTS flywheel_refuse_truncate ON outcome_class_rules;
CREATE TRIGGER flywheel_refuse_truncate BEFORE TRUNCATE ON outcome_class_rules FOR EACH STATEMENT EXECUTE FUNCTION flywheel_refuse_truncate();
