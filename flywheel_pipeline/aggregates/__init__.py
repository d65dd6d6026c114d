"""Outcome classes, episodes, statistics per rule, and the refresh that keeps them exact.

Belongs here: the outbox, the refresh of touched site-days, backfills, rebuilds and the recount that proves them. Does not
belong here: the SELECTs (`dbt_like_sql/aggregates/`), and any judgement of a rule (`health`).
"""
