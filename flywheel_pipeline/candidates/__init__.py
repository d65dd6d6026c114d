"""Patterns of L2: incident type x runbook x platform, with the evidence that telemetry gives for each."""
