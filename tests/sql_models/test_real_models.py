"""The models that are shipped, each on a real PostgreSQL."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa
from model_folder import bring_in_line

from flywheel_pipeline.sql_models.cells import cell_query
from flywheel_pipeline.sql_models.loader import load_models
from flywheel_pipeline.sql_models.relations import execute, primary_key, read_relations, type_oids, verify_columns
from flywheel_pipeline.sql_models.sync import stale_models

GRAPH = load_models()
CELLS = [model.name for model in GRAPH if model.cell]


@pytest.mark.parametrize("name", list(GRAPH.models))
def test_postgresql_plans_the_select_and_gives_the_declared_columns(name: str, engine: sa.Engine) -> None:
    model = GRAPH.models[name]
    with engine.connect() as connection:
        plan = execute(connection, f"EXPLAIN (FORMAT JSON)\n{model.sql}").scalar_one()
        assert plan[0]["Plan"]["Plan Rows"] >= 0
        verify_columns(connection, model)
        relation = read_relations(connection, [name])[name]
        oids = type_oids(connection, [declared for declared, _ in model.columns.values()])
    assert [(column, oid) for column, oid, _ in relation.columns] == [
        (column, oids[declared]) for column, (declared, _) in model.columns.items()
    ]
    assert relation.column_comments == {column: said for column, (_, said) in model.columns.items()}
    if model.materialized == "view":
        assert relation.kind == "v"
    else:
        assert relation.kind == "r"
        assert list(relation.key) == primary_key(model)


@pytest.mark.parametrize("name", CELLS)
def test_postgresql_plans_the_query_of_a_scope(name: str, engine: sa.Engine) -> None:
    with engine.connect() as connection:
        for table in ("scope_input", "scope_days", "scope_months", "scope_sites"):
            execute(connection, f"CREATE TEMP TABLE {table} (site_id text, day date, month date)")
        assert execute(connection, f"EXPLAIN {cell_query(GRAPH, GRAPH.models[name])}").all()


@pytest.mark.parametrize("name", list(GRAPH.models))
def test_the_lineage_of_every_column_leads_to_real_columns(name: str) -> None:
    model = GRAPH.models[name]
    assert list(model.column_lineage) == list(model.columns)
    for sources in model.column_lineage.values():
        for relation, column in sources:
            assert relation in model.dependencies
            if relation in GRAPH.models:
                assert column in GRAPH.models[relation].columns
    assert any(model.column_lineage.values())


def test_an_upgraded_database_is_in_step_with_the_models(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert stale_models(connection, GRAPH) == []
        assert bring_in_line(connection, GRAPH) == []


def test_loading_all_models_is_fast_enough_for_every_run() -> None:
    load_models()
    begun = time.process_time()
    graph = load_models()
    for model in graph:
        assert model.column_lineage
    spent = time.process_time() - begun
    assert spent <= 0.05 * len(graph.models), f"{spent:.2f} s for {len(graph.models)} models"
