-- Quarantines of a part of the fleet: append-only facts beside the ledger, signed, and ended by a person alone. A rule
-- keeps its state meanwhile. The rule's pattern and content are written beside each by the database, so that a copy of
-- the rule is known by them. Whatever changes a scope makes the checkpoints of its rule's CUSUM void.

CREATE OR REPLACE FUNCTION flywheel_guard_scope() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  rule l1_rules%ROWTYPE;
  standing text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('flywheel:rule'), hashtext(NEW.rule_id));
  SELECT * INTO rule FROM l1_rules WHERE rule_id = NEW.rule_id FOR UPDATE;
  IF coalesce(NEW.actor, '') !~ '\S' OR coalesce(NEW.reason, '') !~ '\S' THEN
    RAISE EXCEPTION 'rule %: a quarantine at % needs an actor and a reason', NEW.rule_id, NEW.scope_value;
  END IF;
  IF rule.rule_id IS NULL OR rule.rule_version <> NEW.rule_version THEN
    RAISE EXCEPTION 'rule % has no version % now', NEW.rule_id, NEW.rule_version USING HINT = 'read the rule again';
  END IF;
  IF rule.state = 'retired' THEN
    RAISE EXCEPTION 'rule % is retired: no machine runs it', NEW.rule_id;
  END IF;
  SELECT q.kind INTO standing FROM scope_quarantines q
  WHERE (q.rule_id, q.rule_version, q.scope_kind, q.scope_value) = (NEW.rule_id, NEW.rule_version, NEW.scope_kind, NEW.scope_value)
  ORDER BY q.event_id DESC LIMIT 1;
  IF NEW.kind = 'quarantined' AND standing = 'quarantined' THEN
    RAISE EXCEPTION 'rule % is quarantined at % % already', NEW.rule_id, NEW.scope_kind, NEW.scope_value;
  END IF;
  IF NEW.kind = 'lifted' THEN
    IF standing IS DISTINCT FROM 'quarantined' THEN
      RAISE EXCEPTION 'rule % is not quarantined at % %', NEW.rule_id, NEW.scope_kind, NEW.scope_value;
    END IF;
    IF NEW.actor = 'flywheel' THEN
      RAISE EXCEPTION 'rule %: only a person lifts a quarantine', NEW.rule_id;
    END IF;
  END IF;
  NEW.pattern_key := rule.pattern_key;
  NEW.content_hash := rule.content_hash;
  RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION flywheel_void_checkpoints() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
BEGIN
  DELETE FROM cusum_checkpoints c USING l1_rules r
  WHERE r.rule_id = c.rule_id AND (r.rule_id = NEW.rule_id OR r.pattern_key = NEW.pattern_key OR r.content_hash = NEW.content_hash);
  RETURN NULL;
END $$;

DROP TRIGGER IF EXISTS flywheel_guard_scope ON scope_quarantines;
CREATE TRIGGER flywheel_guard_scope BEFORE INSERT ON scope_quarantines FOR EACH ROW EXECUTE FUNCTION flywheel_guard_scope();
DROP TRIGGER IF EXISTS flywheel_void_checkpoints ON scope_quarantines;
CREATE TRIGGER flywheel_void_checkpoints AFTER INSERT ON scope_quarantines FOR EACH ROW EXECUTE FUNCTION flywheel_void_checkpoints();
DROP TRIGGER IF EXISTS flywheel_append_only ON scope_quarantines;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON scope_quarantines FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON policy_documents;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON policy_documents FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
