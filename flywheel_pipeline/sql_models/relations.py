"""The relations behind the models: creating, dropping, describing and inspecting them in PostgreSQL.

Belongs here: statements about one relation, and what the catalogue says of them. Does not belong here:
which of them must change (`sync.py`) and the rows of cells (`cells.py`).
"""

# ruff: noqa: S608 (identifiers come from checked model headers; there are no values in this SQL)
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from flywheel_pipeline.sql_models.loader import SqlModel


def quote(identifier: str) -> str:
    """Give an SQL identifier, quoted."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(value: str) -> str:
    """Give an SQL string literal (standard_conforming_strings, the default since PostgreSQL 9.1)."""
    return "'" + value.replace("'", "''") + "'"


def execute(connection: sa.Connection, statement: str) -> sa.CursorResult[Any]:
    """Run SQL text as it stands: no parameters, so that `%` and `:` in a model mean what they say."""
    return connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


@dataclass(frozen=True)
class Relation:
    """A relation as the catalogue has it. `kind` is relkind: v view, r table, m materialized view, f
    foreign table.

    `columns` are (name, type oid, type as PostgreSQL prints it) in order; `key` is the primary key, empty
    without.
    """

    name: str
    kind: str
    columns: tuple[tuple[str, int, str], ...]
    key: tuple[str, ...]
    comment: str | None
    column_comments: dict[str, str]


def read_relations(connection: sa.Connection, names: Iterable[str]) -> dict[str, Relation]:
    """Look up relations of the current schema by name; names that do not exist are left out."""
    rows = connection.execute(
        sa.text(
            """
            SELECT c.relname AS name, c.relkind::text AS kind, obj_description(c.oid, 'pg_class') AS comment,
              (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
              (SELECT array_agg(a.atttypid::bigint ORDER BY a.attnum) FROM pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS types,
              (SELECT array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum) FROM pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS type_names,
              (SELECT array_agg(col_description(c.oid, a.attnum) ORDER BY a.attnum) FROM pg_attribute a
               WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS column_comments,
              (SELECT array_agg(a.attname::text ORDER BY k.position)
               FROM pg_index i
               CROSS JOIN LATERAL unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, position)
               JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
               WHERE i.indrelid = c.oid AND i.indisprimary) AS key
            FROM pg_class c
            WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
              AND c.relkind IN ('v', 'r', 'm', 'f', 'p')
              AND c.relname = ANY(:names)
            """
        ),
        {"names": list(names)},
    )
    return {
        row.name: Relation(
            name=row.name,
            kind=row.kind,
            columns=tuple(zip(row.columns or (), row.types or (), row.type_names or (), strict=True)),
            key=tuple(row.key or ()),
            comment=row.comment,
            column_comments={
                column: comment
                for column, comment in zip(row.columns or (), row.column_comments or (), strict=True)
                if comment is not None
            },
        )
        for row in rows
    }


def readers(connection: sa.Connection, names: Iterable[str]) -> list[tuple[str, str]]:
    """Give (relation, reader) for each view or materialized view that reads one of these relations directly.

    Both are named as PostgreSQL prints them: with a schema where it is not the current one.
    """
    rows = connection.execute(
        sa.text(
            """
            SELECT DISTINCT c.relname::text AS read,
              CASE WHEN v.relnamespace = c.relnamespace THEN v.relname::text
                   ELSE v.oid::regclass::text END AS reader
            FROM pg_class c
            JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid
              AND d.classid = 'pg_rewrite'::regclass
            JOIN pg_rewrite w ON w.oid = d.objid
            JOIN pg_class v ON v.oid = w.ev_class AND v.oid <> c.oid
            WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
              AND c.relname = ANY(:names)
            ORDER BY 1, 2
            """
        ),
        {"names": list(names)},
    )
    return [(row.read, row.reader) for row in rows]


def type_oids(connection: sa.Connection, declared: Iterable[str]) -> dict[str, int | None]:
    """Map declared types to their oids; None for a name that PostgreSQL does not know."""
    wanted = sorted(set(declared))
    rows = connection.execute(
        sa.text(
            "SELECT t AS declared, CAST(to_regtype(t) AS oid)::bigint AS oid FROM unnest(CAST(:types AS text[])) AS t"
        ),
        {"types": wanted},
    )
    return {row.declared: row.oid for row in rows}


def verify_columns(connection: sa.Connection, model: SqlModel) -> None:
    """Hold the declared columns against those that PostgreSQL gives for the model's SELECT.

    Plans the SELECT without running it. The type must be the declared one; lengths and precisions are
    compared where the header gives them.

    Raises:
        ModelError: the SELECT is refused by PostgreSQL, or a column has another name or type than declared.
    """
    probe = f"SELECT * FROM (\n{model.sql}\n) AS q LIMIT 0"
    try:
        result = execute(connection, probe)
    except DBAPIError as error:
        diagnosis = getattr(error.orig, "diag", None)
        position = getattr(diagnosis, "statement_position", None)
        line = None
        if position:
            line = model.first_line + probe.count("\n", 0, int(position) - 1) - 1
        model.refuse(
            f"PostgreSQL refuses the SELECT: {getattr(diagnosis, 'message_primary', None) or error.orig}.",
            line=line,
        )
    cursor: Any = result.cursor
    real: list[tuple[str, int, str]] = [(c.name, c.type_code, _printed(c)) for c in cursor.description]
    result.close()
    oids = type_oids(connection, (declared for declared, _ in model.columns.values()))
    printed = _type_names(connection, [oid for _, oid, _ in real])
    wrong: list[str] = []
    for (column, (declared, _)), (name, oid, modifier) in zip(model.columns.items(), real, strict=True):
        if column != name:
            model.refuse(f"the column {column} of the header is {name} in PostgreSQL.")
        if oids[declared] is None:
            model.refuse(f"the column {column} is declared as {declared}, which is no type of PostgreSQL.")
        if oids[declared] != oid or ("(" in declared and modifier != _modifier(declared)):
            wrong.append(f"{column} is declared as {declared} and is {printed[oid]}{modifier}")
    if wrong:
        model.refuse(
            f"the types of the columns differ in PostgreSQL: {'; '.join(wrong)}.",
            hint="Cast them in the SELECT, or declare the real types.",
        )


def _printed(column: Any) -> str:
    if column.precision is not None and column.scale is not None:
        return f"({column.precision},{column.scale})"
    if column.display_size is not None:
        return f"({column.display_size})"
    return ""


def _modifier(declared: str) -> str:
    return declared[declared.index("(") : declared.index(")") + 1].replace(" ", "")


def _type_names(connection: sa.Connection, oids: Sequence[int]) -> dict[int, str]:
    rows = connection.execute(
        sa.text("SELECT o AS oid, format_type(CAST(o AS oid), NULL) AS name FROM unnest(CAST(:oids AS bigint[])) AS o"),
        {"oids": sorted(set(oids))},
    )
    return {row.oid: row.name for row in rows}


def primary_key(model: SqlModel) -> list[str]:
    """Give the key in the order of the index: the cell's columns first, since a refresh looks rows up by
    cell.
    """
    return [*model.scope_columns, *(column for column in model.key if column not in model.scope_columns)]


def create_view(connection: sa.Connection, model: SqlModel) -> None:
    """Create the model's view from its SELECT as written, and describe it."""
    execute(connection, f"CREATE VIEW {quote(model.name)} AS\n{model.sql}")
    describe(connection, model, None)


def create_empty_table(connection: sa.Connection, model: SqlModel, name: str | None = None) -> None:
    """Create the model's table with the declared columns and the key as primary key, without rows."""
    name = name or model.name
    columns = [
        f"{quote(column)} {declared}{' NOT NULL' if column in model.key else ''}"
        for column, (declared, _) in model.columns.items()
    ]
    key = ", ".join(quote(column) for column in primary_key(model))
    columns.append(f"CONSTRAINT {quote(f'{name}_pkey')} PRIMARY KEY ({key})")
    execute(connection, f"CREATE TABLE {quote(name)} (\n  " + ",\n  ".join(columns) + "\n)")
    create_indexes(connection, model)
    describe(connection, model, None, name=name)


def create_indexes(connection: sa.Connection, model: SqlModel) -> None:
    """Create those indexes of the header that the model's table does not have yet."""
    for columns in model.indexes:
        name = quote(_index_name(model, columns))
        listed = ", ".join(quote(column) for column in columns)
        execute(connection, f"CREATE INDEX IF NOT EXISTS {name} ON {quote(model.name)} ({listed})")


def _index_name(model: SqlModel, columns: Sequence[str]) -> str:
    return f"{model.name}_{'_'.join(columns)}_idx"[:63]


def drop_indexes(connection: sa.Connection, model: SqlModel) -> None:
    """Drop the key and the indexes of the model's table, so that it can be filled at once; `restore_indexes` follows."""
    for columns in model.indexes:
        execute(connection, f"DROP INDEX IF EXISTS {quote(_index_name(model, columns))}")
    execute(connection, f"ALTER TABLE {quote(model.name)} DROP CONSTRAINT {quote(f'{model.name}_pkey')}")


def restore_indexes(connection: sa.Connection, model: SqlModel) -> None:
    """Create again what `drop_indexes` dropped; two rows of one key break the key here."""
    key = ", ".join(quote(column) for column in primary_key(model))
    execute(
        connection, f"ALTER TABLE {quote(model.name)} ADD CONSTRAINT {quote(f'{model.name}_pkey')} PRIMARY KEY ({key})"
    )
    create_indexes(connection, model)


def drop(connection: sa.Connection, relation: Relation) -> None:
    """Drop a relation that nothing reads any more."""
    kind = {"v": "VIEW", "m": "MATERIALIZED VIEW"}.get(relation.kind, "TABLE")
    execute(connection, f"DROP {kind} {quote(relation.name)}")


def describe(connection: sa.Connection, model: SqlModel, relation: Relation | None, *, name: str | None = None) -> bool:
    """Set the comments of the relation and its columns where they differ from the header; say whether any
    did.
    """
    target = f"{quote(name or model.name)}"
    kind = "VIEW" if model.materialized == "view" else "TABLE"
    wanted = f"{model.description} Grain: {model.grain}."
    statements = []
    if relation is None or relation.comment != wanted:
        statements.append(f"COMMENT ON {kind} {target} IS {literal(wanted)}")
    statements += [
        f"COMMENT ON COLUMN {target}.{quote(column)} IS {literal(description)}"
        for column, (_, description) in model.columns.items()
        if relation is None or relation.column_comments.get(column) != description
    ]
    if statements:
        execute(connection, ";\n".join(statements))
    return bool(statements)
