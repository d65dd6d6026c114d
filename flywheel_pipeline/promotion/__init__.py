"""Policies, gates, decisions, the ledger and its state machine, certificates and human acts.

Belongs here: the one place that decides, the one place that applies, and everything that proves a decision later. Does not
belong here: counting (`aggregates`) and bringing a rule to an appliance (`delivery`).
"""
