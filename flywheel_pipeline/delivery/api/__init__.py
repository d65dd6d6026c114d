"""The agent API: how appliances report executions, fetch their rules and commands, and say what they run.

Belongs here: HTTP: requests, limits, answers, the server's processes. Does not belong here: what becomes of a row
(`telemetry`), what a manifest holds (`delivery.manifest`), the life of commands and tokens (`delivery.publish`,
`delivery.tokens`). Nothing here is imported by the code location: FastAPI takes 0.4 s.
"""
