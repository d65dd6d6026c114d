"""Closed days of telemetry as Parquet files on a folder or an object store, and their use after PostgreSQL let them go.

Belongs here: the layout of the archive, the export, which days are closed and which were corrected since, verification
and sweeping. Does not belong here: what an engine computes over the files, and the purge (`aggregates/refresh.py`), which
asks this room whether a day may go.
"""
