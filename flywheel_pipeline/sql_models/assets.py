"""The models as Dagster assets: their specs, and what a materialization says of them.

Belongs here: specs and metadata of any model. Does not belong here: which asset function refreshes them
(the rooms' `assets.py`) and what a model computes.
"""

# ruff: noqa: S608 (identifiers come from checked model headers; there are no values in this SQL)
from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from flywheel_pipeline.database import tables
from flywheel_pipeline.database.column_words import column_words
from flywheel_pipeline.sql_models.cells import CellCounts
from flywheel_pipeline.sql_models.loader import ModelGraph, SqlModel
from flywheel_pipeline.sql_models.metadata import markdown_table
from flywheel_pipeline.sql_models.relations import execute, quote

PREVIEW_ROWS = 5
# Above this planner cost (about a second) a view is not counted or previewed on each run: the cost of a
# refresh follows the new rows, and its metadata must too.
COUNT_COST_LIMIT = 100_000.0


def asset_spec(
    model: SqlModel, graph: ModelGraph, *, source_keys: Mapping[str, dg.AssetKey | None] | None = None
) -> dg.AssetSpec:
    """Describe a model as a Dagster asset.

    Args:
        model: the model.
        graph: all models.
        source_keys: asset keys of tables that other assets write, by table name; None as a value leaves
            the table out of the lineage. A table not named here becomes a dependency under its own name.

    Returns:
        The spec: key [name], room as group, dependencies, a description that leads with its most important
        sentence, owner, kinds, tags, code version, column schema and lineage, the SQL, and a link to its
        file.
    """
    keys = source_keys or {}
    deps: list[dg.AssetKey] = []
    for name in sorted(model.dependencies):
        key = dg.AssetKey([name]) if name in graph.models else keys.get(name, dg.AssetKey([name]))
        if key is not None and key not in deps:
            deps.append(key)
    consumers = f"\n\nConsumers: {', '.join(model.consumers)}." if model.consumers else ""
    return dg.AssetSpec(
        key=dg.AssetKey([model.name]),
        group_name=model.room,
        deps=deps,
        description=f"{model.description}\n\nGrain: {model.grain}.{consumers}",
        owners=[model.owner],
        kinds={"postgres", "sql", model.materialized},
        tags=dict(model.tags),
        code_version=model.content_hash[:12],
        metadata={
            "dagster/column_schema": dg.TableSchema(
                columns=[
                    dg.TableColumn(
                        name=column,
                        type=declared,
                        description=description,
                        constraints=dg.TableColumnConstraints(nullable=column not in model.key),
                    )
                    for column, (declared, description) in model.columns.items()
                ]
            ),
            "dagster/column_lineage": column_lineage(model, source_keys=keys),
            "dagster/table_name": f"public.{model.name}",
            "dagster/code_references": code_reference(model.path, 1, model.file),
            "file": dg.MetadataValue.path(str(model.path)),
            "key": dg.MetadataValue.text(", ".join(model.key)),
            "sql": dg.MetadataValue.md(f"```sql\n{model.sql}\n```"),
        },
    )


