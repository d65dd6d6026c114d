"""The report as one offline page, and the auditor's export: what the flywheel holds, for people who do not open it.

Belongs here: reading one snapshot and laying it out. Does not belong here: judging (checks), deciding (promotion) and
any write to the database.
"""
