-- Row-level security: what a session that speaks for an appliance may see and write. The agent API sets the role
-- flywheel_agent_api and these two settings in each of its transactions, also where it connects as the owner, so that no
-- query of it, wrong or hostile, reaches another site. A login that was granted that role is held whether it has set the
-- role or not: before it speaks for an appliance it sees nothing. For every other role nothing changes: the first
-- condition of each policy lets it pass. Owners and superusers are never held by policies.

CREATE OR REPLACE FUNCTION flywheel_speaks_for_an_appliance() RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE AS $$
  SELECT coalesce((SELECT pg_has_role(current_user, oid, 'USAGE') FROM pg_roles WHERE rolname = 'flywheel_agent_api'), false)
$$;
COMMENT ON FUNCTION flywheel_speaks_for_an_appliance() IS 'Whether this session has the role of the agent API, set or inherited';

-- A site is covered under the names it goes by today, the same that its tokens are held to (45_sites.sql): a renamed site
-- keeps its appliances, and a name whose alias has ended or not begun opens nothing. Security definer: the role need not
-- read the aliases, and the policy on them does not ask itself.
CREATE OR REPLACE FUNCTION flywheel_session_sites() RETURNS text[] LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = public, pg_temp AS $$
  SELECT flywheel_site_names(s.site_id)
  FROM (SELECT nullif(current_setting('flywheel.site_id', true), '') AS site_id) AS s WHERE s.site_id IS NOT NULL
$$;
COMMENT ON FUNCTION flywheel_session_sites() IS 'The names that the site this session speaks for goes by today; null: none, so nothing is visible';

CREATE OR REPLACE FUNCTION flywheel_session_appliance() RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
  SELECT nullif(current_setting('flywheel.appliance_id', true), '')
$$;

-- Appliances of one site may report for each other: a gateway forwards what its neighbour could not send.
CREATE OR REPLACE FUNCTION flywheel_session_appliances() RETURNS text[] LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = public, pg_temp AS $$
  SELECT array_agg(appliance_id) FROM appliances WHERE site_id = ANY (flywheel_session_sites())
$$;
COMMENT ON FUNCTION flywheel_session_appliances() IS 'The appliances registered at the site this session speaks for';

-- Sub-selects, so that each is evaluated once a statement and not once a row.
ALTER TABLE execution_telemetry ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_site ON execution_telemetry;
CREATE POLICY flywheel_own_site ON execution_telemetry TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR site_id = ANY ((SELECT flywheel_session_sites())::text[]))
  WITH CHECK (NOT (SELECT flywheel_speaks_for_an_appliance())
    OR (site_id = ANY ((SELECT flywheel_session_sites())::text[])
        AND (appliance_id = (SELECT flywheel_session_appliance()) OR appliance_id = 'unknown'
             OR appliance_id = ANY ((SELECT flywheel_session_appliances())::text[]))));

ALTER TABLE appliances ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_appliance ON appliances;
CREATE POLICY flywheel_own_appliance ON appliances TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR appliance_id = (SELECT flywheel_session_appliance()));
DROP POLICY IF EXISTS flywheel_own_site ON appliances;
CREATE POLICY flywheel_own_site ON appliances FOR SELECT TO PUBLIC
  USING ((SELECT flywheel_speaks_for_an_appliance()) AND site_id = ANY ((SELECT flywheel_session_sites())::text[]));

ALTER TABLE appliance_manifests ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_appliance ON appliance_manifests;
CREATE POLICY flywheel_own_appliance ON appliance_manifests TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR appliance_id = (SELECT flywheel_session_appliance()));

-- What other appliances run, and what is withheld where, is not an appliance's to know.
ALTER TABLE manifest_contents ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_appliance ON manifest_contents;
CREATE POLICY flywheel_own_appliance ON manifest_contents TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance())
    OR content_hash = (SELECT m.content_hash FROM appliance_manifests AS m WHERE m.appliance_id = (SELECT flywheel_session_appliance())));
ALTER TABLE manifest_entries ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_appliance ON manifest_entries;
CREATE POLICY flywheel_own_appliance ON manifest_entries TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance())
    OR entry_id = ANY ((SELECT c.entry_ids FROM appliance_manifests AS m JOIN manifest_contents AS c USING (content_hash)
                        WHERE m.appliance_id = (SELECT flywheel_session_appliance()))::bigint[]));

ALTER TABLE appliance_commands ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_appliance ON appliance_commands;
CREATE POLICY flywheel_own_appliance ON appliance_commands TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR appliance_id = (SELECT flywheel_session_appliance()));

ALTER TABLE sites ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_site ON sites;
CREATE POLICY flywheel_own_site ON sites TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR site_id = ANY ((SELECT flywheel_session_sites())::text[]));

ALTER TABLE site_aliases ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_site ON site_aliases;
CREATE POLICY flywheel_own_site ON site_aliases TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR site_id = ANY ((SELECT flywheel_session_sites())::text[]));

-- What an appliance sent in vain it may add to the rejects and see again, nothing else of them.
ALTER TABLE telemetry_rejects ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS flywheel_own_source ON telemetry_rejects;
CREATE POLICY flywheel_own_source ON telemetry_rejects TO PUBLIC
  USING (NOT (SELECT flywheel_speaks_for_an_appliance()) OR source = 'appliance:' || (SELECT flywheel_session_appliance()));
