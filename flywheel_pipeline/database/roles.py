"""Least-privilege roles: who may read and write what, declared as data and brought to the database by every upgrade.

Belongs here: the four roles, their grants, and comparing both with the catalogue. Does not belong here: logins and their
passwords (an administrator makes those and grants a role to them), nor row-level security (`routines/50_row_security.sql`).

The roles are of the whole cluster and cannot log in; their grants are of this database. What is not granted is refused:
a new table that nobody lists here is nobody's but the owner's, and a test says so. Nobody at all, the owner's own
commands included, updates or deletes the ledger: a trigger refuses that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
import sqlalchemy as sa
from psycopg import sql

from flywheel_pipeline.database.declared import SCHEMA, VERSION_TABLE
from flywheel_pipeline.database.tables import metadata

INTAKE: Final = "flywheel_intake"
PIPELINE: Final = "flywheel_pipeline"
AGENT_API: Final = "flywheel_agent_api"
READER: Final = "flywheel_reader"
DAGSTER_SCHEMA: Final = "dagster"

MEANING: Final[Mapping[str, str]] = {
    INTAKE: "lands telemetry: imports files, retries rejects; sees neither rules nor tokens",
    PIPELINE: "runs the graph: everything but changing the log of telemetry, tokens and the schema",
    AGENT_API: "speaks for one appliance at a time, held to its site by row-level security",
    READER: "reads everything but tokens",
}

_R, _I, _U, _D = "SELECT", "INSERT", "UPDATE", "DELETE"
_CALL: Final = "EXECUTE"
_WRITE: Final = (_R, _I, _U, _D)
_APPEND: Final = (_R, _I)
#: A column in parentheses limits a privilege to it.
Privileges = tuple[str, ...]


def _only(privilege: str, *columns: str) -> tuple[str, ...]:
    return tuple(f"{privilege} ({column})" for column in columns)


#: What each role may do with each declared table; SELECT of the reader and the pipeline goes without saying.
GRANTS: Final[Mapping[str, Mapping[str, Privileges]]] = {
    INTAKE: {
        "execution_telemetry": (_R, _I, _U),
        "telemetry_rejects": (_R, _I, _U),
        "execution_corrections": (_R,),
        "evidence_bundles": (_R, _I, _U),
        "sealed_days": (_R,),
        "site_aliases": (_R,),
        "rule_aliases": (_R,),
        "schema_objects": (_R,),
    },
    AGENT_API: {
        "execution_telemetry": (_R, _I, _U),
        "schema_objects": (_R,),
        "telemetry_rejects": (
            _R,
            _I,
            *_only(_U, "times_seen", "payload", "payload_bytes", "reason", "reason_code", "status"),
        ),
        "sealed_days": (_R,),
        "sites": (_R,),
        "site_aliases": (_R,),
        "appliances": (
            _R,
            *_only(
                _U,
                "agent_version",
                "capabilities",
                "last_checkin",
                "status",
                "reported_manifest_hash",
                "state_reported_at",
            ),
        ),
        "appliance_manifests": (_R,),
        "manifest_contents": (_R,),
        "manifest_entries": (_R,),
        "appliance_commands": (_R, *_only(_U, "status", "delivered_at", "acknowledged_at", "status_reason", "told_at")),
    },
    PIPELINE: {
        "touched_cells": _WRITE,
        "day_versions": (_R, _I, _U),
        "telemetry_rejects": (_R, _I, _U),
        "rule_aliases": _WRITE,
        "site_aliases": _WRITE,
        "outcome_class_rules": _WRITE,
        "refresh_batches": (_R, _I, _U),
        "gate_verdicts": (_R, _I, _U),
        "policy_activations": _APPEND,
        "promotion_decisions": (_R, _I, *_only(_U, "confirmed_batch_id")),
        "human_acts": _APPEND,
        "rule_events": _APPEND,
        "patterns": (_R, _I, _U),
        # The counters; the rest is the fold of the ledger, written by the trigger on its events.
        "l1_rules": (_R, *_only(_U, "match_count", "success_count", "failure_count", "updated_at")),
        "appliance_manifests": _WRITE,
        "manifest_contents": _WRITE,
        "manifest_entries": _WRITE,
        "rule_conflicts": _WRITE,
        "appliance_commands": (_R, _I, _U),
        "appliances": (_R, _I, _U),
        "sites": (_R, _I, _U),
        "runbooks": (_R, _I, _U),
        "policy_documents": _APPEND,
        "cusum_checkpoints": _WRITE,
        "rule_attributions": _WRITE,
        "scope_quarantines": _APPEND,
        "alerts": (_R, _I, _U),
        "alert_events": _APPEND,
        "notifications": (_R, _I, _U),
    },
}
#: Functions that run as the owner, and who may call them; nobody else may.
FUNCTIONS: Final[Mapping[str, Sequence[str]]] = {AGENT_API: ("flywheel_token_holder", "flywheel_api_gauges")}
#: Tables that hold a secret, if only its hash: no reader sees them.
SECRET_TABLES: Final = frozenset({"appliance_tokens"})


@dataclass(frozen=True)
class RoleState:
    """One role as it stands: whether it exists, who has it, and how many privileges differ from the declared ones."""

    role: str
    meaning: str
    exists: bool
    members: tuple[str, ...]
    missing: int
    surplus: int


def apply_roles(connection: sa.Connection) -> Iterator[str]:
    """Create the roles and set their grants exactly; yield a phrase for each role that changed.

    An owner who may not create roles gets none: `flywheel db roles` then says what is missing and how an administrator
    adds it. Nothing that Flywheel itself does depends on them where it connects as the owner.
    """
    known = existing(connection)
    missing = [role for role in MEANING if role not in known]
    if missing and not _may_create_roles(connection):
        return
    for role in missing:
        try:
            with connection.begin_nested():
                _say(connection, "CREATE ROLE {} NOLOGIN", role)
        except sa.exc.ProgrammingError as error:
            if not isinstance(error.orig, psycopg.errors.DuplicateObject):
                raise  # else another database of this cluster was upgraded at the same moment
        yield f"role {role}"
    for role, (lacking, surplus) in differences(connection).items():
        for relation, privilege in sorted(lacking):
            _grant(connection, "GRANT", "TO", role, relation, privilege)
        for relation, privilege in sorted(surplus):
            _grant(connection, "REVOKE", "FROM", role, relation, privilege)
        if lacking or surplus:
            yield f"grants of {role}: {len(lacking)} given, {len(surplus)} taken"
    yield from _open_dagster(connection)


#: Dagster makes and migrates its own tables in its own schema; who runs the graph writes them, who reads reads them.
DAGSTER_GRANTS: Final[Mapping[str, Mapping[str, Privileges]]] = {
    PIPELINE: {"SCHEMA": ("USAGE", "CREATE"), "TABLE": _WRITE, "SEQUENCE": ("USAGE", _R)},
    READER: {"SCHEMA": ("USAGE",), "TABLE": (_R,), "SEQUENCE": ()},
}

# What the current role may grant. Tables that Dagster made under another login are that login's to grant.
_DAGSTER_OBJECTS = """
WITH objects AS (
    SELECT 'SCHEMA' AS kind, nspname::text AS name, nspacl AS acl FROM pg_namespace
    WHERE nspname = :schema AND pg_has_role(nspowner, 'USAGE')
    UNION ALL
    SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, relname::text, relacl FROM pg_class
    WHERE relnamespace = to_regnamespace(:schema) AND relkind IN ('r', 'p', 'S') AND pg_has_role(relowner, 'USAGE')
)
SELECT o.kind, o.name, array_agg(p.privilege_type::text) AS granted
FROM objects AS o LEFT JOIN LATERAL aclexplode(o.acl) AS p ON p.grantee = to_regrole(:role)
GROUP BY o.kind, o.name ORDER BY o.kind, o.name
"""


def _open_dagster(connection: sa.Connection) -> Iterator[str]:
    for role in sorted(existing(connection) & DAGSTER_GRANTS.keys()):
        wanted = DAGSTER_GRANTS[role]
        lacking = [
            (row.kind, row.name)
            for row in connection.execute(sa.text(_DAGSTER_OBJECTS), {"schema": DAGSTER_SCHEMA, "role": role})
            if not {*wanted[row.kind]} <= {*row.granted}
        ]
        for kind, name in lacking:
            names = (name,) if kind == "SCHEMA" else (DAGSTER_SCHEMA, name)
            _say(
                connection,
                f"GRANT {', '.join(wanted[kind])} ON {kind} {'.'.join('{}' for _ in names)} TO {{}}",
                *names,
                role,
            )
        if not lacking:
            continue
        # And on what Dagster is yet to make there, as the role of this upgrade.
        for kind in ("TABLE", "SEQUENCE"):
            if wanted[kind]:
                later = f"ALTER DEFAULT PRIVILEGES IN SCHEMA {{}} GRANT {', '.join(wanted[kind])} ON {kind}S TO {{}}"
                _say(connection, later, DAGSTER_SCHEMA, role)
        yield f"schema {DAGSTER_SCHEMA} opened to {role}"


def states(connection: sa.Connection) -> list[RoleState]:
    """Return each role as it stands."""
    known = existing(connection)
    differing = differences(connection)
    members: dict[str, list[str]] = {role: [] for role in MEANING}
    for row in connection.execute(
        sa.text(
            "SELECT r.rolname::text AS role, m.rolname::text AS member FROM pg_auth_members AS a "
            "JOIN pg_roles AS r ON r.oid = a.roleid JOIN pg_roles AS m ON m.oid = a.member "
            "WHERE r.rolname = ANY(:roles) ORDER BY 1, 2"
        ),
        {"roles": list(MEANING)},
    ):
        members[row.role].append(row.member)
    return [
        RoleState(
            role,
            meaning,
            role in known,
            tuple(members[role]),
            *map(len, differing.get(role, ((), ()))),
        )
        for role, meaning in MEANING.items()
    ]


def expected(connection: sa.Connection) -> dict[str, set[tuple[str, str]]]:
    """Return the declared privileges: {role: {(relation or function, privilege)}}, of those that exist here."""
    from flywheel_pipeline.sql_models.loader import load_models

    present = set(
        connection.execute(
            sa.text(
                "SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace(:s) AND relkind IN ('r', 'p', 'v', 'm') "
                "UNION ALL SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace(:s)"
            ),
            {"s": SCHEMA},
        ).scalars()
    )
    models = {model.name: model.materialized for model in load_models()}
    readable = (set(metadata.tables) | set(models) | {VERSION_TABLE}) - SECRET_TABLES
    wanted: dict[str, set[tuple[str, str]]] = {role: set() for role in MEANING}
    for role, tables in GRANTS.items():
        wanted[role] |= {(table, privilege) for table, privileges in tables.items() for privilege in privileges}
    for role in (PIPELINE, READER):
        wanted[role] |= {(relation, _R) for relation in readable}
    wanted[PIPELINE] |= {(name, p) for name, kind in models.items() if kind != "view" for p in _WRITE}
    for role, functions in FUNCTIONS.items():
        wanted[role] |= {(function, _CALL) for function in functions}
    wanted[INTAKE].add((VERSION_TABLE, _R))
    wanted[AGENT_API].add((VERSION_TABLE, _R))
    return {role: {pair for pair in pairs if pair[0] in present} for role, pairs in wanted.items()}


def differences(connection: sa.Connection) -> dict[str, tuple[set[tuple[str, str]], set[tuple[str, str]]]]:
    """Return {role: (missing, surplus)} of the roles that exist; privileges as `GRANTS` writes them."""
    known = existing(connection)
    granted: dict[str, set[tuple[str, str]]] = {role: set() for role in known}
    for row in connection.execute(
        sa.text(
            """
            SELECT g.rolname::text AS role, c.relname::text AS relation, p.privilege_type::text AS privilege, NULL::text AS attname
            FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS p JOIN pg_roles AS g ON g.oid = p.grantee
            WHERE c.relnamespace = to_regnamespace(:schema) AND c.relkind IN ('r', 'p', 'v', 'm') AND g.rolname = ANY(:roles)
            UNION ALL
            SELECT g.rolname::text, c.relname::text, p.privilege_type::text, a.attname::text
            FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND NOT a.attisdropped
            CROSS JOIN LATERAL aclexplode(a.attacl) AS p JOIN pg_roles AS g ON g.oid = p.grantee
            WHERE c.relnamespace = to_regnamespace(:schema) AND c.relkind IN ('r', 'p', 'v', 'm') AND g.rolname = ANY(:roles)
            UNION ALL
            SELECT g.rolname::text, f.proname::text, p.privilege_type::text, NULL
            FROM pg_proc AS f CROSS JOIN LATERAL aclexplode(f.proacl) AS p JOIN pg_roles AS g ON g.oid = p.grantee
            WHERE f.pronamespace = to_regnamespace(:schema) AND g.rolname = ANY(:roles)
            """
        ),
        {"schema": SCHEMA, "roles": list(MEANING)},
    ):
        privilege = row.privilege if row.attname is None else f"{row.privilege} ({row.attname})"
        granted[row.role].add((row.relation, privilege))
    wanted = expected(connection)
    return {role: (wanted[role] - granted[role], granted[role] - wanted[role]) for role in MEANING if role in known}


def existing(connection: sa.Connection) -> set[str]:
    """Return which of the roles this server has."""
    return set(
        connection.execute(
            sa.text("SELECT rolname::text FROM pg_roles WHERE rolname = ANY(:roles)"), {"roles": list(MEANING)}
        ).scalars()
    )


def _may_create_roles(connection: sa.Connection) -> bool:
    return bool(
        connection.exec_driver_sql(
            "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
        ).scalar_one()
    )


def _say(connection: sa.Connection, statement: str, *names: str) -> None:
    composed = sql.SQL(statement).format(*map(sql.Identifier, names))
    connection.exec_driver_sql(composed.as_string(None))


def _grant(connection: sa.Connection, verb: str, preposition: str, role: str, relation: str, privilege: str) -> None:
    word, _, column = privilege.partition(" (")
    what = f"{word} ({{}})" if column else word
    kind = "FUNCTION" if word == _CALL else "TABLE"
    names = [column.removesuffix(")")] if column else []
    _say(connection, f"{verb} {what} ON {kind} {{}}.{{}} {preposition} {{}}", *names, SCHEMA, relation, role)
