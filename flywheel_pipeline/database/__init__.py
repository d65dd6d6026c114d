"""The database room: settings, embedded server, engine, declared tables, migrations and their check."""
