"""Bringing the relations of the models in line with `dbt_like_sql/`.

Belongs here: what to create, replace and drop, in which order, what to compute then, and the atomic swap of tables. Does
not belong here: single statements (`relations.py`) and the rows of cells (`cells.py`).
"""

# ruff: noqa: S608 (identifiers come from checked model headers; there are no values in this SQL)
from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from flywheel_pipeline.errors import ModelError
from flywheel_pipeline.sql_models.loader import TELEMETRY, ModelGraph, SqlModel, load_models
from flywheel_pipeline.sql_models.relations import (
    Relation,
    create_empty_table,
    create_indexes,
    create_view,
    describe,
    drop,
    execute,
    primary_key,
    quote,
    read_relations,
    readers,
    type_oids,
    verify_columns,
)

_PENDING = "pending "


def sync_relations(connection: sa.Connection, graph: ModelGraph | None = None) -> list[str]:
    """Create, replace and drop relations until they are those of the models, within the caller's transaction.

    A model whose content hash is the recorded one is left alone. A changed view is dropped with the views
    that read it and created anew, in order. A changed cell model keeps its table where the columns and the
    key are the same. Models that are gone are dropped. No row is read, but for sealed figures in a table that has to go:
    what was changed is recorded as pending, which is nobody's content hash, so that no refresh works on it before
    `fill_models` has.

    Args:
        connection: an open transaction; the declared tables and routines exist.
        graph: the models; None loads them.

    Returns:
        What was done, one sentence each; empty when nothing was to do.

    Raises:
        ModelError: PostgreSQL refuses a SELECT, its columns are not the declared ones, a relation of that
        name is
            there that is not ours, a relation that is not ours reads one that must be dropped, or figures of purged
            days stand in it.
    """
    graph = graph if graph is not None else load_models()
    recorded = _recorded(connection)
    live = read_relations(connection, {*graph.models, *recorded})
    for model in graph:
        if model.name in live and model.name not in recorded:
            model.refuse(
                f"the database has a relation {model.name} already, which Flywheel did not make.",
                hint="Rename or drop that relation, or rename the model.",
            )
    changed = {
        model.name
        for model in graph
        if recorded.get(model.name) not in (model.content_hash, _pending(model))
        or not _fits(live.get(model.name), model)
    }
    removed = [name for name in recorded if name not in graph.models]
    # A table whose columns and key stay keeps its rows, its readers and its place.
    keeps = {
        name
        for name in changed
        if graph.models[name].materialized != "view" and _same_table(connection, live.get(name), graph.models[name])
    }
    if any(graph.models[name].cell for name in changed) or removed:
        connection.exec_driver_sql("SELECT flywheel_lock_refresh()")
    _refuse_to_lose_sealed_figures(connection, graph, {*(changed - keeps), *removed} & live.keys())
    dropped = _drop_with_readers(connection, {*(changed - keeps), *removed}, live, recorded)
    changes = [f"dropped {name}, which is no model any more" for name in removed]

    for model in graph:
        if model.name in changed:
            verify_columns(connection, model)
        if model.name not in changed and model.name not in dropped:
            if describe(connection, model, live[model.name]):
                changes.append(f"described {model.materialized} {model.name}")
            continue
        if model.name in keeps:
            describe(connection, model, live[model.name])
            changes.append(f"changed {model.materialized} {model.name}")
        else:
            if model.materialized == "view":
                create_view(connection, model)
            else:
                create_empty_table(connection, model)
            if model.name not in changed:
                changes.append(f"created {model.materialized} {model.name} again, since a model that it reads changed")
            elif model.name in recorded:
                changes.append(f"replaced {model.materialized} {model.name}")
            else:
                changes.append(f"created {model.materialized} {model.name}")
    _record(connection, {name: _pending(graph.models[name]) for name in changed})
    if removed:
        connection.execute(
            sa.text("DELETE FROM schema_objects WHERE kind = 'model' AND name = ANY(:names)"), {"names": removed}
        )
    return changes


