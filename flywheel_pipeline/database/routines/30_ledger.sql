-- The ledger and its padlock. rule_events is append-only; a row is accepted only on a legal edge, signed, and,
-- where it puts a rule on more machines, only if every required gate passed in the same batch. l1_rules is the
-- fold of its events, and nothing else can write a folded column.

-- Reference rows, set exactly to these. Legal steps change here alone: the padlock refuses all other writers.
DROP TRIGGER IF EXISTS flywheel_guard_transitions ON rule_transitions;
CREATE TEMP TABLE edges (kind text, from_state text, to_state text, meaning text) ON COMMIT DROP;
INSERT INTO edges VALUES
  ('registered', 'none', 'fleet', 'a built-in rule that agents ship with'),
  ('imported', 'none', 'fleet', 'taken over from the system before, as it stood'),
  ('imported', 'none', 'quarantined', 'taken over from the system before, out of service'),
  ('imported', 'none', 'retired', 'taken over from the system before, retired'),
  ('proposed', 'none', 'proposed', 'a pattern became a rule that no machine runs yet'),
  ('promoted', 'proposed', 'fleet', 'to every machine at once, as the legacy policy does'),
  ('advanced', 'proposed', 'shadow', 'would-fires are recorded, nothing runs'),
  ('advanced', 'shadow', 'canary', 'one site'),
  ('widened', 'canary', 'canary', 'at most a tenth of the sites'),
  ('advanced', 'canary', 'ring', 'a quarter of the sites'),
  ('widened', 'ring', 'ring', 'half of the sites'),
  ('advanced', 'ring', 'fleet', 'every machine'),
  ('quarantined', 'proposed', 'quarantined', 'out of service, with reason'),
  ('quarantined', 'shadow', 'quarantined', 'out of service, with reason'),
  ('quarantined', 'canary', 'quarantined', 'out of service, with reason'),
  ('quarantined', 'ring', 'quarantined', 'out of service, with reason'),
  ('quarantined', 'fleet', 'quarantined', 'out of service, with reason'),
  ('readmitted', 'quarantined', 'proposed', 'a new version begins again, with fresh evidence'),
  ('retired', 'proposed', 'retired', 'for ever'),
  ('retired', 'shadow', 'retired', 'for ever'),
  ('retired', 'canary', 'retired', 'for ever'),
  ('retired', 'ring', 'retired', 'for ever'),
  ('retired', 'fleet', 'retired', 'for ever'),
  ('retired', 'quarantined', 'retired', 'for ever');
DELETE FROM rule_transitions t WHERE NOT EXISTS (
  SELECT FROM edges e WHERE (e.kind, e.from_state, e.to_state) = (t.kind, t.from_state, t.to_state));
INSERT INTO rule_transitions (kind, from_state, to_state, meaning) SELECT kind, from_state, to_state, meaning FROM edges
  ON CONFLICT (kind, from_state, to_state) DO UPDATE SET meaning = excluded.meaning;
DROP TABLE edges;

CREATE TEMP TABLE gates (gate text, question text) ON COMMIT DROP;
INSERT INTO gates VALUES
  ('telemetry_contract', 'Does the telemetry that arrived keep the contract?'),
  ('telemetry_freshness', 'Did telemetry arrive lately enough to judge by it?'),
  ('counters_equal_recount', 'Do the counters equal a recount from the log?'),
  ('executable_runbooks_only', 'Does each rule to be enabled run an executable runbook of the catalogue, for its platform?'),
  ('success_floor', 'Does each pattern to be promoted meet the success floor of the policy, recounted from the log?');
DELETE FROM required_gates r WHERE NOT EXISTS (SELECT FROM gates g WHERE g.gate = r.gate);
INSERT INTO required_gates (gate, question) SELECT gate, question FROM gates
  ON CONFLICT (gate) DO UPDATE SET question = excluded.question;
DROP TABLE gates;

