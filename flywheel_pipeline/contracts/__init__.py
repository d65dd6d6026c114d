"""Contracts of tables: declared as data beside each room, judged by Great Expectations, shown as checks and pages.

Belongs here: the adapter, the registry of suites, and Data Docs. Does not belong here: the expectations of a table, which
stand in its room's `suite.py`.
"""