def fill_models(connection: sa.Connection, graph: ModelGraph | None = None) -> list[str]:
    """Compute what the pending models ask for, within the caller's transaction, and record them as current.

    Rows of cell models, and those of cell models behind a changed view, are recomputed by the next refresh: every cell is
    touched (`flywheel_touch_all`) if there is any telemetry. Roll-ups by month and site are filled at once from the rows
    below them, since a refresh follows what changed there. Writers of telemetry go on meanwhile: what they commit is in
    the outbox by itself, and the refresh lock is held from before the first read to the end of the transaction.

    Args:
        connection: an open transaction of level READ COMMITTED; `sync_relations` has left nothing to do.
        graph: the models; None loads them.

    Returns:
        What was done, one sentence each; empty when nothing was pending, or only views that no cell model reads.
    """
    graph = graph if graph is not None else load_models()
    recorded = _recorded(connection)
    pending = {model.name for model in graph if recorded.get(model.name) == _pending(model)}
    if not pending:
        return []
    connection.exec_driver_sql("SELECT flywheel_lock_refresh()")
    for model in graph:
        if model.name in pending and model.materialized != "view":
            create_indexes(connection, model)
        if model.name in pending and model.materialized == "table":
            create_table_swap(connection, model, graph)
        if model.cell in ("month", "site") and ({model.name, *(v.name for v in graph.views_below(model))} & pending):
            _fill(connection, model)
    changes = []
    if _needs_recompute(graph, pending) and _has_telemetry(connection):
        cells = connection.exec_driver_sql("SELECT flywheel_touch_all()").scalar_one()
        changes.append(f"touched all {cells} cells, to be recomputed by the next refresh")
    _record(connection, {name: graph.models[name].content_hash for name in pending})
    return changes


def create_table_swap(connection: sa.Connection, model: SqlModel, graph: ModelGraph | None = None) -> int:
    """Build a table model anew and put it in the place of the old one, within the caller's transaction.

    Others read the old rows until the caller commits and the new ones after; they wait only for the swap
    itself. Views that read the table are created again on the new one.

    Args:
        connection: an open transaction.
        model: a model of `materialized: table`.
        graph: all models; None loads them where a view reads the table.

    Returns:
        Rows in the new table.

    Raises:
        ModelError: the model is no table, two rows have one key, a null is in the key, or a view reads the
        table
            that is not ours.
    """
    if model.materialized != "table":
        model.refuse(f"{model.name} is a {model.materialized}; only a table is swapped.")
    built = f"{model.name}__new"
    create_empty_table(connection, model, built)
    names = ", ".join(quote(column) for column in model.columns)
    try:
        rows = execute(connection, f"INSERT INTO {quote(built)} ({names})\n{model.sql}").rowcount
    except IntegrityError as error:
        detail = getattr(getattr(error.orig, "diag", None), "message_detail", None) or str(error.orig)
        model.refuse(
            f"the rows do not fit the key ({', '.join(model.key)}): {detail}",
            hint="The SELECT must give one row per key, with no null in it.",
        )
    execute(connection, f"ANALYZE {quote(built)}")
    recorded = _recorded(connection)
    live = read_relations(connection, {model.name, *recorded})
    gone = _drop_with_readers(connection, {model.name}, live, {**recorded, model.name: model.content_hash})
    execute(connection, f"ALTER TABLE {quote(built)} RENAME TO {quote(model.name)}")
    execute(
        connection,
        f"ALTER TABLE {quote(model.name)} RENAME CONSTRAINT {quote(f'{built}_pkey')} TO {quote(f'{model.name}_pkey')}",
    )
    if gone - {model.name}:
        for reader in graph if graph is not None else load_models():
            if reader.name in gone and reader.name != model.name:
                create_view(connection, reader)
    return rows


def stale_models(connection: sa.Connection, graph: ModelGraph | None = None) -> list[str]:
    """Name the models whose recorded content hash is missing or another, and those that are gone; sorted.

    A changed SELECT of a cell model shows here and nowhere else: its table looks the same. Changes nothing.
    """
    graph = graph if graph is not None else load_models()
    recorded = _recorded(connection)
    stale = {model.name for model in graph if recorded.get(model.name) != model.content_hash}
    return sorted(stale | (recorded.keys() - graph.models.keys()))


def pending_models(connection: sa.Connection) -> list[str]:
    """Name the models that `sync_relations` changed and `fill_models` did not come to; sorted. Changes nothing."""
    return [name for name, recorded in _recorded(connection).items() if recorded.startswith(_PENDING)]


def _recorded(connection: sa.Connection) -> dict[str, str]:
    rows = connection.exec_driver_sql(
        "SELECT name, content_hash FROM schema_objects WHERE kind = 'model' ORDER BY name"
    )
    return {row.name: row.content_hash for row in rows}


