"""Delivery: which rules each appliance should run, and how far each of them got.

Belongs here: agent capabilities, desired-state manifests, commands and their states. Does not belong here:
the decision that a rule is in service (`promotion`), nor how well it works (`health`).
"""
