"""Naming every difference between a live database and what this release declares.

Belongs here: the comparison. The declared schema is really created, in a scratch schema of the same server
and in a transaction that is rolled back, and the two are read from the catalog by the same queries: so
PostgreSQL itself brings types, defaults, generation expressions and view texts into one form, and nothing is
imagined. Does not belong here: repairing anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from flywheel_pipeline.database import declared
from flywheel_pipeline.database.tables import metadata

_SCRATCH: Final = "flywheel_declared"


@dataclass(frozen=True)
class Difference:
    """One difference. `expected` is what this release declares, `found` what the database holds."""

    object: str
    problem: str
    expected: str
    found: str


@dataclass(frozen=True)
class CatalogObject:
    """A database object: the table it belongs to ('' for a function), and what describes it."""

    table: str
    facts: Mapping[str, str]


# Each query gives (label, table, fact name, fact) of the objects in the schema :schema, which is also the
# search_path, so that nothing is printed with the schema's name and the two snapshots can be compared.
_QUERIES: Final[tuple[str, ...]] = (
    # Tables and views.
    """
    SELECT CASE c.relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'materialized view ' ELSE 'table ' END
             || c.relname,
           c.relname::text, 'definition', coalesce(btrim(pg_get_viewdef(c.oid, true)), '')
    FROM pg_class c WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('r', 'p', 'v', 'm')
    """,
    """
    SELECT 'column ' || c.relname || '.' || a.attname, c.relname::text, f.name, f.fact
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    CROSS JOIN LATERAL (VALUES
      ('type', format_type(a.atttypid, a.atttypmod)),
      ('nullability', CASE WHEN a.attnotnull THEN 'NOT NULL' ELSE 'NULL' END),
      ('default', CASE a.attgenerated WHEN '' THEN coalesce(pg_get_expr(d.adbin, d.adrelid), '') ELSE '' END),
      ('generation', CASE a.attgenerated
          WHEN 's' THEN 'GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ') STORED'
          WHEN 'v' THEN 'GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ') VIRTUAL'
          ELSE '' END),
      ('identity', CASE a.attidentity WHEN 'a' THEN 'ALWAYS' WHEN 'd' THEN 'BY DEFAULT' ELSE '' END)
    ) f (name, fact)
    WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('r', 'p')
    """,
    # NOT NULL constraints (contype n, since PostgreSQL 18) are told by the columns.
    """
    SELECT 'constraint ' || k.conname || ' on ' || c.relname, c.relname::text, 'definition',
           pg_get_constraintdef(k.oid, true)
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
    WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('r', 'p')
      AND k.contype NOT IN ('n', 't')
    """,
    # Indexes that a constraint made are told by the constraint.
    """
    SELECT 'index ' || i.relname || ' on ' || c.relname, c.relname::text, 'definition',
           pg_get_indexdef(i.oid, 0, true) || CASE WHEN x.indisvalid THEN '' ELSE ' INVALID' END
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class c ON c.oid = x.indrelid
    WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('r', 'p')
      AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.oid AND k.conrelid = c.oid)
    """,
    """
    SELECT 'trigger ' || t.tgname || ' on ' || c.relname, c.relname::text, f.name, f.fact
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
    CROSS JOIN LATERAL (VALUES
      ('definition', pg_get_triggerdef(t.oid, true)),
      ('state', CASE t.tgenabled WHEN 'O' THEN 'enabled' WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'replica only'
                ELSE 'always' END)
    ) f (name, fact)
    WHERE c.relnamespace = CAST(:schema AS regnamespace) AND NOT t.tgisinternal
    """,
    # Row-level security: whether it is on, and each policy.
    """
    SELECT 'row security of ' || c.relname, c.relname::text, 'state',
           CASE WHEN c.relrowsecurity THEN 'enabled' ELSE 'disabled' END
           || CASE WHEN c.relforcerowsecurity THEN ', forced' ELSE '' END
    FROM pg_class c WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('r', 'p')
    """,
    """
    SELECT 'policy ' || p.polname || ' on ' || c.relname, c.relname::text, f.name, f.fact
    FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
    CROSS JOIN LATERAL (VALUES
      ('command', p.polcmd::text || CASE WHEN p.polpermissive THEN ' permissive' ELSE ' restrictive' END),
      ('condition', coalesce(pg_get_expr(p.polqual, p.polrelid), '')),
      ('condition of writes', coalesce(pg_get_expr(p.polwithcheck, p.polrelid), ''))
    ) f (name, fact)
    WHERE c.relnamespace = CAST(:schema AS regnamespace)
    """,
    """
    SELECT 'function ' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')', '',
           f.name, f.fact
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    CROSS JOIN LATERAL (VALUES
      ('result', coalesce(pg_get_function_result(p.oid), '')),
      ('attributes', concat_ws(' ', l.lanname, p.provolatile, p.proparallel, p.prosecdef, p.proisstrict,
                               p.proconfig)),
      ('body', coalesce(pg_get_function_sqlbody(p.oid), p.prosrc))
    ) f (name, fact)
    WHERE p.pronamespace = CAST(:schema AS regnamespace)
    """,
    """
    SELECT 'statistics ' || s.stxname || ' on ' || c.relname, c.relname::text, 'definition',
           concat_ws(', ', (SELECT string_agg(a.attname, ', ' ORDER BY a.attname) FROM pg_attribute a
                            WHERE a.attrelid = s.stxrelid AND a.attnum = ANY (s.stxkeys)),
                     array_to_string(pg_get_statisticsobjdef_expressions(s.oid), ', ')) || ' ' || array_to_string(s.stxkind, ',')
    FROM pg_statistic_ext s JOIN pg_class c ON c.oid = s.stxrelid
    WHERE s.stxnamespace = CAST(:schema AS regnamespace)
    """,
)


def check(engine: Engine) -> list[Difference]:
    """Compare the live schema with the declared one and name every difference, ordered by object.

    Compared are the declared tables (columns with type, nullability, default, generation and identity;
    constraints, indexes, triggers, statistics), the functions, and the relations of the SQL models. What
    stands on our tables and nobody declared is named as well. Relations that nobody declared, and everything
    on them, are other systems' and are left out. Nothing is changed: the transaction is rolled back.

    What an adoption left as the old system made it (`adoption_journal`) is no difference, as long as it stays exactly so.
    A model that an upgrade left pending is one, though its relation is as declared.

    Raises SchemaMismatch when the database is at a revision newer than this release.
    """
    with engine.connect() as connection, connection.begin() as transaction:
        revision, head = declared.revision(connection), declared.head_revision()
        accepted = _accepted(connection)
        pending = [] if revision is None else declared.pending_models(connection)
        expected, live = snapshots(connection)
        transaction.rollback()
    found = [difference for difference in differences(expected, live) if _as_dumped(difference) not in accepted]
    found += [Difference(f"model {name}", "not computed", "`flywheel db upgrade` to its end", "") for name in pending]
    if revision != head:
        found.insert(0, Difference("migrations", "not at the newest revision", head, revision or "none"))
    return found


def snapshots(connection: Connection) -> tuple[dict[str, CatalogObject], dict[str, CatalogObject]]:
    """Return (declared, live): every object by the label under which differences name it. Nothing stays changed."""
    savepoint = connection.begin_nested()
    live = _snapshot(connection, declared.SCHEMA)
    expected = _declare(connection)
    savepoint.rollback()
    return expected, live


def _accepted(connection: Connection) -> set[Difference]:
    if not sa.inspect(connection).has_table("adoption_journal", schema=declared.SCHEMA):
        return set()
    rows = connection.execute(
        sa.text(f"SELECT details FROM {declared.SCHEMA}.adoption_journal WHERE kind = 'accepted'")  # noqa: S608
    )
    return {_as_dumped(Difference(**row.details)) for row in rows}


# PostgreSQL prints `status IN ('a', 'b')` on a varchar as ARRAY['a'::character varying, …]::text[], and reads that back,
# from a dump, as ARRAY['a'::character varying::text, …]. The two are one expression: a restored database is no other.
_VARCHARS = re.compile(r"ARRAY\[((?:'(?:[^']|'')*'::character varying(?:, )?)+)\]::text\[\]")


def _dumped(text: str) -> str:
    return _VARCHARS.sub(lambda m: f"ARRAY[{m[1].replace('::character varying', '::character varying::text')}]", text)


def _as_dumped(difference: Difference) -> Difference:
    return replace(difference, expected=_dumped(difference.expected), found=_dumped(difference.found))


def _declare(connection: Connection) -> dict[str, CatalogObject]:
    """Create everything this release declares in a scratch schema and read it back."""
    connection.execute(sa.schema.CreateSchema(_SCRATCH))
    connection.execute(sa.text(f"SET LOCAL search_path = {_SCRATCH}"))
    # Functions name the schema public; in a database that was never upgraded its tables are not there yet.
    connection.execute(sa.text("SET LOCAL check_function_bodies = off"))
    metadata.create_all(connection, checkfirst=False)
    for routine in declared.routines():
        declared.execute_routine(connection, routine)
    declared.sync_relations(connection)
    return _snapshot(connection, _SCRATCH)


def _snapshot(connection: Connection, schema: str) -> dict[str, CatalogObject]:
    connection.execute(sa.text(f"SET LOCAL search_path = {schema}"))
    facts: dict[str, dict[str, str]] = {}
    tables: dict[str, str] = {}
    for query in _QUERIES:
        for label, table, name, fact in connection.execute(sa.text(query), {"schema": schema}):
            facts.setdefault(label, {})[name] = fact
            tables[label] = table
    return {label: CatalogObject(tables[label], found) for label, found in facts.items()}


def differences(wanted: Mapping[str, CatalogObject], live: Mapping[str, CatalogObject]) -> Iterator[Difference]:
    """Name every difference of two snapshots, in order of object."""
    ours = {entry.table for entry in wanted.values()} - {""}
    present = {entry.table for entry in live.values()}
    for label in sorted(wanted.keys() | live.keys()):
        expected, found = wanted.get(label), live.get(label)
        if found is None and expected is not None:
            absent_table = expected.table and expected.table not in present
            if not absent_table or _is_relation(label):
                yield Difference(label, "missing", _spoken(expected), "")
        elif expected is None and found is not None:
            if found.table in ours:
                yield Difference(label, "not declared", "", _spoken(found))
        elif expected is not None and found is not None:
            for name in expected.facts:
                if _dumped(expected.facts[name]) != _dumped(found.facts[name]):
                    problem = _problem(name, expected.facts[name], found.facts[name])
                    yield Difference(label, problem, _one_line(expected.facts[name]), _one_line(found.facts[name]))


def _is_relation(label: str) -> bool:
    return label.startswith(("table ", "view ", "materialized view "))


def _problem(fact: str, expected: str, found: str) -> str:
    if fact == "generation":
        if not found:
            return "not generated"
        if not expected:
            return "generated"
    return f"another {fact}"


def _spoken(described: CatalogObject) -> str:
    return _one_line(" ".join(fact for fact in described.facts.values() if fact))


def _one_line(text: str) -> str:
    return " ".join(text.split())
