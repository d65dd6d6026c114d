"""Models as assets: what the Dagster UI shows of them."""

from __future__ import annotations

import dagster as dg
import pytest
import sqlalchemy as sa
from model_folder import ModelFolder, bring_in_line, telemetry_row

from flywheel_pipeline.sql_models.assets import asset_spec, materialization_metadata
from flywheel_pipeline.sql_models.cells import CellCounts
from flywheel_pipeline.sql_models.loader import load_models

DAY = {"site_id": "text", "day": "date", "n": "bigint"}
DAY_SQL = (
    "SELECT t.site_id::text AS site_id, (t.event_at AT TIME ZONE 'UTC')::date AS day, count(*) AS n\n"
    "FROM execution_telemetry AS t GROUP BY 1, 2"
)


@pytest.fixture
def daily(folder: ModelFolder) -> ModelFolder:
    folder.write(
        "daily",
        DAY_SQL,
        DAY,
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
        description="What happened. On one day.",
        extra="tags: {tier: gold}",
    )
    folder.write("busy", "SELECT site_id, day, n FROM daily WHERE n > 1", DAY, key=["site_id", "day"])
    return folder


def test_a_spec_carries_all_that_the_header_says(daily: ModelFolder) -> None:
    graph = daily.load()
    model = graph.models["daily"]
    spec = asset_spec(model, graph)
    assert spec.key == dg.AssetKey(["daily"])
    assert spec.group_name == "aggregates"
    assert [dep.asset_key for dep in spec.deps] == [dg.AssetKey(["execution_telemetry"])]
    assert spec.owners == ["team:tests"]
    assert spec.kinds == {"postgres", "sql", "cell"}
    assert spec.code_version == model.content_hash[:12]
    assert spec.tags["tier"] == "gold"
    assert spec.description == "What happened. On one day.\n\nGrain: one row per test.\n\nConsumers: tests."


def test_a_spec_shows_columns_lineage_sql_and_file(daily: ModelFolder) -> None:
    graph = daily.load()
    metadata = asset_spec(graph.models["daily"], graph).metadata
    schema = metadata["dagster/column_schema"]
    assert [(c.name, c.type, c.description, c.constraints.nullable) for c in schema.columns] == [
        ("site_id", "text", "the site_id", False),
        ("day", "date", "the day", False),
        ("n", "bigint", "the n", True),
    ]
    lineage = metadata["dagster/column_lineage"].deps_by_column
    assert lineage["day"] == [dg.TableColumnDep(dg.AssetKey(["execution_telemetry"]), "event_at")]
    assert lineage["n"] == []
    (reference,) = metadata["dagster/code_references"].code_references
    assert isinstance(reference, dg.LocalFileCodeReference)
    assert reference.file_path == str(daily.root / "aggregates" / "daily.sql")
    assert reference.label == "models/aggregates/daily.sql"
    assert DAY_SQL in metadata["sql"].value


def test_a_comment_keeps_the_code_version_and_a_change_does_not(daily: ModelFolder) -> None:
    def version(sql: str) -> str | None:
        daily.write("busy", sql, DAY, key=["site_id", "day"])
        graph = daily.load()
        return asset_spec(graph.models["busy"], graph).code_version

    original = version("SELECT site_id, day, n FROM daily WHERE n > 1")
    assert version("SELECT site_id, day, n -- busy\nFROM daily WHERE n > 1") == original
    assert version("SELECT site_id, day, n FROM daily WHERE n > 2") != original


def test_tables_that_assets_write_are_named_by_the_caller(daily: ModelFolder) -> None:
    graph = daily.load()
    model = graph.models["daily"]
    intake = dg.AssetKey(["telemetry", "log"])
    spec = asset_spec(model, graph, source_keys={"execution_telemetry": intake})
    assert [dep.asset_key for dep in spec.deps] == [intake]
    assert spec.metadata["dagster/column_lineage"].deps_by_column["day"][0].asset_key == intake
    hidden = asset_spec(model, graph, source_keys={"execution_telemetry": None})
    assert list(hidden.deps) == []
    assert hidden.metadata["dagster/column_lineage"].deps_by_column["day"] == []


def test_a_materialization_counts_and_shows_rows(bare_engine: sa.Engine, daily: ModelFolder) -> None:
    graph = daily.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        connection.exec_driver_sql("INSERT INTO daily SELECT 's' || i, '2026-02-01', i FROM generate_series(1, 7) i")
        metadata = materialization_metadata(connection, graph.models["daily"], CellCounts(1, 2, 3, 4))
        busy = materialization_metadata(connection, graph.models["busy"])
    assert metadata["dagster/row_count"] == 7
    assert [metadata[f"rows_{what}"] for what in ("inserted", "updated", "deleted", "unchanged")] == [1, 2, 3, 4]
    assert metadata["preview"].value.count("\n") == 6, "a head, a rule and five rows"
    assert "| s1 | 2026-02-01 | 1 |" in metadata["preview"].value
    assert busy["dagster/row_count"] == 6
    assert "rows_inserted" not in busy
    dg.MaterializeResult(asset_key="daily", metadata=metadata)


def test_a_relation_too_dear_to_count_shows_the_estimate_under_another_name(
    bare_engine: sa.Engine, daily: ModelFolder
) -> None:
    graph = daily.load()
    with bare_engine.begin() as connection:
        bring_in_line(connection, graph)
        telemetry_row(connection, "e1", "a", "2026-02-01 10:00")
        metadata = materialization_metadata(connection, graph.models["busy"], cost_limit=0.0)
    assert "dagster/row_count" not in metadata
    assert isinstance(metadata["row_count_estimate"], int)
    assert metadata["preview"].value.startswith("Not counted")


def test_every_shipped_model_becomes_an_asset_and_the_graph_holds_together() -> None:
    graph = load_models()
    specs = [asset_spec(model, graph) for model in graph]
    definitions = dg.Definitions(assets=[dg.AssetSpec(name) for name in sorted(graph.source_tables)] + specs)
    dg.Definitions.validate_loadable(definitions)
    assert {spec.key.to_user_string() for spec in specs} == set(graph.models)
    assert all(spec.group_name and spec.owners and spec.description for spec in specs)
