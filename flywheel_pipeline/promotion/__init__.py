"""Policies, gates, decisions, the ledger and its state machine, certificates and human acts."""