def _pending(model: SqlModel) -> str:
    """What is recorded of a model whose relation is this release's and whose rows are not yet."""
    return f"{_PENDING}{model.content_hash}"[:64]


def _record(connection: sa.Connection, hashes: Mapping[str, str]) -> None:
    if hashes:
        connection.execute(
            sa.text(
                "INSERT INTO schema_objects (kind, name, content_hash) VALUES ('model', :name, :hash) "
                "ON CONFLICT (kind, name) "
                "DO UPDATE SET content_hash = excluded.content_hash, applied_at = clock_timestamp()"
            ),
            [{"name": name, "hash": hashes[name]} for name in sorted(hashes)],
        )


def _fits(relation: Relation | None, model: SqlModel) -> bool:
    """Say whether the relation is there and of the kind, columns and key that the model needs (types
    apart).
    """
    if relation is None:
        return False
    if [column for column, _, _ in relation.columns] != list(model.columns):
        return False
    if model.materialized == "view":
        return relation.kind == "v"
    return relation.kind == "r" and list(relation.key) == primary_key(model)


def _same_table(connection: sa.Connection, relation: Relation | None, model: SqlModel) -> bool:
    if relation is None or not _fits(relation, model):
        return False
    oids = type_oids(connection, (declared for declared, _ in model.columns.values()))
    return [oid for _, oid, _ in relation.columns] == [
        oids[declared] for declared, _ in model.columns.values()
    ] and not any("(" in declared for declared, _ in model.columns.values())


def _drop_with_readers(
    connection: sa.Connection, names: set[str], live: dict[str, Relation], ours: dict[str, str]
) -> set[str]:
    """Drop these relations where they exist, and first every view of ours that reads them; return all
    dropped.

    The order comes from the catalogue and not from the graph: the views in the database are still the old
    ones.
    """
    doomed = {name for name in names if name in live}
    reads: dict[str, set[str]] = {name: set() for name in doomed}
    waiting = set(doomed)
    while waiting:
        found = readers(connection, waiting)
        waiting = set()
        for read, reader in found:
            if reader not in ours or reader not in live:
                raise ModelError(
                    f"{reader}, which Flywheel did not make, reads {read}, which has to be replaced.",
                    hint=f"Drop {reader}, run this again, and create it anew.",
                )
            reads.setdefault(read, set()).add(reader)
            if reader not in doomed:
                doomed.add(reader)
                reads.setdefault(reader, set())
                waiting.add(reader)
    gone: set[str] = set()

    def take_down(name: str) -> None:
        if name in gone:
            return
        for reader in sorted(reads[name]):
            take_down(reader)
        drop(connection, live[name])
        gone.add(name)

    for name in sorted(doomed):
        take_down(name)
    return gone


def _fill(connection: sa.Connection, model: SqlModel) -> None:
    """Compute a roll-up anew from the cells below it."""
    names = ", ".join(quote(column) for column in model.columns)
    execute(connection, f"DELETE FROM {quote(model.name)}")
    execute(connection, f"INSERT INTO {quote(model.name)} ({names})\n{model.sql}")


def _refuse_to_lose_sealed_figures(connection: sa.Connection, graph: ModelGraph, doomed: set[str]) -> None:
    """Refuse to drop the table of a model of cell day while it holds figures whose telemetry was purged."""
    for name in sorted(doomed):
        model = graph.models.get(name)
        if model is None or model.cell != "day":
            continue
        sealed = connection.exec_driver_sql(
            f"SELECT count(*) FROM {quote(name)} WHERE day IN (SELECT day FROM sealed_days)"
        ).scalar_one()
        if sealed:
            model.refuse(
                f"the table must be made anew, and {sealed} of its rows are figures of purged days that no telemetry can give again.",
                hint="Give the model with its new columns another name, and keep the old one.",
            )


def _needs_recompute(graph: ModelGraph, changed: set[str]) -> bool:
    return any(
        model.materialized == "cell"
        or (model.materialized == "view" and any(d.cell for d in graph.dependants(model.name)))
        for model in graph
        if model.name in changed
    )


def _has_telemetry(connection: sa.Connection) -> bool:
    return bool(connection.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM {TELEMETRY})").scalar_one())
