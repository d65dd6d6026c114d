-- Which names a site goes by: what a token for one of them may read and report for. Aliases never chain, so one step to
-- the name in use and one step back are all of them. An alias that has ended, or has not begun, names another site today.
CREATE OR REPLACE FUNCTION flywheel_site_names(site text) RETURNS text[] LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = public, pg_temp AS $$
  WITH today AS MATERIALIZED (
    SELECT alias, site_id FROM site_aliases WHERE now() >= valid_from AND now() < valid_to
  ), home AS (
    SELECT coalesce((SELECT site_id FROM today WHERE alias = site), site) AS site_id
  )
  SELECT array_agg(name ORDER BY name COLLATE "C")
  FROM (SELECT site AS name UNION SELECT site_id FROM home UNION SELECT t.alias FROM today t JOIN home USING (site_id)) AS names
$$;
COMMENT ON FUNCTION flywheel_site_names(text) IS 'All names of a site today: the one given, the one in use, and the aliases of that';
