"""SQL models: how the plain SELECTs of `dbt_like_sql/` become views, tables, cells and Dagster assets.

Belongs here: reading and refusing model files, creating their relations, recomputing cells, asset specs.
Does not belong here: what a model computes (its SQL says it) and when it runs (the rooms decide). Importing
this package imports nothing; its modules need sqlglot, and only `assets` needs Dagster.
"""
