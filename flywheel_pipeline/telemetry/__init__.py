"""The telemetry room: how executions enter, and what becomes of rows that cannot."""
