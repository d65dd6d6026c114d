"""The simulation room: sample data that enters by the ordinary intake.

Belongs here: the replay of 2026-02-15 and simulated fleets with planted truth. Does not belong here: anything
that reads or writes the database, or that decides about a rule.
"""
