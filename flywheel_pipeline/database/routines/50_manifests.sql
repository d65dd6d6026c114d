-- The rules of a manifest, put together of its entries.
CREATE OR REPLACE FUNCTION flywheel_manifest_rules(entry_ids bigint[]) RETURNS jsonb LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = public, pg_temp AS $$
  SELECT coalesce(jsonb_agg(e.entry ORDER BY n.place), '[]')
  FROM unnest(entry_ids) WITH ORDINALITY AS n(entry_id, place) JOIN manifest_entries AS e USING (entry_id)
$$;
COMMENT ON FUNCTION flywheel_manifest_rules(bigint[]) IS 'The entries of a content of manifests, in their order, as the agent gets them';
