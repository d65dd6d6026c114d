"""Upgrades: on nothing, on something, twice, at once, and half-way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from flywheel_pipeline.database import declared, migrate, seed
from flywheel_pipeline.database.current import require_current
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch

ROW = """
    INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, started_at)
    SELECT 'exec-' || n, 'clinic-a', 'L1-FIREWALL-001', 'ws01', n % 3 > 0, '2026-02-15 08:00+00'
    FROM generate_series(1, 100) n
"""


def column(connection: sa.Connection, statement: str) -> list[object]:
    return list(connection.execute(sa.text(statement)).scalars())


def test_an_empty_database_gets_everything_and_the_second_upgrade_changes_nothing(
    empty_engine: sa.Engine,
) -> None:
    told: list[str] = []
    report = migrate.upgrade(empty_engine, progress=told.append)
    assert report.changes == tuple(told)
    assert report.changes[:2] == ("schema dagster", "migration 0001: The schema of the first release")
    assert "routine 20_touched_cells" in report.changes
    assert migrate.upgrade(empty_engine) == migrate.UpgradeReport(changes=())
    assert migrate.check(empty_engine) == []


def test_a_populated_database_is_upgraded_twice_without_touching_a_row(empty_engine: sa.Engine) -> None:
    migrate.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(sa.text(ROW))
        before = column(connection, "SELECT t::text || xmin FROM execution_telemetry t ORDER BY id")
    for _ in range(2):
        assert migrate.upgrade(empty_engine).changes == ()
    with empty_engine.connect() as connection:
        assert column(connection, "SELECT t::text || xmin FROM execution_telemetry t ORDER BY id") == before
    assert migrate.check(empty_engine) == []


def test_the_migrations_make_exactly_the_declared_tables(empty_engine: sa.Engine) -> None:
    with empty_engine.begin() as connection:
        assert migrate._migrate(connection) != []
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": declared.VERSION_TABLE,
                "compare_type": True,
                "target_metadata": metadata,
            },
        )
        assert compare_metadata(context, metadata) == []
        # Alembic compares neither expressions, check constraints nor identities; the catalog tells them.
        facts = """
            SELECT c.relname, a.attname, a.attgenerated, a.attidentity, pg_get_expr(d.adbin, d.adrelid)
            FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
            LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
            WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind = 'r' AND a.attnum > 0
              AND NOT a.attisdropped
            ORDER BY 1, 2
        """
        checks = """
            SELECT conname, pg_get_constraintdef(oid, true) FROM pg_constraint
            WHERE connamespace = CAST(:schema AS regnamespace) AND contype <> 'n' ORDER BY 1
        """
        connection.execute(sa.text(f"DROP TABLE {declared.VERSION_TABLE}"))
        migrated = [connection.execute(sa.text(q), {"schema": "public"}).all() for q in (facts, checks)]
        connection.execute(sa.text("CREATE SCHEMA scratch"))
        connection.execute(sa.text("SET LOCAL search_path = scratch"))
        metadata.create_all(connection, checkfirst=False)
        created = [connection.execute(sa.text(q), {"schema": "scratch"}).all() for q in (facts, checks)]
        assert migrated == created


def test_two_upgrades_at_once_make_one_schema(empty_engine: sa.Engine) -> None:
    reports: list[migrate.UpgradeReport] = []
    threads = [threading.Thread(target=lambda: reports.append(migrate.upgrade(empty_engine))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One may come to what the other left between its two transactions; nothing is done twice.
    done = [change for report in reports for change in report.changes]
    assert len(reports) == 2
    assert len(done) == len(set(done)) > 0
    assert migrate.check(empty_engine) == []


def test_a_first_transaction_that_breaks_off_leaves_nothing_behind(empty_engine: sa.Engine) -> None:
    def break_off(change: str) -> None:
        if change.startswith("model"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate.upgrade(empty_engine, progress=break_off)
    assert sa.inspect(empty_engine).get_table_names() == []
    assert "dagster" not in sa.inspect(empty_engine).get_schema_names()
    assert migrate.upgrade(empty_engine).changes[0] == "schema dagster"


def test_a_second_transaction_that_breaks_off_is_noticed_and_done_by_the_next_upgrade(empty_engine: sa.Engine) -> None:
    def break_off(change: str) -> None:
        if change.startswith("seed"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate.upgrade(empty_engine, progress=break_off)
    with (
        empty_engine.connect() as connection,
        pytest.raises(SchemaMismatch, match="does not hold this release's model"),
    ):
        require_current(connection)
    assert {found.problem for found in migrate.check(empty_engine)} == {"not computed"}
    seeds = [change.split(":")[0] for change in migrate.upgrade(empty_engine).changes]
    assert seeds == ["seed runbooks", "seed outcome_class_rules", "seed builtin_rules"]
    with empty_engine.connect() as connection:
        require_current(connection)
    assert migrate.check(empty_engine) == []


def test_seeds_that_are_not_those_of_this_release_are_not_current(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        require_current(connection)
        connection.exec_driver_sql(
            "UPDATE schema_objects SET content_hash = 'older' WHERE kind = 'seed' AND name = 'runbooks'"
        )
        with pytest.raises(SchemaMismatch, match="does not hold this release's seed runbooks"):
            require_current(connection)


def test_a_database_of_a_newer_release_is_refused_in_a_sentence(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {declared.VERSION_TABLE} SET version_num = '9999'"))
    for act in (migrate.upgrade, migrate.check):
        with pytest.raises(SchemaMismatch, match="revision 9999, which is newer than this release's"):
            act(engine)


def test_tables_that_flywheel_did_not_create_are_not_taken_over(empty_engine: sa.Engine) -> None:
    with empty_engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE l1_rules (id serial PRIMARY KEY, rule_id text)"))
        connection.execute(sa.text("CREATE TABLE invoices (id serial PRIMARY KEY)"))
    with pytest.raises(SchemaMismatch, match="already holds tables that Flywheel did not create: l1_rules"):
        migrate.upgrade(empty_engine)
    assert set(sa.inspect(empty_engine).get_table_names()) == {"l1_rules", "invoices"}


def test_tables_of_other_systems_beside_ours_stay_as_they_are(empty_engine: sa.Engine) -> None:
    with empty_engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE invoices (id serial PRIMARY KEY)"))
        connection.execute(sa.text("INSERT INTO invoices DEFAULT VALUES"))
    migrate.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        assert column(connection, "SELECT id FROM invoices") == [1]
    assert migrate.check(empty_engine) == []


def test_a_changed_routine_is_applied_again_and_an_unchanged_one_is_not(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE schema_objects SET content_hash = 'older' WHERE kind = 'routine' AND name = '10_identity'")
        )
        connection.execute(
            sa.text(
                "CREATE OR REPLACE FUNCTION flywheel_class_rank(outcome_class text) RETURNS integer "
                "LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT 7'"
            )
        )
    assert migrate.upgrade(engine).changes == ("routine 10_identity",)
    with engine.connect() as connection:
        assert column(connection, "SELECT flywheel_class_rank('synthetic')") == [1]


def test_a_role_without_rights_is_refused_in_a_sentence(server: EmbeddedServer, empty_engine: sa.Engine) -> None:
    with empty_engine.begin() as connection:
        connection.execute(sa.text("CREATE ROLE guest_of_migrations"))
    guest = open_engine(empty_engine.url.update_query_dict({"options": "-crole=guest_of_migrations"}))
    try:
        with pytest.raises(DatabaseUnavailable, match="may not create the tables of Flywheel: permission denied"):
            migrate.upgrade(guest)
    finally:
        guest.dispose()
        with empty_engine.begin() as connection:
            connection.execute(sa.text("DROP ROLE guest_of_migrations"))


def test_seeds_fill_the_catalogue_the_classes_and_the_registry(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert column(connection, "SELECT count(*) FROM runbooks") == [51]
        assert column(connection, "SELECT count(*) FROM outcome_class_rules") == [
            len(seed.read_seed("outcome_class_rules"))
        ]
        builtin = {row["rule_id"] for row in seed.read_seed("builtin_rules")}
        assert set(column(connection, "SELECT rule_id FROM l1_rules WHERE source = 'builtin'")) == builtin
        assert column(connection, "SELECT DISTINCT kind FROM rule_events") == ["registered"]


def test_what_an_engineer_changed_in_a_seeded_row_stays(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE runbooks SET enabled = false WHERE runbook_id = 'RB-WIN-SEC-005'"))
        connection.execute(sa.text("DELETE FROM outcome_class_rules WHERE rule_name = 'unknown_action'"))
    assert migrate.upgrade(engine).changes == ()
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE schema_objects SET content_hash = 'older' WHERE kind = 'seed'"))
    assert migrate.upgrade(engine).changes == (
        "seed runbooks: 0 rows",
        "seed outcome_class_rules: 1 rows",
        "seed builtin_rules: 0 rows",
    )
    with engine.connect() as connection:
        assert column(connection, "SELECT enabled FROM runbooks WHERE runbook_id = 'RB-WIN-SEC-005'") == [False]


def test_every_migration_goes_forward_only() -> None:
    scripts = list(declared.scripts().walk_revisions())
    assert [script.revision for script in scripts][-1] == "0001"
    for script in scripts:
        assert "def downgrade" not in Path(script.path).read_text()


def test_a_routine_file_that_is_gone_leaves_no_record(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO schema_objects (kind, name, content_hash) VALUES ('routine', '50_sites', 'older')"
        )
    assert migrate.upgrade(engine).changes == ()
    with engine.connect() as connection:
        assert column(connection, "SELECT count(*) FROM schema_objects WHERE name = '50_sites'") == [0]
