"""The models elsewhere: rebuilds and backfills computed by DuckDB or Apache Spark over the archive, landed in PostgreSQL.

Belongs here: what of a model an engine may compute, its SQL in the engine's words, where its rows come from and how its
results land. Does not belong here: what a model computes (`dbt_like_sql/`), which cells are set and how (`aggregates/`,
`sql_models/`), and the layout of the archive (`archive/`). Importing it loads neither duckdb nor pyspark.
"""
