"""Relations follow the models: created, left alone, replaced with their readers, dropped, swapped."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from model_folder import ModelFolder, bring_in_line, telemetry_row

from flywheel_pipeline.errors import ModelError
from flywheel_pipeline.sql_models.relations import read_relations
from flywheel_pipeline.sql_models.sync import create_table_swap, stale_models

RULE = {"rule_id": "text", "enabled": "boolean"}
RULES_SQL = "SELECT r.rule_id::text AS rule_id, r.enabled FROM l1_rules AS r"
DAY = {"site_id": "text", "day": "date", "n": "bigint"}
DAY_SQL = (
    "SELECT site_id::text AS site_id, (event_at AT TIME ZONE 'UTC')::date AS day, count(*) AS n\n"
    "FROM execution_telemetry WHERE {where} GROUP BY 1, 2"
)


def sync(engine: sa.Engine, folder: ModelFolder) -> list[str]:
    with engine.begin() as connection:
        return bring_in_line(connection, folder.load())


def kinds(engine: sa.Engine, *names: str) -> dict[str, str]:
    with engine.connect() as connection:
        return {name: relation.kind for name, relation in read_relations(connection, names).items()}


def oid(engine: sa.Engine, name: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.text("SELECT CAST(:n AS regclass)::oid::bigint"), {"n": name}).scalar_one())


def rows(engine: sa.Engine, query: str) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


@pytest.fixture
def three_kinds(folder: ModelFolder) -> ModelFolder:
    """A view, a cell model, a table over it, and a view on the table."""
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    folder.write("daily", DAY_SQL.format(where="true"), DAY, key=["site_id", "day"], materialized="cell", cell="day")
    folder.write(
        "busy",
        "SELECT site_id, day, n FROM daily WHERE n > 1",
        DAY,
        key=["day", "site_id"],
        materialized="table",
    )
    folder.write("busiest", "SELECT site_id, day, n FROM busy ORDER BY n DESC LIMIT 1", DAY, key=["site_id"])
    return folder


def test_each_model_becomes_the_relation_that_it_asks_for(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    assert sync(bare_engine, three_kinds) == [
        "created cell daily",
        "created view rules",
        "created table busy",
        "created view busiest",
    ]
    assert kinds(bare_engine, "rules", "daily", "busy", "busiest") == {
        "rules": "v",
        "daily": "r",
        "busy": "r",
        "busiest": "v",
    }
    with bare_engine.connect() as connection:
        daily = read_relations(connection, ["daily"])["daily"]
    assert daily.key == ("site_id", "day")
    assert [(name, printed) for name, _, printed in daily.columns] == [
        ("site_id", "text"),
        ("day", "date"),
        ("n", "bigint"),
    ]
    assert daily.comment == "A model of a test. Grain: one row per test."
    assert daily.column_comments == {"site_id": "the site_id", "day": "the day", "n": "the n"}
    assert rows(
        bare_engine,
        "SELECT attname FROM pg_attribute "
        "WHERE attrelid = 'daily'::regclass AND attnotnull AND attnum > 0 ORDER BY attnum",
    ) == [("site_id",), ("day",)]


def test_a_second_sync_changes_nothing(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    sync(bare_engine, three_kinds)
    before = [oid(bare_engine, name) for name in ("rules", "daily", "busy", "busiest")]
    assert sync(bare_engine, three_kinds) == []
    assert [oid(bare_engine, name) for name in ("rules", "daily", "busy", "busiest")] == before


def test_a_comment_in_the_sql_rebuilds_nothing_and_a_new_description_only_describes(
    bare_engine: sa.Engine, folder: ModelFolder
) -> None:
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    sync(bare_engine, folder)
    before = oid(bare_engine, "rules")
    folder.write("rules", "-- every rule\n" + RULES_SQL, RULE, key=["rule_id"])
    assert sync(bare_engine, folder) == []
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"], description="It's 100 % of the rules, all of them.")
    assert sync(bare_engine, folder) == ["described view rules"]
    assert sync(bare_engine, folder) == []
    assert oid(bare_engine, "rules") == before
    assert rows(bare_engine, "SELECT obj_description('rules'::regclass)") == [
        ("It's 100 % of the rules, all of them. Grain: one row per test.",)
    ]


def test_a_changed_view_is_created_anew_with_all_that_read_it(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write("base", RULES_SQL, RULE, key=["rule_id"])
    folder.write("middle", "SELECT rule_id, enabled FROM base", RULE, key=["rule_id"])
    folder.write("top", "SELECT rule_id, enabled FROM middle", RULE, key=["rule_id"])
    folder.write("other", RULES_SQL, RULE, key=["rule_id"])
    sync(bare_engine, folder)
    other = oid(bare_engine, "other")
    wider = {**RULE, "state": "text"}
    folder.write("base", RULES_SQL.replace(" FROM", ", r.state::text AS state FROM"), wider, key=["rule_id"])
    assert sync(bare_engine, folder) == [
        "replaced view base",
        "created view middle again, since a model that it reads changed",
        "created view top again, since a model that it reads changed",
    ]
    assert oid(bare_engine, "other") == other
    assert rows(bare_engine, "SELECT state FROM base") == []
    assert sync(bare_engine, folder) == []


def test_views_that_swap_who_reads_whom_are_replaced(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write("one", RULES_SQL, RULE, key=["rule_id"])
    folder.write("two", "SELECT rule_id, enabled FROM one", RULE, key=["rule_id"])
    sync(bare_engine, folder)
    folder.write("two", RULES_SQL, RULE, key=["rule_id"])
    folder.write("one", "SELECT rule_id, enabled FROM two", RULE, key=["rule_id"])
    assert sync(bare_engine, folder) == ["replaced view two", "replaced view one"]


def test_models_that_are_gone_are_dropped_with_their_record(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    sync(bare_engine, three_kinds)
    for name in ("busiest", "busy", "daily"):
        three_kinds.remove(name)
    assert set(sync(bare_engine, three_kinds)) == {
        "dropped busiest, which is no model any more",
        "dropped busy, which is no model any more",
        "dropped daily, which is no model any more",
    }
    assert kinds(bare_engine, "rules", "daily", "busy", "busiest") == {"rules": "v"}
    assert rows(bare_engine, "SELECT name FROM schema_objects WHERE kind = 'model'") == [("rules",)]
    assert sync(bare_engine, three_kinds) == []


def test_a_model_may_change_its_kind(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    sync(bare_engine, three_kinds)
    three_kinds.write("busy", "SELECT site_id, day, n FROM daily WHERE n > 1", DAY, key=["day", "site_id"])
    assert sync(bare_engine, three_kinds) == [
        "replaced view busy",
        "created view busiest again, since a model that it reads changed",
    ]
    assert kinds(bare_engine, "busy") == {"busy": "v"}
    three_kinds.write(
        "busy",
        "SELECT site_id, day, n FROM daily WHERE n > 1",
        DAY,
        key=["day", "site_id"],
        materialized="table",
    )
    sync(bare_engine, three_kinds)
    assert kinds(bare_engine, "busy", "busiest") == {"busy": "r", "busiest": "v"}


def test_a_changed_cell_model_keeps_its_rows_until_the_refresh_and_touches_every_cell(
    bare_engine: sa.Engine, three_kinds: ModelFolder
) -> None:
    sync(bare_engine, three_kinds)
    with bare_engine.begin() as connection:
        telemetry_row(connection, "e1", "clinic-a", "2026-02-01 10:00")
        telemetry_row(connection, "e2", "clinic-b", "2026-02-02 10:00")
        connection.exec_driver_sql("INSERT INTO daily VALUES ('clinic-a', '2026-02-01', 1)")
        connection.exec_driver_sql("DELETE FROM touched_cells")
    before = oid(bare_engine, "daily")
    three_kinds.write(
        "daily", DAY_SQL.format(where="success"), DAY, key=["site_id", "day"], materialized="cell", cell="day"
    )
    assert sync(bare_engine, three_kinds) == [
        "changed cell daily",
        "touched all 2 cells, to be recomputed by the next refresh",
    ]
    assert oid(bare_engine, "daily") == before
    assert rows(bare_engine, "SELECT site_id, n FROM daily") == [("clinic-a", 1)]
    assert rows(bare_engine, "SELECT site_id, day::text FROM touched_cells ORDER BY 1") == [
        ("clinic-a", "2026-02-01"),
        ("clinic-b", "2026-02-02"),
    ]
    assert sync(bare_engine, three_kinds) == []


def test_a_changed_view_under_a_cell_model_touches_every_cell(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write("events", DAY_SQL.format(where="true"), DAY, key=["site_id", "day"])
    folder.write(
        "daily",
        "SELECT site_id, day, n FROM events",
        DAY,
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    sync(bare_engine, folder)
    with bare_engine.begin() as connection:
        telemetry_row(connection, "e1", "clinic-a", "2026-02-01 10:00")
        connection.exec_driver_sql("DELETE FROM touched_cells")
    folder.write("events", DAY_SQL.format(where="success"), DAY, key=["site_id", "day"])
    assert sync(bare_engine, folder) == [
        "replaced view events",
        "touched all 1 cells, to be recomputed by the next refresh",
    ]
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    assert sync(bare_engine, folder) == ["created view rules"], "no cell reads it, so nothing is touched"


def test_a_cell_model_with_other_columns_gets_a_new_table_and_its_readers_follow(
    bare_engine: sa.Engine, three_kinds: ModelFolder
) -> None:
    three_kinds.write("seen", "SELECT site_id, day, n FROM daily", DAY, key=["site_id", "day"])
    sync(bare_engine, three_kinds)
    wider = {**DAY, "failures": "bigint"}
    sql = DAY_SQL.format(where="true").replace("AS n", "AS n, count(*) FILTER (WHERE NOT success) AS failures")
    three_kinds.write("daily", sql, wider, key=["site_id", "day"], materialized="cell", cell="day")
    assert sync(bare_engine, three_kinds) == [
        "replaced cell daily",
        "created view seen again, since a model that it reads changed",
    ]
    assert rows(bare_engine, "SELECT failures FROM daily") == []


# ------------------------------------------------------------------------------------------------- refusals


def refusal(engine: sa.Engine, folder: ModelFolder) -> ModelError:
    with pytest.raises(ModelError) as caught:
        sync(engine, folder)
    return caught.value


@pytest.mark.parametrize("materialized", ["view", "table"])
def test_a_column_of_another_type_than_declared_is_refused(
    materialized: str, bare_engine: sa.Engine, folder: ModelFolder
) -> None:
    sql = "SELECT r.rule_id, r.match_count AS enabled FROM l1_rules AS r"
    folder.write("rules", sql, RULE, key=["rule_id"], materialized=materialized)
    message = refusal(bare_engine, folder).message
    assert "rule_id is declared as text and is character varying(255)" in message
    assert "enabled is declared as boolean and is bigint" in message
    assert kinds(bare_engine, "rules") == {}


def test_a_declared_precision_must_be_the_real_one(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    columns = {"execution_id": "varchar(255)", "cost_usd": "numeric(12, 6)"}
    sql = "SELECT execution_id, cost_usd FROM execution_telemetry"
    folder.write("costs", sql, columns, key=["execution_id"])
    sync(bare_engine, folder)
    folder.write("costs", sql, {**columns, "cost_usd": "numeric(10, 2)"}, key=["execution_id"])
    assert "cost_usd is declared as numeric(10, 2) and is numeric(12,6)" in refusal(bare_engine, folder).message


def test_a_type_that_postgresql_does_not_know_is_refused(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write("rules", RULES_SQL, {**RULE, "enabled": "bool_ean"}, key=["rule_id"])
    assert "bool_ean, which is no type of PostgreSQL" in refusal(bare_engine, folder).message


def test_what_postgresql_refuses_is_told_with_the_line_of_the_file(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    path = folder.write(
        "rules",
        "SELECT r.rule_id::text AS rule_id,\n  r.enabld AS enabled\nFROM l1_rules AS r",
        RULE,
        key=["rule_id"],
    )
    line = path.read_text().splitlines().index("  r.enabld AS enabled") + 1
    error = refusal(bare_engine, folder)
    assert error.message.startswith(f"models/aggregates/rules.sql:{line}: PostgreSQL refuses the SELECT")
    assert "enabld" in error.message


def test_a_relation_that_is_not_ours_is_neither_replaced_nor_dropped(
    bare_engine: sa.Engine, folder: ModelFolder
) -> None:
    with bare_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE rules (theirs int)")
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    assert "which Flywheel did not make" in refusal(bare_engine, folder).message
    assert kinds(bare_engine, "rules") == {"rules": "r"}


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_view_of_others_on_a_model_stops_its_replacement(
    kind: str, bare_engine: sa.Engine, folder: ModelFolder
) -> None:
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    sync(bare_engine, folder)
    with bare_engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA reports")
        connection.exec_driver_sql(f"CREATE {kind} reports.board AS SELECT rule_id FROM rules")
    folder.write("rules", RULES_SQL + " WHERE r.enabled", RULE, key=["rule_id"])
    error = refusal(bare_engine, folder)
    assert "reports.board, which Flywheel did not make, reads rules" in error.message
    assert rows(bare_engine, "SELECT * FROM reports.board") == []


def test_a_failed_sync_leaves_the_database_as_it_was(bare_engine: sa.Engine, folder: ModelFolder) -> None:
    folder.write("base", RULES_SQL, RULE, key=["rule_id"])
    folder.write("top", "SELECT rule_id, enabled FROM base", RULE, key=["rule_id"])
    sync(bare_engine, folder)
    folder.write("base", RULES_SQL + " WHERE r.enabled", RULE, key=["rule_id"])
    folder.write("top", "SELECT rule_id, enabled FROM base WHERE nothing_there", RULE, key=["rule_id"])
    refusal(bare_engine, folder)
    assert kinds(bare_engine, "base", "top") == {"base": "v", "top": "v"}
    with bare_engine.connect() as connection:
        assert stale_models(connection, folder.load()) == ["base", "top"]


def test_stale_models_names_what_sync_would_change(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    with bare_engine.connect() as connection:
        assert stale_models(connection, three_kinds.load()) == ["busiest", "busy", "daily", "rules"]
    sync(bare_engine, three_kinds)
    three_kinds.remove("busiest")
    three_kinds.write(
        "daily", DAY_SQL.format(where="success"), DAY, key=["site_id", "day"], materialized="cell", cell="day"
    )
    with bare_engine.connect() as connection:
        assert stale_models(connection, three_kinds.load()) == ["busiest", "daily"]


# ------------------------------------------------------------------------------------------------- tables


def test_a_swapped_table_has_the_new_rows_the_same_key_and_the_same_views(
    bare_engine: sa.Engine, three_kinds: ModelFolder
) -> None:
    graph = three_kinds.load()
    sync(bare_engine, three_kinds)
    with bare_engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO daily VALUES ('clinic-a', '2026-02-01', 5), ('clinic-a', '2026-02-02', 1), "
            "('clinic-b', '2026-02-01', 9)"
        )
    with bare_engine.begin() as connection:
        assert create_table_swap(connection, graph.models["busy"], graph) == 2
    assert rows(bare_engine, "SELECT site_id, n FROM busy ORDER BY n") == [("clinic-a", 5), ("clinic-b", 9)]
    assert rows(bare_engine, "SELECT site_id, n FROM busiest") == [("clinic-b", 9)]
    with bare_engine.connect() as connection:
        assert read_relations(connection, ["busy"])["busy"].key == ("day", "site_id")
        assert read_relations(connection, ["busy__new"]) == {}
    assert rows(
        bare_engine, "SELECT conname FROM pg_constraint WHERE conrelid = 'busy'::regclass AND contype = 'p'"
    ) == [("busy_pkey",)]
    assert sync(bare_engine, three_kinds) == []


def test_a_reader_beside_a_swap_sees_all_old_rows_or_all_new_rows(
    bare_engine: sa.Engine, three_kinds: ModelFolder
) -> None:
    graph = three_kinds.load()
    sync(bare_engine, three_kinds)
    stop = threading.Event()
    seen: set[int] = set()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                seen.add(int(str(rows(bare_engine, "SELECT count(*) FROM busy")[0][0])))
        except sa.exc.DBAPIError as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for size in (10, 20, 30, 40, 50):
            with bare_engine.begin() as connection:
                connection.exec_driver_sql("DELETE FROM daily")
                connection.exec_driver_sql(
                    "INSERT INTO daily SELECT 'clinic-' || i, '2026-02-01', 2 FROM generate_series(1, %s) i",
                    (size,),
                )
                create_table_swap(connection, graph.models["busy"], graph)
    finally:
        stop.set()
        reader.join()
    assert failures == []
    assert seen <= {0, 10, 20, 30, 40, 50}
    assert rows(bare_engine, "SELECT count(*) FROM busy") == [(50,)]


def test_a_table_with_two_rows_of_one_key_is_refused_and_the_old_one_stays(
    bare_engine: sa.Engine, three_kinds: ModelFolder
) -> None:
    sync(bare_engine, three_kinds)
    sql = "SELECT site_id, date '2026-01-01' AS day, n FROM daily"
    three_kinds.write("busy", sql, DAY, key=["day"], materialized="table")
    with bare_engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO daily VALUES ('a', '2026-02-01', 5), ('b', '2026-02-01', 9)")
    assert "do not fit the key (day)" in refusal(bare_engine, three_kinds).message
    assert rows(bare_engine, "SELECT count(*) FROM busy") == [(0,)]


def test_a_swap_that_is_rolled_back_leaves_the_old_table(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    graph = three_kinds.load()
    sync(bare_engine, three_kinds)
    before = oid(bare_engine, "busy")
    with bare_engine.connect() as connection:
        connection.exec_driver_sql("INSERT INTO daily VALUES ('a', '2026-02-01', 5)")
        assert create_table_swap(connection, graph.models["busy"], graph) == 1
        connection.rollback()
    assert oid(bare_engine, "busy") == before
    assert rows(bare_engine, "SELECT * FROM busiest") == []


def test_only_a_table_is_swapped(bare_engine: sa.Engine, three_kinds: ModelFolder) -> None:
    graph = three_kinds.load()
    sync(bare_engine, three_kinds)
    with bare_engine.begin() as connection, pytest.raises(ModelError, match="only a table is swapped"):
        create_table_swap(connection, graph.models["daily"], graph)
