"""What stands on the old system's tables, read from the catalog: indexes, checks, triggers, functions, views.

Belongs here: reading, and setting views aside while a column under them changes. Does not belong here: what is to be
done about any of it (`adopt_plan.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from flywheel_pipeline.database.declared import SCHEMA
from flywheel_pipeline.errors import SchemaMismatch
from flywheel_pipeline.sql_models.relations import execute, literal, quote


@dataclass(frozen=True)
class OldIndex:
    """An index. `plain`: valid, immediate, btree, on columns alone and without a condition."""

    name: str
    columns: tuple[str, ...]
    unique: bool
    primary: bool
    plain: bool


@dataclass(frozen=True)
class OldCheck:
    """A CHECK constraint: its definition as PostgreSQL prints it, and the columns it speaks of."""

    name: str
    definition: str
    columns: frozenset[str]


@dataclass(frozen=True)
class OldFunction:
    """A function outside the system's schemas. `restore` are the statements that make it again."""

    oid: int
    signature: str
    name: str
    source: str
    is_trigger: bool
    restore: tuple[str, ...]


@dataclass(frozen=True)
class OldTrigger:
    """A trigger. `restore` are the statements that make it again on its table, in its state."""

    name: str
    table: str
    function: int
    restore: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A view on one of our tables. `obstacle` says why it cannot be made again exactly; empty: it can."""

    oid: int
    name: str
    restore: tuple[str, ...]
    obstacle: str


def indexes(connection: Connection, table: str) -> list[OldIndex]:
    """Return the indexes of a table, those of its constraints included."""
    rows = connection.execute(
        sa.text(
            """
            SELECT i.relname AS name, x.indisunique AS unique, x.indisprimary AS primary,
                   x.indisvalid AND x.indimmediate AND x.indpred IS NULL AND x.indexprs IS NULL AND m.amname = 'btree' AS plain,
                   ARRAY(SELECT a.attname::text FROM unnest(x.indkey::smallint[]) WITH ORDINALITY AS k (attnum, position)
                         JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
                         WHERE k.position <= x.indnkeyatts ORDER BY k.position) AS columns
            FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_am m ON m.oid = i.relam
            WHERE x.indrelid = CAST(:table AS regclass) ORDER BY i.relname
            """
        ),
        {"table": _qualified(table)},
    )
    return [OldIndex(row.name, tuple(row.columns), row.unique, row.primary, row.plain) for row in rows]


def checks(connection: Connection, table: str) -> list[OldCheck]:
    """Return the CHECK constraints of a table."""
    rows = connection.execute(
        sa.text(
            """
            SELECT k.conname AS name, pg_get_constraintdef(k.oid, true) AS definition,
                   ARRAY(SELECT a.attname::text FROM pg_attribute a
                         WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)) AS columns
            FROM pg_constraint k WHERE k.conrelid = CAST(:table AS regclass) AND k.contype = 'c' ORDER BY k.conname
            """
        ),
        {"table": _qualified(table)},
    )
    return [OldCheck(row.name, row.definition, frozenset(row.columns)) for row in rows]


def as_written(connection: Connection, table: str, definition: str) -> str:
    """Return a CHECK in the form that PostgreSQL prints again as it prints this one.

    Read again as it stands, `x = ANY (ARRAY[...]::text[])`, which was once `x IN (...)`, would be printed another way.
    """
    rewritten = re.sub(
        r"(\w+)::text = ANY \(ARRAY\[((?:'(?:[^']|'')*'::character varying(?:, )?)+)\]::text\[\]\)",
        lambda found: f"{found[1]} IN ({found[2].replace('::character varying', '')})",
        definition,
    )
    if rewritten == definition:
        return definition
    savepoint = connection.begin_nested()
    execute(connection, f"CREATE TEMP TABLE as_written (LIKE {_qualified(table)})")
    execute(connection, f"ALTER TABLE as_written ADD CONSTRAINT as_written {rewritten}")
    printed = connection.exec_driver_sql(
        "SELECT pg_get_constraintdef(oid, true) FROM pg_constraint WHERE conrelid = 'as_written'::regclass AND conname = 'as_written'"
    ).scalar_one()
    savepoint.rollback()
    return rewritten if printed == definition else definition


def foreign_key_columns(connection: Connection, table: str) -> dict[str, str]:
    """Return {column: constraint} of the columns that a foreign key, of this table or onto it, stands on."""
    rows = connection.execute(
        sa.text(
            """
            SELECT a.attname::text AS name, format('%s on %s', k.conname, k.conrelid::regclass) AS constraint
            FROM pg_constraint k
            JOIN pg_attribute a ON (a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey))
                                OR (a.attrelid = k.confrelid AND a.attnum = ANY (k.confkey))
            WHERE k.contype = 'f' AND a.attrelid = CAST(:table AS regclass)
            """
        ),
        {"table": _qualified(table)},
    )
    return {row.name: row.constraint for row in rows}


def standing_on(connection: Connection, table: str, column: str) -> tuple[str, tuple[str, ...]]:
    """Return what goes with a column when it is dropped: (a constraint or '', statements that restore indexes and comment)."""
    row = connection.execute(
        sa.text(
            """
            SELECT
              coalesce((SELECT min(k.conname) FROM pg_constraint k
                        WHERE k.conrelid = a.attrelid AND a.attnum = ANY (k.conkey) AND k.contype <> 'n'), '') AS constrained,
              ARRAY(SELECT pg_get_indexdef(i.oid) FROM pg_depend d
                    JOIN pg_class i ON i.oid = d.objid AND i.relkind = 'i'
                    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
                      AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum ORDER BY i.relname) AS indexes,
              col_description(a.attrelid, a.attnum) AS comment
            FROM pg_attribute a WHERE a.attrelid = CAST(:table AS regclass) AND a.attname = :column
            """
        ),
        {"table": _qualified(table), "column": column},
    ).one()
    restore = list(row.indexes)
    if row.comment is not None:
        restore.append(f"COMMENT ON COLUMN {_qualified(table)}.{quote(column)} IS {literal(row.comment)}")
    return row.constrained, tuple(restore)


def functions(connection: Connection) -> dict[int, OldFunction]:
    """Return every function of users by oid; those of extensions, and aggregates, are left out."""
    rows = connection.execute(
        sa.text(
            """
            SELECT p.oid::bigint AS oid, n.nspname AS schema, p.proname AS name,
                   format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS signature,
                   CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS kind,
                   coalesce(pg_get_function_sqlbody(p.oid), p.prosrc) AS source,
                   p.prorettype = 'trigger'::regtype AS is_trigger,
                   pg_get_functiondef(p.oid) AS definition, pg_get_userbyid(p.proowner) AS owner,
                   obj_description(p.oid, 'pg_proc') AS comment, p.proacl IS NOT NULL AS granted,
                   ARRAY(SELECT format('GRANT %s ON ROUTINE %I.%I(%s) TO %s%s', x.privilege_type, n.nspname, p.proname,
                                  pg_get_function_identity_arguments(p.oid),
                                  CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END,
                                  CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
                         FROM aclexplode(p.proacl) x) AS grants
            FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
              AND p.prokind IN ('f', 'p')
              AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
            ORDER BY p.oid
            """
        )
    )
    found = {}
    for row in rows:
        restore = [row.definition, f"ALTER ROUTINE {row.signature} OWNER TO {quote(row.owner)}"]
        if row.comment is not None:
            restore.append(f"COMMENT ON {row.kind} {row.signature} IS {literal(row.comment)}")
        if row.granted:
            restore.append(f"REVOKE ALL ON ROUTINE {row.signature} FROM PUBLIC, {quote(row.owner)}")
            restore.extend(row.grants)
        found[row.oid] = OldFunction(row.oid, row.signature, row.name, row.source, row.is_trigger, tuple(restore))
    return found


def triggers(connection: Connection) -> list[OldTrigger]:
    """Return every trigger of users, on whatever table; the table as PostgreSQL prints it."""
    rows = connection.execute(
        sa.text(
            """
            SELECT t.tgname AS name, c.relname AS relation, n.nspname AS schema, t.tgfoid::bigint AS function,
                   pg_get_triggerdef(t.oid) AS definition, t.tgenabled::text AS state, obj_description(t.oid, 'pg_trigger') AS comment
            FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE NOT t.tgisinternal ORDER BY n.nspname, c.relname, t.tgname
            """
        )
    )
    states = {"D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}
    found = []
    for row in rows:
        table = f"{quote(row.schema)}.{quote(row.relation)}"
        restore = [row.definition]
        if row.state in states:
            restore.append(f"ALTER TABLE {table} {states[row.state]} TRIGGER {quote(row.name)}")
        if row.comment is not None:
            restore.append(f"COMMENT ON TRIGGER {quote(row.name)} ON {table} IS {literal(row.comment)}")
        name = row.relation if row.schema == SCHEMA else f"{row.schema}.{row.relation}"
        found.append(OldTrigger(row.name, name, row.function, tuple(restore)))
    return found


_COMMENTS = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_WRITES = re.compile(
    r'\b(?:update|insert\s+into|delete\s+from|merge\s+into)\s+(?:only\s+)?(?:"?public"?\s*\.\s*)?"?(l1_rules|patterns)\b',
    re.IGNORECASE,
)
_SETS = re.compile(
    r"\bnew\s*\.\s*\"?(match_count|success_count|failure_count|occurrences|success_rate|enabled|status|runbook_id|"
    r"incident_pattern)\"?\s*:?=(?!=)",
    re.IGNORECASE,
)


def code_of(function: int, known: dict[int, OldFunction]) -> str:
    """Return the text of a function and of every user's function that it names, comments left out."""
    texts: list[str] = []
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        oid = waiting.pop()
        if oid in seen or oid not in known:
            continue
        seen.add(oid)
        text = _COMMENTS.sub(" ", known[oid].source)
        texts.append(text)
        waiting.extend(
            other.oid
            for other in known.values()
            if re.search(rf"\b{re.escape(other.name)}\"?\s*\(", text, re.IGNORECASE)
        )
    return "\n".join(texts)


def writes_counted_tables(code: str) -> list[str]:
    """Name the tables among l1_rules and patterns that this code writes."""
    return sorted({match[1].lower() for match in _WRITES.finditer(code)})


def sets_counted_columns(code: str) -> list[str]:
    """Name the counted columns that this trigger code sets in NEW."""
    return sorted({match[1].lower() for match in _SETS.finditer(code)})


def views_on(connection: Connection, table: str, columns: Sequence[str]) -> list[View]:
    """Return the views that read these columns of a table, and the views on those, each after the ones it reads."""
    connection.execute(sa.text("SELECT set_config('search_path', '', true)"))  # so that every name comes qualified
    try:
        rows = connection.execute(
            sa.text(
                """
                WITH RECURSIVE reads AS (
                  SELECT DISTINCT w.ev_class AS oid, CAST(:table AS regclass)::oid AS of
                  FROM pg_depend d
                  JOIN pg_rewrite w ON w.oid = d.objid
                  JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                  WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
                    AND d.refobjid = CAST(:table AS regclass) AND a.attname = ANY (:columns) AND w.ev_class <> d.refobjid
                  UNION
                  SELECT w.ev_class, r.oid FROM reads r
                  JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = r.oid
                                  AND d.classid = 'pg_rewrite'::regclass
                  JOIN pg_rewrite w ON w.oid = d.objid AND w.ev_class <> r.oid
                )
                SELECT c.oid::bigint AS oid, format('%I.%I', n.nspname, c.relname) AS name, c.relkind::text AS kind,
                  pg_get_viewdef(c.oid) AS definition, c.reloptions AS options, pg_get_userbyid(c.relowner) AS owner,
                  obj_description(c.oid, 'pg_class') AS comment, c.relacl IS NOT NULL AS granted,
                  ARRAY(SELECT format('GRANT %s ON %I.%I TO %s%s', x.privilege_type, n.nspname, c.relname,
                          CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END,
                          CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
                        FROM aclexplode(c.relacl) x) AS grants,
                  ARRAY(SELECT format('COMMENT ON COLUMN %I.%I.%I IS %L', n.nspname, c.relname, a.attname, col_description(c.oid, a.attnum))
                        FROM pg_attribute a WHERE a.attrelid = c.oid AND col_description(c.oid, a.attnum) IS NOT NULL) AS comments,
                  concat_ws(' and ',
                    CASE WHEN c.relkind <> 'v' THEN 'it is a materialized view' END,
                    CASE WHEN EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid) THEN 'it has triggers' END,
                    CASE WHEN EXISTS (SELECT FROM pg_rewrite w WHERE w.ev_class = c.oid AND w.rulename <> '_RETURN') THEN 'it has rules' END,
                    CASE WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND (a.attacl IS NOT NULL OR a.atthasdef))
                         THEN 'its columns have grants or defaults of their own' END) AS obstacle,
                  ARRAY(SELECT r.of::bigint FROM reads r WHERE r.oid = c.oid) AS reads
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE c.oid IN (SELECT oid FROM reads) ORDER BY c.oid
                """
            ),
            {"table": _qualified(table), "columns": list(columns)},
        ).all()
    finally:
        connection.execute(sa.text(f"SELECT set_config('search_path', '{SCHEMA}', true)"))
    waiting = {row.oid: row for row in rows}
    ordered: list[View] = []
    while waiting:
        ready = next(oid for oid, row in waiting.items() if not waiting.keys() & set(row.reads))
        row = waiting.pop(ready)
        options = f" WITH ({', '.join(_option(option) for option in row.options)})" if row.options else ""
        restore = [
            f"CREATE VIEW {row.name}{options} AS\n{row.definition}",
            f"ALTER VIEW {row.name} OWNER TO {quote(row.owner)}",
        ]
        if row.comment is not None:
            restore.append(f"COMMENT ON VIEW {row.name} IS {literal(row.comment)}")
        if row.granted:
            restore.append(f"REVOKE ALL ON {row.name} FROM PUBLIC, {quote(row.owner)}")
            restore.extend(row.grants)
        restore.extend(row.comments)
        ordered.append(View(row.oid, row.name, tuple(restore), row.obstacle))
    return ordered


def silence(connection: Connection, tables: Iterable[str]) -> list[str]:
    """Disable the enabled triggers of users on these tables; return the statements that enable them again.

    What an adoption does itself must not run other systems' triggers, which would write to their tables.
    """
    rows = connection.execute(
        sa.text(
            "SELECT t.tgname AS name, c.relname AS table, t.tgenabled = 'A' AS always FROM pg_trigger t "
            "JOIN pg_class c ON c.oid = t.tgrelid WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') "
            "AND c.relnamespace = CAST(:schema AS regnamespace) AND c.relname = ANY (:tables) ORDER BY 2, 1"
        ),
        {"schema": SCHEMA, "tables": list(tables)},
    ).all()
    for row in rows:
        execute(connection, f"ALTER TABLE {_qualified(row.table)} DISABLE TRIGGER {quote(row.name)}")
    return [
        f"ALTER TABLE {_qualified(row.table)} ENABLE {'ALWAYS ' if row.always else ''}TRIGGER {quote(row.name)}"
        for row in rows
    ]


def set_aside(connection: Connection, table: str, columns: Sequence[str]) -> list[View]:
    """Drop the views that read these columns; return them for `put_back`.

    Raises:
        SchemaMismatch: one of them cannot be made again as it is.
    """
    found = views_on(connection, table, columns)
    for view in found:
        if view.obstacle:
            raise SchemaMismatch(
                f"The view {view.name} reads {table}.{', '.join(columns)} and cannot be made again: {view.obstacle}.",
                hint="Drop it, run this again, and create it anew.",
            )
    if found:
        execute(connection, f"DROP VIEW {', '.join(view.name for view in found)}")
    return found


def put_back(connection: Connection, views: Iterable[View]) -> None:
    """Create the views again, with owner, options, grants and comments."""
    connection.execute(sa.text("SELECT set_config('search_path', '', true)"))
    for view in views:
        for statement in view.restore:
            execute(connection, statement)
    connection.execute(sa.text(f"SELECT set_config('search_path', '{SCHEMA}', true)"))


def _option(option: str) -> str:
    name, _, value = option.partition("=")
    return f"{name}={literal(value)}"


def _qualified(table: str) -> str:
    return f"{SCHEMA}.{quote(table)}"
