-- What an agent claims it can run: twin of delivery.capability (`parse_version`, `supports`), for models that hold the
-- claim against what telemetry shows.

CREATE OR REPLACE FUNCTION flywheel_version(version text) RETURNS integer[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT ARRAY[m[1]::integer, m[2]::integer, m[3]::integer, CASE WHEN m[4] IS NULL THEN 1 ELSE 0 END]
  FROM regexp_match(version, '^\s*v?([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})(-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?\s*$') AS m
  WHERE m IS NOT NULL
$$;
COMMENT ON FUNCTION flywheel_version(text) IS 'Compares in release order, a pre-release before its release; null: no version. Twin of delivery.capability.parse_version';

CREATE OR REPLACE FUNCTION flywheel_claims(agent_version text, capabilities jsonb, form text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE
    WHEN capabilities IS NOT NULL AND jsonb_typeof(capabilities) <> 'null' THEN
      CASE WHEN jsonb_typeof(capabilities) = 'array'
        AND NOT jsonb_path_exists(capabilities, 'strict $[*] ? (@.type() != "string")')
        AND EXISTS (SELECT 1 FROM jsonb_array_elements_text(capabilities) AS c WHERE rtrim(c, ':') = form)
      THEN 'report' END
    WHEN flywheel_version(agent_version) >= CASE form
      WHEN 'escalate' THEN ARRAY[1, 0, 18, 1]
      WHEN 'run_runbook' THEN ARRAY[1, 0, 44, 1]
      WHEN 'restart_service' THEN ARRAY[1, 0, 44, 1]
      WHEN 'alert' THEN ARRAY[1, 0, 44, 1]
      WHEN 'run_linux_runbook' THEN ARRAY[1, 0, 69, 1]
      WHEN 'run_windows_runbook' THEN ARRAY[1, 0, 70, 1]
    END THEN 'version'
  END
$$;
COMMENT ON FUNCTION flywheel_claims(text, jsonb, text) IS 'report or version: by what the agent claims to run the form; null: it does not. Twin of delivery.capability.supports';
