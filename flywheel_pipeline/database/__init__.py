"""The database room: settings, embedded server, engine, declared tables, migrations and their check.

Belongs here: the schema, who may do what in it, backups, and taking over an older database. Does not belong here: any
question about what the rows say.
"""
