"""`db check` names every difference, and nothing that is other people's."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from flywheel_pipeline.database import declared, migrate
from flywheel_pipeline.database.migrate import Difference


def after(engine: sa.Engine, *statements: str) -> list[Difference]:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    return migrate.check(engine)


def test_an_upgraded_database_has_no_difference_and_the_check_leaves_no_trace(engine: sa.Engine) -> None:
    before = sa.inspect(engine).get_schema_names()
    assert migrate.check(engine) == []
    assert sa.inspect(engine).get_schema_names() == before


def test_a_missing_column_is_named_with_what_it_should_be(engine: sa.Engine) -> None:
    assert after(engine, "ALTER TABLE execution_telemetry DROP COLUMN input_tokens") == [
        Difference("column execution_telemetry.input_tokens", "missing", "integer NULL", "")
    ]


def test_a_wrong_index_is_named_with_both_definitions(engine: sa.Engine) -> None:
    found = after(
        engine,
        "DROP INDEX execution_telemetry_site_event_idx",
        "CREATE INDEX execution_telemetry_site_event_idx ON execution_telemetry (event_at)",
    )
    created = "CREATE INDEX execution_telemetry_site_event_idx ON execution_telemetry USING btree"
    assert found == [
        Difference(
            "index execution_telemetry_site_event_idx on execution_telemetry",
            "another definition",
            f"{created} (site_id, event_at)",
            f"{created} (event_at)",
        )
    ]


def test_a_success_rate_that_is_not_generated_is_named(engine: sa.Engine) -> None:
    (found,) = after(
        engine,
        "ALTER TABLE l1_rules ALTER COLUMN success_rate DROP EXPRESSION",
    )
    assert (found.object, found.problem, found.found) == ("column l1_rules.success_rate", "not generated", "")
    assert found.expected.startswith("GENERATED ALWAYS AS ( CASE WHEN (match_count > 0)")


def test_a_success_rate_in_percent_is_named(engine: sa.Engine) -> None:
    (found,) = after(
        engine,
        "ALTER TABLE l1_rules DROP COLUMN success_rate",
        "ALTER TABLE l1_rules ADD COLUMN success_rate double precision "
        "GENERATED ALWAYS AS (success_count * 100.0 / nullif(match_count, 0)) STORED",
    )
    assert (found.object, found.problem) == ("column l1_rules.success_rate", "another generation")


@pytest.mark.parametrize(
    ("statement", "subject", "problem"),
    [
        (
            "DROP TRIGGER flywheel_touch_inserted ON execution_telemetry",
            "trigger flywheel_touch_inserted",
            "missing",
        ),
        (
            "ALTER TABLE execution_telemetry DISABLE TRIGGER flywheel_touch_updated",
            "trigger flywheel_touch_updated",
            "another state",
        ),
        (
            "CREATE OR REPLACE FUNCTION flywheel_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN RETURN NEW; END'",
            "function flywheel_append_only()",
            "another body",
        ),
        ("DROP FUNCTION flywheel_touch_rule(rule_aliases)", "function flywheel_touch_rule", "missing"),
        ("ALTER TABLE sites ALTER COLUMN status TYPE text", "column sites.status", "another type"),
        ("ALTER TABLE sites ALTER COLUMN status DROP NOT NULL", "column sites.status", "another nullability"),
        (
            "ALTER TABLE sites ALTER COLUMN status SET DEFAULT 'asleep'",
            "column sites.status",
            "another default",
        ),
        ("ALTER TABLE sites ALTER COLUMN id DROP IDENTITY", "column sites.id", "another identity"),
        ("ALTER TABLE sites ADD COLUMN owner text", "column sites.owner", "not declared"),
        (
            "ALTER TABLE sites DROP CONSTRAINT sites_site_id_key",
            "constraint sites_site_id_key on sites",
            "missing",
        ),
        (
            "ALTER TABLE patterns DROP CONSTRAINT patterns_status_check",
            "constraint patterns_status_check",
            "missing",
        ),
        ("CREATE INDEX ON sites (name)", "index sites_name_idx on sites", "not declared"),
        ("DROP TABLE appliance_manifests CASCADE", "table appliance_manifests", "missing"),
    ],
)
def test_every_kind_of_difference_is_named(engine: sa.Engine, statement: str, subject: str, problem: str) -> None:
    found = after(engine, statement)
    assert any(d.object.startswith(subject) and d.problem == problem for d in found), found


def test_a_counter_trigger_of_the_old_system_on_our_table_is_named(engine: sa.Engine) -> None:
    found = after(
        engine,
        "CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER update_l1_counts AFTER INSERT ON execution_telemetry FOR EACH ROW EXECUTE FUNCTION count_it()",
    )
    assert [(d.object, d.problem) for d in found] == [
        ("trigger update_l1_counts on execution_telemetry", "not declared")
    ]


def test_other_systems_with_keys_and_views_on_ours_are_left_out(engine: sa.Engine) -> None:
    assert (
        after(
            engine,
            "CREATE TABLE tickets (id serial PRIMARY KEY, rule text REFERENCES l1_rules (rule_id))",
            "CREATE VIEW loud_rules AS SELECT rule_id FROM l1_rules WHERE match_count > 1000",
            "CREATE FUNCTION theirs() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        )
        == []
    )


def test_an_empty_database_misses_every_table_and_the_migrations(empty_engine: sa.Engine) -> None:
    found = migrate.check(empty_engine)
    assert found[0] == Difference("migrations", "not at the newest revision", declared.head_revision(), "none")
    missing = {d.object for d in found if d.problem == "missing"}
    assert {"table execution_telemetry", "table l1_rules", "table rule_events"} <= missing
    assert not any(name.startswith(("column", "index", "constraint", "trigger")) for name in missing)


def test_a_missing_model_is_named_and_so_is_every_reader_that_went_with_it(engine: sa.Engine) -> None:
    before = set(sa.inspect(engine).get_view_names())
    found = after(engine, "DROP VIEW executions CASCADE")
    gone = before - set(sa.inspect(engine).get_view_names())
    assert "executions" in gone
    assert {d.object for d in found if d.problem == "missing"} == {f"view {name}" for name in gone}


def test_a_stale_model_is_named(engine: sa.Engine) -> None:
    found = after(
        engine,
        "DROP VIEW unresolved_rule_ids CASCADE",
        "CREATE VIEW unresolved_rule_ids AS SELECT ''::text AS rule_id",
        "ALTER TABLE episodes ADD COLUMN mine integer",
    )
    problems = {(d.object, d.problem) for d in found}
    assert ("view unresolved_rule_ids", "another definition") in problems
    assert ("column episodes.mine", "not declared") in problems
