"""Patterns of L2: incident type x runbook x platform, with the evidence that telemetry gives for each.

Belongs here: the key of a pattern, and writing observed patterns into the production table. Does not belong here: whether
one is promoted (`promotion`).
"""
