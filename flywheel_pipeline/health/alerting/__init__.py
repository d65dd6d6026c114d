"""Alerts: a change of state becomes one notification per channel, at least once, whoever observes it and however often.

    observe (Dagster, ledger, patterns) -> record (alerts, alert_events, notifications: one transaction) -> outbox (Apprise)

Belongs here: what raises an alert, its state, its text, its delivery. Does not belong here: the questions that fail
(`quality.py` of each room) and why a rule fails (`health.attribution`). No module here imports Apprise or Dagster at
its top: the minute path pays for neither.
"""
