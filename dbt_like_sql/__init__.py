"""The SQL models, one plain SELECT a file, in one folder per room. Read by flywheel_pipeline.sql_models."""
