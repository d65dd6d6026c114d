-- What was alerted stays: alert_events is append-only, and an alert or a notification is never deleted.

DROP TRIGGER IF EXISTS flywheel_append_only ON alert_events;
CREATE TRIGGER flywheel_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON alert_events FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON alerts;
CREATE TRIGGER flywheel_append_only BEFORE DELETE OR TRUNCATE ON alerts FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
DROP TRIGGER IF EXISTS flywheel_append_only ON notifications;
CREATE TRIGGER flywheel_append_only BEFORE DELETE OR TRUNCATE ON notifications FOR EACH STATEMENT EXECUTE FUNCTION flywheel_append_only();