CREATE OR REPLACE FUNCTION flywheel_content_hash(definition jsonb) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT encode(sha256(convert_to(definition::text, 'UTF8')), 'hex')
$$;
COMMENT ON FUNCTION flywheel_content_hash(jsonb) IS 'sha256 of the definition as jsonb prints it. Twin of promotion.ledger.content_hash';

CREATE OR REPLACE FUNCTION flywheel_state_is_enabled(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT state IN ('canary', 'ring', 'fleet')
$$;

CREATE OR REPLACE FUNCTION flywheel_runbook_problem(runbook text, rule_platform text) RETURNS text LANGUAGE sql STABLE
SET search_path = public, pg_temp AS $$
  SELECT CASE
    WHEN flywheel_is_placeholder(runbook) THEN format('%s is a placeholder: no script stands behind it', coalesce(nullif(btrim(runbook), ''), 'an empty runbook'))
    WHEN r.runbook_id IS NULL THEN format('%s is not in the runbook catalogue', runbook)
    WHEN NOT r.enabled THEN format('%s is disabled in the runbook catalogue', runbook)
    WHEN rule_platform IS NULL OR r.platform IS DISTINCT FROM rule_platform THEN
      format('%s is a runbook for %s, the rule is for %s', runbook, coalesce(r.platform, 'no platform'), coalesce(rule_platform, 'no platform'))
  END
  FROM (SELECT 1) one LEFT JOIN runbooks r ON r.runbook_id = runbook
$$;
COMMENT ON FUNCTION flywheel_runbook_problem(text, text) IS 'Why this runbook cannot be served to that platform; null: it can';

CREATE OR REPLACE FUNCTION flywheel_conditions_empty(incident_pattern jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE
    WHEN incident_pattern IS NULL OR jsonb_typeof(incident_pattern) NOT IN ('object', 'array') THEN true
    WHEN EXISTS (SELECT FROM jsonb_array_elements(p.parts) part WHERE jsonb_typeof(part) <> 'object') THEN true
    ELSE NOT EXISTS (
      SELECT
      FROM jsonb_array_elements(p.parts) part
      CROSS JOIN LATERAL (
        SELECT part ->> 'field' AS field, coalesce(part ->> 'operator', 'eq') AS operator, part -> 'value' AS value WHERE part ? 'field'
        UNION ALL
        SELECT e.key, 'eq', e.value FROM jsonb_each(CASE WHEN jsonb_typeof(part) = 'object' THEN part END) e WHERE NOT part ? 'field'
      ) c
      CROSS JOIN LATERAL (SELECT CASE jsonb_typeof(c.value) WHEN 'array' THEN c.value ELSE jsonb_build_array(c.value) END AS named) n
      WHERE c.field IN ('incident_type', 'check_type') AND c.operator IN ('eq', 'in') AND n.named <> '[]'
        AND NOT EXISTS (SELECT FROM jsonb_array_elements(n.named) v WHERE jsonb_typeof(v) <> 'string' OR btrim(v #>> '{}') = '')
    )
  END
  FROM (SELECT CASE jsonb_typeof(incident_pattern) WHEN 'array' THEN incident_pattern ELSE jsonb_build_array(incident_pattern) END AS parts) p
$$;
COMMENT ON FUNCTION flywheel_conditions_empty(jsonb) IS 'Whether these conditions name no incident type, so that the rule might match everything';

CREATE OR REPLACE FUNCTION flywheel_guard_event() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp AS $$
DECLARE
  rule l1_rules%ROWTYPE;
  batch refresh_batches%ROWTYPE;
  decision promotion_decisions%ROWTYPE;
  problem text;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('flywheel:rule'), hashtext(NEW.rule_id));
  SELECT * INTO rule FROM l1_rules WHERE rule_id = NEW.rule_id FOR UPDATE;

  IF coalesce(NEW.actor, '') !~ '\S' OR coalesce(NEW.reason, '') !~ '\S' THEN
    RAISE EXCEPTION 'rule %: an event needs an actor and a reason', NEW.rule_id;
  END IF;
  IF NEW.from_state IS DISTINCT FROM coalesce(rule.state, 'none') THEN
    RAISE EXCEPTION 'rule % is %, not %', NEW.rule_id, coalesce(rule.state, 'unknown'), NEW.from_state
      USING HINT = 'read the rule again; somebody moved it meanwhile';
  END IF;
  IF NOT EXISTS (SELECT FROM rule_transitions t WHERE (t.kind, t.from_state, t.to_state) = (NEW.kind, NEW.from_state, NEW.to_state)) THEN
    RAISE EXCEPTION 'rule %: % is no legal step from % to %', NEW.rule_id, NEW.kind, NEW.from_state, NEW.to_state
      USING HINT = 'the legal steps are the rows of rule_transitions';
  END IF;
  IF NEW.content_hash IS DISTINCT FROM flywheel_content_hash(NEW.definition) THEN
    RAISE EXCEPTION 'rule %: the content hash is not that of the definition', NEW.rule_id;
  END IF;
  IF NOT (NEW.definition ?& ARRAY['incident_pattern', 'runbook_id', 'platform', 'source', 'promoted_from_l2']) THEN
    RAISE EXCEPTION 'rule %: the definition needs incident_pattern, runbook_id, platform, source and promoted_from_l2', NEW.rule_id;
  END IF;

  IF NEW.kind = 'readmitted' THEN
    IF NEW.rule_version <> rule.rule_version + 1 THEN
      RAISE EXCEPTION 'rule %: a re-admission is version %, not %', NEW.rule_id, rule.rule_version + 1, NEW.rule_version;
    END IF;
    IF EXISTS (SELECT FROM rule_events e WHERE e.rule_id = NEW.rule_id AND e.content_hash = NEW.content_hash) THEN
      RAISE EXCEPTION 'rule %: this content was in quarantine before', NEW.rule_id
        USING HINT = 'a re-admission needs a changed rule, so a new content hash';
    END IF;
  ELSIF NEW.from_state = 'none' THEN
    IF NEW.rule_version <> 1 THEN RAISE EXCEPTION 'rule %: a first event is version 1', NEW.rule_id; END IF;
  ELSIF NEW.rule_version <> rule.rule_version OR NEW.content_hash <> rule.content_hash THEN
    RAISE EXCEPTION 'rule %: version and content change by re-admission only', NEW.rule_id;
  END IF;

  -- Steps within canary and ring. A rule that stands there without one entered before there were steps: in the canary it
  -- has its tenth already, in the ring its quarter.
  IF NEW.kind = 'widened' THEN
    NEW.rollout_step := coalesce(NEW.rollout_step, 2);
    IF NEW.rollout_step <> 2 OR coalesce(rule.rollout_step, CASE rule.state WHEN 'canary' THEN 2 ELSE 1 END) <> 1 THEN
      RAISE EXCEPTION 'rule %: a % is widened once, from its first step to its second', NEW.rule_id, NEW.from_state;
    END IF;
  ELSE
    IF coalesce(NEW.rollout_step, 1) <> 1 THEN
      RAISE EXCEPTION 'rule %: a stage begins with its first step, not with step %', NEW.rule_id, NEW.rollout_step;
    END IF;
    NEW.rollout_step := CASE WHEN NEW.to_state IN ('canary', 'ring') THEN 1 END;
  END IF;

  IF NEW.kind IN ('proposed', 'readmitted', 'promoted', 'advanced', 'widened') THEN
    problem := flywheel_runbook_problem(NEW.definition ->> 'runbook_id', NEW.definition ->> 'platform');
    IF problem IS NOT NULL THEN RAISE EXCEPTION 'rule %: %', NEW.rule_id, problem; END IF;
    IF flywheel_conditions_empty(NEW.definition -> 'incident_pattern') THEN
      RAISE EXCEPTION 'rule %: empty match conditions would match every incident', NEW.rule_id;
    END IF;
  END IF;

  IF NEW.kind IN ('promoted', 'advanced', 'widened') THEN
    IF (SELECT act FROM human_acts WHERE subject_kind = 'rule' AND subject_id = NEW.rule_id AND act IN ('pause', 'resume')
        ORDER BY act_id DESC LIMIT 1) = 'pause' THEN
      RAISE EXCEPTION 'rule %: its rollout is paused', NEW.rule_id USING HINT = 'flywheel rollout RULE resume ends the pause';
    END IF;
    SELECT * INTO batch FROM refresh_batches WHERE batch_id = NEW.batch_id;
    IF batch.batch_id IS NULL OR batch.refreshed_at IS NULL THEN
      RAISE EXCEPTION 'rule %: no batch with refreshed aggregates stands behind this promotion', NEW.rule_id
        USING HINT = 'run the whole graph: flywheel run';
    END IF;
    IF batch.refresh_seq < (SELECT max(refresh_seq) FROM refresh_batches) THEN
      RAISE EXCEPTION 'rule %: batch % is not the latest refresh', NEW.rule_id, NEW.batch_id USING HINT = 'run the whole graph again';
    END IF;
    SELECT string_agg(format('%s %s', g.gate, coalesce(v.verdict, 'missing')), ', ' ORDER BY g.gate) INTO problem
    FROM required_gates g LEFT JOIN gate_verdicts v ON v.gate = g.gate AND v.batch_id = NEW.batch_id
    WHERE v.verdict IS DISTINCT FROM 'pass';
    IF problem IS NOT NULL OR NOT EXISTS (SELECT FROM required_gates) THEN
      RAISE EXCEPTION 'rule %: batch % did not pass its gates: %', NEW.rule_id, NEW.batch_id, coalesce(problem, 'no gates are declared')
        USING HINT = 'a missing verdict blocks like a failed one';
    END IF;
    IF (SELECT act FROM human_acts WHERE act IN ('freeze', 'thaw') ORDER BY act_id DESC LIMIT 1) = 'freeze' THEN
      RAISE EXCEPTION 'rule %: promotion is frozen', NEW.rule_id USING HINT = 'flywheel thaw ends the freeze';
    END IF;
    SELECT * INTO decision FROM promotion_decisions WHERE decision_id = NEW.decision_id FOR UPDATE;
    IF decision.decision_id IS NULL OR decision.verdict NOT IN ('promote', 'advance') OR decision.confirmed_batch_id IS DISTINCT FROM NEW.batch_id
       OR (decision.subject_kind = 'pattern' AND decision.subject_id IS DISTINCT FROM NEW.definition ->> 'pattern_key')
       OR (decision.subject_kind = 'rule' AND decision.subject_id IS DISTINCT FROM NEW.rule_id) THEN
      RAISE EXCEPTION 'rule %: no decision of batch % promotes it', NEW.rule_id, NEW.batch_id;
    END IF;
    IF (decision.evidence ? 'step' AND (decision.evidence ->> 'step')::int IS DISTINCT FROM rule.rollout_step)
       OR (NEW.kind = 'widened' AND NOT coalesce(decision.evidence ? 'step', false))
       OR (NEW.from_state = 'proposed' AND (NEW.kind = 'promoted') IS DISTINCT FROM (decision.verdict = 'promote'))
       OR (decision.subject_kind = 'pattern' AND coalesce(nullif(decision.evidence ->> 'stage', 'none'), 'proposed') IS DISTINCT FROM NEW.from_state) THEN
      RAISE EXCEPTION 'rule %: decision % is for another step than % from %', NEW.rule_id, NEW.decision_id, NEW.kind, NEW.from_state
        USING HINT = 'each step is decided on its own';
    END IF;
    IF decision.subject_kind = 'pattern' AND (decision.evidence ->> 'runbook_id', decision.evidence ->> 'platform')
       IS DISTINCT FROM (NEW.definition ->> 'runbook_id', NEW.definition ->> 'platform') THEN
      RAISE EXCEPTION 'rule %: decision % speaks of another runbook or platform than the rule runs', NEW.rule_id, NEW.decision_id;
    END IF;
    IF EXISTS (SELECT FROM rule_events e WHERE e.decision_id = NEW.decision_id) THEN
      RAISE EXCEPTION 'rule %: decision % was applied already', NEW.rule_id, NEW.decision_id;
    END IF;
    NEW.policy_hash := decision.policy_hash;
    IF NEW.certificate IS NULL OR jsonb_typeof(NEW.certificate) <> 'object' THEN
      RAISE EXCEPTION 'rule %: a promotion carries its certificate', NEW.rule_id;
    END IF;
    SELECT string_agg(f.name, ', ' ORDER BY f.name) INTO problem
    FROM (VALUES ('rule_id', to_jsonb(NEW.rule_id::text)), ('rule_version', to_jsonb(NEW.rule_version)), ('content_hash', to_jsonb(NEW.content_hash::text)),
                 ('policy_hash', to_jsonb(decision.policy_hash::text)), ('target_state', to_jsonb(NEW.to_state::text)), ('batch_id', to_jsonb(NEW.batch_id))) f (name, value)
    WHERE NEW.certificate -> f.name IS DISTINCT FROM f.value;
    IF problem IS NOT NULL THEN
      RAISE EXCEPTION 'rule %: the certificate is of another promotion: it differs in %', NEW.rule_id, problem;
    END IF;
  END IF;
  RETURN NEW;
END $$;

-- As its owner: whoever may append an event needs no right of his own to write the registry.
CREATE OR REPLACE FUNCTION flywheel_fold_event() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
BEGIN
  INSERT INTO l1_rules AS r (rule_id, incident_pattern, runbook_id, confidence, promoted_from_l2, enabled, created_at, source,
      platform, pattern_key, state, rule_version, content_hash, state_reason, state_actor, state_at, last_event_id, rollout_step)
  VALUES (NEW.rule_id, NEW.definition -> 'incident_pattern', NEW.definition ->> 'runbook_id', (NEW.definition ->> 'confidence')::double precision,
      (NEW.definition ->> 'promoted_from_l2')::boolean, flywheel_state_is_enabled(NEW.to_state), NEW.occurred_at, NEW.definition ->> 'source',
      NEW.definition ->> 'platform', NEW.definition ->> 'pattern_key', NEW.to_state, NEW.rule_version, NEW.content_hash,
      NEW.reason, NEW.actor, NEW.occurred_at, NEW.event_id, NEW.rollout_step)
  ON CONFLICT (rule_id) DO UPDATE SET
      incident_pattern = excluded.incident_pattern, runbook_id = excluded.runbook_id, confidence = excluded.confidence,
      promoted_from_l2 = excluded.promoted_from_l2, enabled = excluded.enabled, source = excluded.source, platform = excluded.platform,
      pattern_key = excluded.pattern_key, state = excluded.state, rule_version = excluded.rule_version, content_hash = excluded.content_hash,
      state_reason = excluded.state_reason, state_actor = excluded.state_actor, state_at = excluded.state_at,
      last_event_id = excluded.last_event_id, rollout_step = excluded.rollout_step, updated_at = excluded.state_at;
  PERFORM pg_notify('flywheel_ledger', NEW.rule_id);
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION flywheel_guard_rule() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public, pg_temp AS $$
DECLARE
  e rule_events%ROWTYPE;
BEGIN
  SELECT * INTO e FROM rule_events WHERE rule_id = NEW.rule_id ORDER BY event_id DESC LIMIT 1;
  IF e.event_id IS NULL OR (
      NEW.last_event_id, NEW.state, NEW.enabled, NEW.rule_version, NEW.content_hash, NEW.incident_pattern, NEW.runbook_id,
      NEW.platform, NEW.source, NEW.promoted_from_l2, NEW.pattern_key, NEW.state_reason, NEW.state_actor, NEW.state_at, NEW.rollout_step
    ) IS DISTINCT FROM (
      e.event_id, e.to_state, flywheel_state_is_enabled(e.to_state), e.rule_version, e.content_hash, e.definition -> 'incident_pattern',
      e.definition ->> 'runbook_id', e.definition ->> 'platform', e.definition ->> 'source', (e.definition ->> 'promoted_from_l2')::boolean,
      e.definition ->> 'pattern_key', e.reason, e.actor, e.occurred_at, e.rollout_step) THEN
    RAISE EXCEPTION 'rule %: l1_rules holds only what its ledger says', NEW.rule_id
      USING HINT = 'change a rule by an event: flywheel quarantine, readmit or retire, with actor and reason';
  END IF;
  RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION flywheel_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% on % is refused: it is kept for auditors and only ever grows', TG_OP, TG_TABLE_NAME;
END $$;

CREATE OR REPLACE FUNCTION flywheel_guard_verdict() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.verdict <> 'pass' OR (NEW.batch_id, NEW.gate) IS DISTINCT FROM (OLD.batch_id, OLD.gate) THEN
    RAISE EXCEPTION 'gate % of batch % stays %', OLD.gate, OLD.batch_id, OLD.verdict USING HINT = 'a new run asks the gate again';
  END IF;
  RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION flywheel_guard_transitions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% on rule_transitions is refused: the legal steps are part of the program', TG_OP
    USING HINT = 'change database/routines/30_ledger.sql and run flywheel db upgrade';
END $$;
CREATE TRIGGER flywheel_guard_transitions BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON rule_transitions
  FOR EACH STATEMENT EXECUTE FUNCTION flywheel_guard_transitions();

DROP TRIGGER IF EXISTS flywheel_guard_event ON rule_events;
CREATE TRIGGER flywheel_guard_event BEFORE INSERT ON rule_events FOR EACH ROW EXECUTE FUNCTION flywheel_guard_event();
DROP TRIGGER IF EXISTS flywheel_fold_event ON rule_events;
CREATE TRIGGER flywheel_fold_event AFTER INSERT ON rule_events FOR EACH ROW EXECUTE FUNCTION flywheel_fold_event();
DROP TRIGGER IF EXISTS flywheel_append_only ON rule_events;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON rule_events FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON human_acts;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON human_acts FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON policy_activations;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON policy_activations FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON promotion_decisions;
CREATE TRIGGER flywheel_append_only BEFORE DELETE OR TRUNCATE ON promotion_decisions FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON execution_corrections;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON execution_corrections FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON gate_verdicts;
CREATE TRIGGER flywheel_append_only BEFORE DELETE OR TRUNCATE ON gate_verdicts FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_guard_verdict ON gate_verdicts;
CREATE TRIGGER flywheel_guard_verdict BEFORE UPDATE ON gate_verdicts FOR EACH ROW EXECUTE FUNCTION flywheel_guard_verdict();
DROP TRIGGER IF EXISTS flywheel_guard_rule ON l1_rules;
CREATE TRIGGER flywheel_guard_rule BEFORE INSERT OR UPDATE ON l1_rules FOR EACH ROW EXECUTE FUNCTION flywheel_guard_rule();
DROP TRIGGER IF EXISTS flywheel_append_only ON l1_rules;
CREATE TRIGGER flywheel_append_only BEFORE DELETE OR TRUNCATE ON l1_rules FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();

CREATE OR REPLACE FUNCTION flywheel_guard_decision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF to_jsonb(NEW) - 'confirmed_batch_id' IS DISTINCT FROM to_jsonb(OLD) - 'confirmed_batch_id' OR NEW.confirmed_batch_id < OLD.confirmed_batch_id THEN
    RAISE EXCEPTION 'decision % is kept for auditors; only a later batch may confirm it', OLD.decision_id;
  END IF;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS flywheel_guard_decision ON promotion_decisions;
CREATE TRIGGER flywheel_guard_decision BEFORE UPDATE ON promotion_decisions FOR EACH ROW EXECUTE FUNCTION flywheel_guard_decision();

CREATE OR REPLACE FUNCTION flywheel_notify_act() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('flywheel_telemetry', '');  -- the sensor decides again with a new approval
  RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS flywheel_notify_act ON human_acts;
CREATE TRIGGER flywheel_notify_act AFTER INSERT ON human_acts FOR EACH STATEMENT EXECUTE FUNCTION flywheel_notify_act();
