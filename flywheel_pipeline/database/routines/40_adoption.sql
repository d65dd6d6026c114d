-- The journal of an adoption is evidence, like the ledger: it says what was taken over, by whom, and what stood there before.
DROP TRIGGER IF EXISTS flywheel_append_only ON adoption_journal;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON adoption_journal FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
