"""Health: which rules in service fail, where, and why.

Belongs here: failing rules, attribution of their failures, what an alert says. Does not belong here: counting
(`aggregates`) and taking a rule out of service (`promotion`).
"""
