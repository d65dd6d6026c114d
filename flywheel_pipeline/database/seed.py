"""Seeds: rows that every installation starts with, from YAML files in `seeds/`.

Belongs here: loading the runbook catalogue, the outcome class rules and the built-in rules, once per content
of their file. Does not belong here: sample data (`simulation/`), and reference rows that only the database's
own triggers read (they stand in `routines/` beside them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final

import sqlalchemy as sa
import yaml
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql as pg

from flywheel_pipeline.database.tables import outcome_class_rules, runbooks, schema_objects

# Rows already there stay as they are: a data engineer may have changed or disabled them.
TABLES: Final[Mapping[str, sa.Table]] = {
    "runbooks": runbooks,
    "outcome_class_rules": outcome_class_rules,
}
BUILTIN_RULES: Final = "builtin_rules"


def read_seed(name: str) -> list[dict[str, Any]]:
    """Return the rows of `seeds/<name>.yaml`."""
    return _parse(name, _text(name))


def content_hashes() -> dict[str, str]:
    """Sha256 of each seed file, in hexadecimal, in the order in which they are applied."""
    return {name: hashlib.sha256(_text(name).encode()).hexdigest() for name in (*TABLES, BUILTIN_RULES)}


def apply_seeds(connection: Connection) -> Iterator[str]:
    """Insert the rows of every seed file that changed since it was last applied; yield a phrase for each.

    Rows whose key exists are left as they are. Built-in rules enter through the ledger, as `registered`.
    """
    from flywheel_pipeline.promotion.ledger import register_builtin

    for name, content_hash in content_hashes().items():
        if not record_content(connection, "seed", name, content_hash):
            continue
        rows = read_seed(name)
        if name == BUILTIN_RULES:
            inserted = register_builtin(connection, rows)
        else:
            inserted = sum(_insert(connection, TABLES[name], row) for row in rows)
        yield f"seed {name}: {inserted} rows"


def record_content(connection: Connection, kind: str, name: str, content_hash: str) -> bool:
    """Record in `schema_objects` what is being applied; tell whether it differs from what was recorded."""
    statement = pg.insert(schema_objects).values(kind=kind, name=name, content_hash=content_hash)
    changed = connection.execute(
        statement.on_conflict_do_update(
            index_elements=[schema_objects.c.kind, schema_objects.c.name],
            set_={"content_hash": statement.excluded.content_hash, "applied_at": sa.func.clock_timestamp()},
            where=schema_objects.c.content_hash != statement.excluded.content_hash,
        ).returning(schema_objects.c.name)
    )
    return changed.first() is not None


def _text(name: str) -> str:
    file = resources.files("flywheel_pipeline.database") / "seeds" / f"{name}.yaml"
    return file.read_text(encoding="utf-8")


def _parse(name: str, text: str) -> list[dict[str, Any]]:
    rows = yaml.safe_load(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"seeds/{name}.yaml must be a list of mappings")
    return rows


def _insert(connection: Connection, table: sa.Table, row: Mapping[str, Any]) -> int:
    statement = pg.insert(table).values(**row).on_conflict_do_nothing().returning(sa.literal(1))
    return len(connection.execute(statement).all())
