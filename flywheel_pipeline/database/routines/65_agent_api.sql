-- What the agent API asks as itself, before it speaks for an appliance: whose a token is, and how the fleet does. Security
-- definer, for the one role that needs them: its login reads neither tokens nor, beyond these figures, anything of a fleet.

-- One row, or none. The names of a site cost more than all the rest, and most sites have but one. plpgsql keeps its plan.
CREATE OR REPLACE FUNCTION flywheel_token_holder(p_hash text)
RETURNS TABLE (token_id bigint, appliance_id text, token_hash text, revoked boolean, expired boolean, status text,
               site_id text, healing_tier text, sites text[], checkin_due boolean)
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 1 SET search_path = public, pg_temp AS $$
BEGIN
  RETURN QUERY
    SELECT t.token_id::bigint, t.appliance_id::text, t.token_hash::text, t.revoked_at IS NOT NULL,
      coalesce(t.expires_at <= clock_timestamp(), false), a.status::text, a.site_id::text, s.healing_tier::text,
      CASE WHEN EXISTS (SELECT FROM site_aliases AS n WHERE n.alias = t.site_id OR n.site_id = t.site_id)
           THEN flywheel_site_names(t.site_id) ELSE ARRAY[t.site_id::text] END,
      coalesce(a.last_checkin < clock_timestamp() - interval '1 minute', true)
    FROM appliance_tokens AS t LEFT JOIN appliances AS a ON a.appliance_id = t.appliance_id
    LEFT JOIN sites AS s ON s.site_id = a.site_id
    WHERE t.token_hash = p_hash;
END $$;
COMMENT ON FUNCTION flywheel_token_holder(text) IS 'The token of this sha256 and the appliance behind it, with the names of its site today';
REVOKE ALL ON FUNCTION flywheel_token_holder(text) FROM PUBLIC;

-- The gauges of /metrics, of one moment; null: there is nothing to tell.
CREATE OR REPLACE FUNCTION flywheel_api_gauges() RETURNS TABLE (name text, value double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
    WITH stuck AS (
      SELECT p.pattern_key FROM patterns AS p
      LEFT JOIN LATERAL (
        SELECT verdict, decided_at FROM promotion_decisions
        WHERE subject_kind = 'pattern' AND subject_id = p.pattern_key ORDER BY decision_id DESC LIMIT 1
      ) AS d ON true
      LEFT JOIN LATERAL (
        SELECT max(acted_at) AS acted_at FROM human_acts
        WHERE act = 'approve' AND subject_kind = 'pattern' AND subject_id IN (p.pattern_key, p.pattern_id)
      ) AS h ON true
      WHERE p.status IN ('pending', 'approved')
        AND (d.verdict IN ('promote', 'advance') AND d.decided_at < now() - interval '15 minutes'
             OR p.status = 'approved' AND coalesce(h.acted_at, p.created_at) < now() - interval '15 minutes')
    ), pending AS (
      SELECT created_at FROM appliance_commands WHERE status = 'pending'
    ), gauges (name, value) AS (
      SELECT 'flywheel_stuck_candidates', count(*)::numeric FROM stuck
      UNION ALL
      SELECT 'flywheel_last_promotion_age_seconds', extract(epoch FROM now() - max(occurred_at))
        FROM rule_events WHERE kind = 'promoted'
      UNION ALL
      SELECT 'flywheel_rules_quarantined', count(*) FROM l1_rules WHERE state = 'quarantined'
      UNION ALL
      SELECT 'flywheel_rules_enabled', count(*) FROM l1_rules WHERE enabled AND source = 'promoted'
      UNION ALL
      SELECT 'flywheel_commands_undelivered', count(*) FROM pending
      UNION ALL
      SELECT 'flywheel_commands_undelivered_age_seconds', coalesce(extract(epoch FROM now() - min(created_at)), 0) FROM pending
      UNION ALL
      SELECT 'flywheel_commands_unacknowledged', count(*) FROM appliance_commands WHERE status = 'delivered'
      UNION ALL
      SELECT 'flywheel_unresolved_rule_ids', count(*) FROM unresolved_rule_ids WHERE executions > 0
      UNION ALL
      SELECT 'flywheel_unresolved_executions', coalesce(sum(executions), 0) FROM unresolved_rule_ids
      UNION ALL
      SELECT 'flywheel_refresh_lag_seconds', coalesce(extract(epoch FROM now() - min(touched_at)), 0) FROM touched_cells
      UNION ALL
      SELECT 'flywheel_waiting_cells', count(*) FROM (SELECT DISTINCT site_id, day FROM touched_cells) AS cells
      UNION ALL
      SELECT 'flywheel_last_refresh_age_seconds', extract(epoch FROM now() - max(refreshed_at)) FROM refresh_batches
      UNION ALL
      SELECT 'flywheel_open_rejects', count(*) FROM telemetry_rejects WHERE status = 'open'
      UNION ALL
      SELECT 'flywheel_appliances_out_of_sync', count(*)
        FROM appliances AS a JOIN appliance_manifests AS m USING (appliance_id) JOIN manifest_contents AS c USING (content_hash)
        WHERE a.status <> 'retired' AND a.state_reported_at IS NOT NULL
          AND a.reported_manifest_hash IS DISTINCT FROM c.manifest_hash
    )
    SELECT gauges.name, gauges.value::double precision FROM gauges;
END $$;
COMMENT ON FUNCTION flywheel_api_gauges() IS 'Counts and ages of the whole fleet, for whoever watches it: no id, no text';
REVOKE ALL ON FUNCTION flywheel_api_gauges() FROM PUBLIC;
