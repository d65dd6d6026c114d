"""The telemetry room: how executions enter, and what becomes of rows that cannot.

Belongs here: intake from files, HTTP and plain SQL, the telemetry contract, rejects, aliases, evidence bundles, and the
checks that the log is whole, fresh and as large as usual. Does not belong here: what an execution counts for
(`aggregates`).
"""
