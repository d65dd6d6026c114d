-- The outbox. Statement-level triggers with transition tables append the touched (site, UTC day) cells in the
-- writer's own transaction: whatever commits is in the outbox, whatever rolls back is not, in any commit order.
-- Append-only and without a key, so that concurrent writers never wait for each other.
-- The NOTIFY is a hint for a waiting sensor; the outbox is the truth.
-- The triggers run with their owner's rights: who may write telemetry need not know the outbox.

-- Held by every refresh to the end of its transaction, and by whoever changes how rows are read.
CREATE OR REPLACE FUNCTION flywheel_lock_refresh() RETURNS void LANGUAGE sql AS $$
  SELECT pg_advisory_xact_lock(7380407443113377793)
$$;
COMMENT ON FUNCTION flywheel_lock_refresh() IS 'One refresh at a time. Twin of aggregates.refresh.REFRESH_LOCK';

-- One waker at a time: commits with a NOTIFY in them wait for each other, database-wide (8 writers: 40,000 rows/s with one
-- in each, 65,000 without). Who finds another at it leaves it to him; should he come last after all, the sensor looks by
-- itself every two seconds.
CREATE OR REPLACE FUNCTION flywheel_wake() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF pg_try_advisory_xact_lock(7380407443113377794) THEN
    PERFORM pg_notify('flywheel_telemetry', '');
  END IF;
END $$;

-- Two kinds of days can never be counted: those whose figures were sealed when their telemetry was purged, and those
-- beyond what a date of a neighbouring day can name. The writer is told; the intake parks such rows with the reason.
CREATE OR REPLACE FUNCTION flywheel_refuse_days(days date[]) RETURNS void LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  refused date;
BEGIN
  SELECT d.day INTO refused FROM unnest(days) d (day) WHERE d.day NOT BETWEEN '0001-01-02' AND '9999-12-30' LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'an execution is dated %, which is no day of this calendar', refused
      USING ERRCODE = 'datetime_field_overflow', HINT = 'the event time is started_at, else completed_at, else created_at';
  END IF;
  SELECT s.day INTO refused FROM sealed_days s WHERE s.day = ANY (days) LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'the telemetry of % was purged and its figures are sealed: a late row of that day would never be counted', refused
      USING HINT = 'keep the row aside; sealed figures do not change';
  END IF;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_inserted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
DECLARE
  days date[];
BEGIN
  WITH touched AS (
    INSERT INTO touched_cells (site_id, day)
    SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date FROM new_rows
    RETURNING day
  )
  SELECT array_agg(DISTINCT day) INTO days FROM touched;
  PERFORM flywheel_refuse_days(days);
  PERFORM flywheel_wake();
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_deleted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO touched_cells (site_id, day) SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date FROM old_rows;
  PERFORM flywheel_wake();
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_updated() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
DECLARE
  days date[];
BEGIN
  SELECT array_agg(DISTINCT (event_at AT TIME ZONE 'UTC')::date) INTO days FROM new_rows;
  PERFORM flywheel_refuse_days(days);

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
  PERFORM flywheel_wake();
  RETURN NULL;
END $$;

