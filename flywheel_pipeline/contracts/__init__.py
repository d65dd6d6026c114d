"""Contracts of tables: declared as data beside each room, judged by Great Expectations, shown as checks and pages."""