def code_reference(path: Path, line: int, label: str) -> dg.CodeReferencesMetadataValue:
    """Link to a place in a file. The class is in beta; our pin on dagster is exact, so it cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        reference = dg.LocalFileCodeReference(file_path=str(path), line_number=line, label=label)
        return dg.CodeReferencesMetadataValue(code_references=[reference])


def column_lineage(
    model: SqlModel, *, source_keys: Mapping[str, dg.AssetKey | None] | None = None
) -> dg.TableColumnLineage:
    """Give the model's column lineage in Dagster's form, over its direct dependencies."""
    keys = source_keys or {}
    return dg.TableColumnLineage(
        deps_by_column={
            column: [
                dg.TableColumnDep(asset_key=key, column_name=source_column)
                for relation, source_column in sources
                if (key := keys.get(relation, dg.AssetKey([relation]))) is not None
            ]
            for column, sources in model.column_lineage.items()
        }
    )


def materialization_metadata(
    connection: sa.Connection,
    model: SqlModel,
    counts: CellCounts | None = None,
    *,
    cost_limit: float = COUNT_COST_LIMIT,
) -> dict[str, Any]:
    """Say what a model holds now, for a materialization in the Dagster UI.

    Numbers stand as numbers, so that Dagster plots them. Rows are counted where the planner expects that to
    be cheap; else its estimate stands under a name of its own, `row_count_estimate`.

    Args:
        connection: any connection to the database.
        model: the model.
        counts: what a recompute did to a cell model.
        cost_limit: planner cost of reading the whole model above which it is not counted.

    Returns:
        Metadata by name, every value acceptable to Dagster.
    """
    metadata = relation_metadata(connection, model.name, list(model.columns), cost_limit=cost_limit)
    if counts is not None:
        metadata["rows_inserted"] = counts.inserted
        metadata["rows_updated"] = counts.updated
        metadata["rows_deleted"] = counts.deleted
        metadata["rows_unchanged"] = counts.unchanged
    metadata["sql"] = dg.MetadataValue.md(f"```sql\n{model.sql}\n```")
    return metadata


def relation_metadata(
    connection: sa.Connection,
    name: str,
    columns: Sequence[str],
    *,
    newest_by: Sequence[str] = (),
    cost_limit: float = COUNT_COST_LIMIT,
) -> dict[str, Any]:
    """Say how many rows a table or view holds, and show a few of these columns.

    Args:
        connection: any connection to the database.
        name: the table or view; like all names here it is one of ours.
        columns: the columns to show, in order.
        newest_by: columns by which the rows with the highest values are shown; none: any rows.
        cost_limit: planner cost of reading the whole above which it is neither counted nor shown.

    Returns:
        `dagster/row_count`, or `row_count_estimate` where counting would be dear; and `preview` as Markdown.
    """
    rows, cost = _estimate(connection, name)
    if cost > cost_limit:
        return {
            "row_count_estimate": int(rows),
            "preview": dg.MetadataValue.md(
                f"Not counted: the planner expects a cost of {cost:,.0f}, above {cost_limit:,.0f}."
            ),
        }
    counted = execute(connection, f"SELECT count(*) FROM {quote(name)}").scalar_one()
    order = ", ".join(f"{quote(column)} DESC NULLS LAST" for column in newest_by)
    sample = execute(
        connection,
        f"SELECT {', '.join(quote(column) for column in columns)} FROM {quote(name)} "
        + (f"ORDER BY {order} " if order else "")
        + f"LIMIT {PREVIEW_ROWS}",
    )
    return {
        "dagster/row_count": int(counted),
        "preview": dg.MetadataValue.md(markdown_table([dict(row) for row in sample.mappings()], columns)),
    }


def _estimate(connection: sa.Connection, name: str) -> tuple[float, float]:
    """Give the planner's (rows, cost) for reading the whole of a table or view."""
    plan = execute(connection, f"EXPLAIN (FORMAT JSON) SELECT * FROM {quote(name)}").scalar_one()
    top = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return float(top["Plan Rows"]), float(top["Total Cost"])


def table_metadata(name: str) -> dict[str, Any]:
    """Say what a declared table is for the Dagster UI: its columns with types and meanings, and its name.

    Raises:
        KeyError: `database/tables.py` declares no such table, or nothing says what a column of it means.
    """
    table = tables.metadata.tables[name]
    words = column_words(table)
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return {
        "dagster/table_name": f"public.{name}",
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn(
                    name=column.name,
                    type=column.type.compile(dialect).lower(),
                    # The page renders this as Markdown, which would swallow <action>.
                    description=words[column.name].replace("<", "‹").replace(">", "›"),
                    constraints=dg.TableColumnConstraints(nullable=bool(column.nullable), unique=bool(column.unique)),
                )
                for column in table.columns
            ]
        ),
    }