-- What follows finds cells by looking at committed rows, and changes how all rows are read or removes them. Between its
-- look and its commit no refresh may take the outbox entry of a row that it did not see: that row would be read the old
-- way and never again. So it holds the refresh lock, and looks with a snapshot that is younger than the lock.
CREATE OR REPLACE FUNCTION flywheel_exclude_refresh(what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION '% needs a transaction of isolation level read committed', what
      USING HINT = 'an older snapshot does not show all rows that the change concerns';
  END IF;
  PERFORM flywheel_lock_refresh();
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_all() RETURNS bigint LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  cells bigint;
BEGIN
  PERFORM flywheel_exclude_refresh('touching all cells');
  INSERT INTO touched_cells (site_id, day, written)
  SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date, false FROM execution_telemetry;
  GET DIAGNOSTICS cells = ROW_COUNT;
  PERFORM flywheel_wake();
  RETURN cells;
END $$;

CREATE OR REPLACE FUNCTION flywheel_touch_truncated() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
BEGIN
  -- Before the rows go: TRUNCATE has no transition table. Its table lock is held already, and a refresh may wait for
  -- that lock, so the refresh lock is not asked for: nobody can read or write telemetry until this commits.
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'TRUNCATE of execution_telemetry needs a transaction of isolation level read committed'
      USING HINT = 'an older snapshot does not show all rows that go';
  END IF;
  INSERT INTO touched_cells (site_id, day)
  SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date FROM execution_telemetry;
  PERFORM flywheel_wake();
  RETURN NULL;
END $$;

-- The version of a day's telemetry, by which an archived day is known to be that of today. While written cells of the day
-- wait in the outbox it was changed; whoever takes them notes it here, in the same transaction. So at every moment one of
-- the two says so, and an export that saw neither saw every row: an entry and its rows become visible at once.
CREATE OR REPLACE FUNCTION flywheel_note_days() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO day_versions (day) SELECT day FROM old_rows WHERE written GROUP BY day ORDER BY day
  ON CONFLICT (day) DO UPDATE SET version = excluded.version, noted_at = excluded.noted_at;
  RETURN NULL;
END $$;

-- A writer takes telemetry and then the outbox, a refresh goes the other way: without a refresh at work, and with telemetry
-- first, an upgrade keeps nobody waiting for whom it waits itself.
SELECT flywheel_lock_refresh();
LOCK TABLE execution_telemetry IN ACCESS EXCLUSIVE MODE;

DROP TRIGGER IF EXISTS flywheel_note_days ON touched_cells;
CREATE TRIGGER flywheel_note_days AFTER DELETE ON touched_cells
  REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION flywheel_note_days();

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

DROP FUNCTION IF EXISTS flywheel_touch_site(text, text);
DROP FUNCTION IF EXISTS flywheel_touch_rule(text);

CREATE OR REPLACE FUNCTION flywheel_touch_site(named site_aliases) RETURNS void LANGUAGE sql
SET search_path = public, pg_temp AS $$
  INSERT INTO touched_cells (site_id, day, written)
  SELECT s.site_id, d.day, false
  FROM (
    SELECT DISTINCT (event_at AT TIME ZONE 'UTC')::date AS day FROM execution_telemetry
    WHERE site_id = named.alias AND event_at >= named.valid_from AND event_at < named.valid_to
  ) d
  CROSS JOIN (VALUES (named.alias), (named.site_id)) s (site_id);
$$;

CREATE OR REPLACE FUNCTION flywheel_touch_rule(named rule_aliases) RETURNS void LANGUAGE sql
SET search_path = public, pg_temp AS $$
  INSERT INTO touched_cells (site_id, day, written)
  SELECT DISTINCT t.site_id, (t.event_at AT TIME ZONE 'UTC')::date, false
  FROM execution_telemetry t
  WHERE named.alias IN (t.rule_id, t.runbook_id) AND t.event_at >= named.valid_from AND t.event_at < named.valid_to
    AND flywheel_rule_ref(flywheel_level(t.resolution_level, t.rule_id, t.runbook_id), t.rule_id, t.runbook_id) = named.alias;
$$;

CREATE OR REPLACE FUNCTION flywheel_touch_class_rule(rule outcome_class_rules) RETURNS void LANGUAGE sql
SET search_path = public, pg_temp AS $$
  INSERT INTO touched_cells (site_id, day, written)
  SELECT DISTINCT site_id, (event_at AT TIME ZONE 'UTC')::date, false
  FROM execution_telemetry t
  WHERE (CASE rule.field WHEN 'error_message' THEN t.error_message WHEN 'failure_type' THEN t.failure_type ELSE t.status END) ILIKE rule.pattern;
$$;

CREATE OR REPLACE FUNCTION flywheel_touch_reading() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  notes text[] := ARRAY['actor', 'reason', 'created_at', 'description'];
BEGIN
  IF TG_OP = 'UPDATE' AND to_jsonb(NEW) - notes = to_jsonb(OLD) - notes THEN
    RETURN NULL;
  END IF;
  PERFORM flywheel_exclude_refresh('a change of ' || TG_TABLE_NAME);
  -- OLD is null on INSERT, NEW on DELETE.
  IF TG_TABLE_NAME = 'site_aliases' THEN
    IF TG_OP <> 'INSERT' THEN PERFORM flywheel_touch_site(OLD); END IF;
    IF TG_OP <> 'DELETE' THEN PERFORM flywheel_touch_site(NEW); END IF;
  ELSIF TG_TABLE_NAME = 'rule_aliases' THEN
    IF TG_OP <> 'INSERT' THEN PERFORM flywheel_touch_rule(OLD); END IF;
    IF TG_OP <> 'DELETE' THEN PERFORM flywheel_touch_rule(NEW); END IF;
  ELSE
    IF TG_OP <> 'INSERT' AND OLD.enabled THEN PERFORM flywheel_touch_class_rule(OLD); END IF;
    IF TG_OP <> 'DELETE' AND NEW.enabled THEN PERFORM flywheel_touch_class_rule(NEW); END IF;
  END IF;
  PERFORM flywheel_wake();
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
