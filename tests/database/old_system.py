"""A database as the old system left it: `old_system.sql` with rows of the replay of 2026-02-15.

Belongs here: making it, and reading a catalog and rows in full, to be compared. Does not belong here: any adoption.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from flywheel_pipeline.simulation.replay import Replay, build_replay

ROWS = 4000
#: Rows whose arrival nobody recorded, by their place.
UNDATED = (7, 1200, 1201)

_JSON = ("state_before", "state_after", "state_diff", "executed_steps", "tags")


@cache
def replay() -> Replay:
    return build_replay()


@cache
def posts() -> tuple[dict[str, Any], ...]:
    """The last version of each of the last 4,000 executions to arrive for the first time: every kind is among them."""
    last: dict[str, dict[str, Any]] = {}
    for post in replay().morning_posts:
        execution_id = post["execution"]["execution_id"]
        if execution_id not in last or last[execution_id]["reported_at"] <= post["reported_at"]:
            last[execution_id] = post
    return tuple(last.values())[-ROWS:]


def old_rows() -> list[dict[str, Any]]:
    """The executions as the old system stored them: columns that it had, nothing else."""
    rows = []
    for number, post in enumerate(posts()):
        row = {"appliance_id": "unknown", **post["execution"], "site_id": post["site_id"]}
        row["created_at"] = None if number in UNDATED else post["reported_at"]
        if row.get("rule_id"):  # it never had a column for it
            row["runbook_id"] = row["rule_id"]
        for name in ("agent_version", "action", "rule_id"):
            row.pop(name, None)
        rows.append({name: json.dumps(value) if name in _JSON else value for name, value in row.items()})
    return rows


def insert(connection: psycopg.Connection[Any], table: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = ", ".join(names)
    with connection.cursor() as cursor:
        cursor.executemany(
            f"INSERT INTO {table} ({columns}) VALUES ({', '.join(f'%({name})s' for name in names)})",
            [{name: row.get(name) for name in names} for row in rows],
        )


def make(engine: sa.Engine) -> None:
    """Make the old system's database. Its counters know half of the rows: the trigger came late."""
    connection = psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    with connection:
        connection.execute((Path(__file__).parent / "old_system.sql").read_bytes())
        insert(
            connection,
            "sites",
            [
                {"site_id": s["site_id"], "clinic_name": s["name"], "created_at": s["created_at"]}
                for s in replay().sites
            ],
        )
        insert(
            connection,
            "appliances",
            [{**a, "last_checkin": a["last_checkin"].replace(tzinfo=None)} for a in replay().appliances],
        )
        insert(
            connection,
            "patterns",
            [
                {
                    **{name: value for name, value in pattern.items() if name not in ("platform", "source")},
                    "proposed_rule": json.dumps(pattern["proposed_rule"]),
                    "example_incidents": json.dumps(pattern["example_incidents"]),
                }
                for pattern in replay().patterns
            ],
        )
        rules = []
        for number, rule in enumerate(replay().rules):
            old = {name: value for name, value in rule.items() if name != "platform"}
            old |= {
                "incident_pattern": json.dumps(rule["incident_pattern"]),
                "enabled": not (rule["runbook_id"] or "").startswith("AUTO-"),
                "source": "promoted" if number % 3 else None,
                "updated_at": "2026-02-14T22:00:00Z",
            }
            rules.append(old)
        # A rule with a float in its conditions, one that nobody enabled or disabled, a built-in the old system knew.
        rules.append(
            {
                "rule_id": "RB-AUTO-DISK_SPA",
                "incident_pattern": '{"incident_type": "disk_space", "threshold": 0.95}',
                "runbook_id": "LIN-SVC-001",
                "confidence": 0.98765,
                "enabled": False,
            }
        )
        rules.append(
            {"rule_id": "RB-AUTO-NTP_SYNC", "incident_pattern": '{"incident_type": "ntp_sync"}', "enabled": None}
        )
        rules.append(
            {
                "rule_id": "L1-FIREWALL-001",
                "incident_pattern": '{"incident_type": "firewall"}',
                "runbook_id": "RB-WIN-SEC-001",
                "enabled": True,
                "source": "builtin",
            }
        )
        defaults = {"match_count": 0, "success_count": 0, "failure_count": 0, "created_at": "2026-02-01T00:00:00Z"}
        insert(connection, "l1_rules", [defaults | rule for rule in rules])
        connection.execute("ALTER TABLE execution_telemetry DISABLE TRIGGER trg_l1_rule_counters")
        insert(connection, "execution_telemetry", old_rows()[: ROWS // 2])
        connection.execute("ALTER TABLE execution_telemetry ENABLE TRIGGER trg_l1_rule_counters")
        insert(connection, "execution_telemetry", old_rows()[ROWS // 2 :])
        connection.execute(
            "INSERT INTO evidence_bundles (bundle_id, appliance_id, check_type) VALUES ('CB-1', 'unknown', 'firewall')"
        )
        connection.execute(
            "INSERT INTO appliance_commands (appliance_id, command_type, params) "
            "VALUES ('a-1', 'sync_promoted_rule', '{\"rule_id\": \"RB-AUTO-FIREWALL\", \"at\": 1}')"
        )
        connection.execute(
            "INSERT INTO portal.tickets (execution, rule_id) SELECT id, CASE WHEN id % 2 = 0 THEN 'RB-AUTO-FIREWALL' END "
            "FROM execution_telemetry WHERE id % 100 = 0"
        )
        connection.execute("TRUNCATE rule_audit")
    connection.close()


_CATALOG = {
    "relations": """
        SELECT c.oid::regclass::text, c.relkind::text, pg_get_userbyid(c.relowner), coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))::text, c.reloptions::text,
               obj_description(c.oid, 'pg_class'), CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END
        FROM pg_class c WHERE {ours} AND c.relkind IN ('r', 'v', 'm', 'S')""",
    "columns": """
        SELECT c.oid::regclass::text, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated::text,
               a.attidentity::text, pg_get_expr(d.adbin, d.adrelid), a.attacl::text, col_description(c.oid, a.attnum),
               rank() OVER (PARTITION BY c.oid ORDER BY a.attnum)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE {ours} AND c.relkind IN ('r', 'v', 'm')""",
    "constraints": """
        SELECT c.oid::regclass::text, k.conname, pg_get_constraintdef(k.oid), k.convalidated
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid WHERE {ours}""",
    "indexes": """
        SELECT c.oid::regclass::text, pg_get_indexdef(x.indexrelid), x.indisvalid
        FROM pg_index x JOIN pg_class c ON c.oid = x.indrelid WHERE {ours}""",
    "triggers": """
        SELECT c.oid::regclass::text, pg_get_triggerdef(t.oid), t.tgenabled::text
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE {ours} AND NOT t.tgisinternal""",
    "functions": """
        SELECT pg_get_functiondef(c.oid), pg_get_userbyid(c.proowner), c.proacl::text, obj_description(c.oid, 'pg_proc')
        FROM pg_proc c WHERE {ours}""",
    "schemas": "SELECT nspname FROM pg_namespace c WHERE nspname !~ '^(pg_|information_schema|flywheel_undone_)'",
}


def fingerprint(engine: sa.Engine) -> dict[str, list[tuple[Any, ...]]]:
    """Everything the catalog says of users' objects; what an undo archived left out."""
    found = {}
    with engine.connect() as connection:
        for name, query in _CATALOG.items():
            space = "pronamespace" if name == "functions" else "relnamespace"
            ours = (
                f"(SELECT nspname FROM pg_namespace WHERE oid = c.{space}) "
                "!~ '^(pg_|information_schema|flywheel_undone_)'"
            )
            rows = connection.exec_driver_sql(query.replace("{ours}", ours)).all()
            found[name] = sorted((tuple(row) for row in rows), key=repr)
    return found


def rows(engine: sa.Engine, table: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Every row of a table, of these columns or all, in order."""
    with engine.connect() as connection:
        found = connection.exec_driver_sql(f"SELECT to_jsonb(t) FROM {table} t").scalars().all()
    kept = [row if columns is None else {name: row[name] for name in columns} for row in found]
    return sorted(kept, key=lambda row: json.dumps(row, sort_keys=True))


TABLES = (
    "sites",
    "appliances",
    "execution_telemetry",
    "patterns",
    "l1_rules",
    "appliance_commands",
    "evidence_bundles",
    "runbooks",
    "portal.tickets",
    "rule_audit",
)


def contents(engine: sa.Engine) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table of the old database."""
    return {table: rows(engine, table) for table in TABLES}
