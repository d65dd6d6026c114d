"""Reading model files: what is read from them, and every refusal with its file, line and reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from model_folder import ModelFolder

from flywheel_pipeline.errors import ModelError
from flywheel_pipeline.sql_models.loader import load_models

RULE = {"rule_id": "text", "enabled": "boolean"}
RULES_SQL = "SELECT r.rule_id::text AS rule_id, r.enabled FROM l1_rules AS r"


def refusal(folder: ModelFolder) -> ModelError:
    with pytest.raises(ModelError) as caught:
        folder.load()
    return caught.value


def test_a_model_says_what_its_header_and_its_select_say(folder: ModelFolder) -> None:
    path = folder.write("rules", RULES_SQL + ";", RULE, key=["rule_id"], room="promotion", extra="tags: {tier: gold}")
    model = folder.load().models["rules"]
    assert (model.name, model.room, model.materialized, model.cell) == ("rules", "promotion", "view", None)
    assert model.columns == {"rule_id": ("text", "the rule_id"), "enabled": ("boolean", "the enabled")}
    assert model.key == ("rule_id",)
    assert model.sql == RULES_SQL, "the trailing semicolon is no part of the SELECT"
    assert model.dependencies == {"l1_rules"}
    assert model.tags == {"tier": "gold"}
    assert model.path == path
    assert model.file == "models/promotion/rules.sql"
    assert path.read_text().splitlines()[model.first_line - 1] == RULES_SQL + ";"


def test_models_come_after_the_models_they_read(folder: ModelFolder) -> None:
    folder.write("a_last", "SELECT rule_id, enabled FROM m_middle", RULE, key=["rule_id"])
    folder.write("m_middle", "SELECT rule_id, enabled FROM z_first", RULE, key=["rule_id"])
    folder.write("z_first", RULES_SQL, RULE, key=["rule_id"])
    graph = folder.load()
    assert list(graph.models) == ["z_first", "m_middle", "a_last"]
    assert graph.source_tables == {"l1_rules"}
    assert [m.name for m in graph.dependants("z_first")] == ["m_middle", "a_last"]
    assert [m.name for m in graph.dependants("l1_rules")] == ["z_first", "m_middle", "a_last"]


def test_dependencies_are_found_in_ctes_subqueries_laterals_and_unions(
    folder: ModelFolder,
) -> None:
    folder.write("base", RULES_SQL, RULE, key=["rule_id"])
    folder.write(
        "reader",
        """
        WITH RECURSIVE chain AS (
          SELECT p.promoted_to_rule_id AS rule_id FROM patterns AS p
          UNION
          SELECT c.rule_id FROM chain AS c
        )
        SELECT
          c.rule_id::text AS rule_id,
          EXISTS (SELECT 1 FROM runbooks AS k WHERE k.runbook_id = c.rule_id) AS enabled
        FROM chain AS c
        CROSS JOIN LATERAL (SELECT s.site_id FROM sites AS s LIMIT 1) AS l
        CROSS JOIN generate_series(1, 2) AS g (n)
        UNION ALL
        SELECT b.rule_id, b.enabled FROM base AS b
        """,
        RULE,
        key=["rule_id"],
    )
    assert folder.load().models["reader"].dependencies == {"patterns", "runbooks", "sites", "base"}


def test_lineage_leads_each_column_to_the_columns_it_is_computed_from(folder: ModelFolder) -> None:
    folder.write("base", RULES_SQL, RULE, key=["rule_id"])
    folder.write(
        "rated",
        """
        WITH counted AS (SELECT x.*, x.match_count - x.failure_count AS good FROM l1_rules AS x)
        SELECT b.rule_id, c.good::double precision / nullif(c.match_count, 0) AS rate, count(*) OVER () AS n
        FROM base AS b JOIN counted AS c ON c.rule_id = b.rule_id
        """,
        {"rule_id": "text", "rate": "double precision", "n": "bigint"},
        key=["rule_id"],
    )
    graph = folder.load()
    assert graph.models["base"].column_lineage == {
        "rule_id": [("l1_rules", "rule_id")],
        "enabled": [("l1_rules", "enabled")],
    }
    assert graph.models["rated"].column_lineage == {
        "rule_id": [("base", "rule_id")],
        "rate": [("l1_rules", "failure_count"), ("l1_rules", "match_count")],
        "n": [],
    }


def hash_of(folder: ModelFolder, sql: str, columns: dict[str, str] = RULE, **header: object) -> str:
    folder.write("rules", sql, columns, **{"key": ["rule_id"], **header})  # type: ignore[arg-type]
    return folder.load().models["rules"].content_hash


def test_the_content_hash_ignores_comments_white_space_case_and_prose(folder: ModelFolder) -> None:
    original = hash_of(folder, RULES_SQL)
    assert hash_of(folder, "-- why\n" + RULES_SQL + " -- because\n") == original
    assert hash_of(folder, "/* why */ " + RULES_SQL.replace(" FROM", "\n  /* here */\nFROM") + "\n;\n") == original
    assert hash_of(folder, RULES_SQL.replace("SELECT", "select")) == original
    assert hash_of(folder, RULES_SQL, description="Another sentence.", room="aggregates") == original


def test_the_content_hash_follows_sql_types_key_and_materialization(folder: ModelFolder) -> None:
    original = hash_of(folder, RULES_SQL)
    others = [
        hash_of(folder, RULES_SQL + " WHERE r.enabled"),
        hash_of(folder, RULES_SQL + " WHERE r.source = 'builtin'"),
        hash_of(folder, RULES_SQL + " WHERE r.source = 'Builtin'"),
        hash_of(folder, RULES_SQL, {"rule_id": "varchar", "enabled": "boolean"}),
        hash_of(folder, RULES_SQL, key=["rule_id", "enabled"]),
        hash_of(folder, RULES_SQL, materialized="table"),
    ]
    assert len({original, *others}) == len(others) + 1


# ----------------------------------------------------------------------------- refusals: the header

HEADER_REFUSALS = {
    "an unknown key": ("grain: one row per test", "grian: one row per test", "grian", 5),
    "a missing key": ("owner: team:tests\n", "", "owner", None),
    "another name": ("name: rules", "name: rulez", "rulez", 2),
    "another room": ("room: aggregates", "room: delivery", "delivery", 3),
    "an unknown materialization": ("materialized: view", "materialized: incremental", "materialized", 4),
    "an owner that is no team": ("owner: team:tests", "owner: someone", "owner", 7),
    "a key that is no column": ("key: [rule_id]", "key: [rule]", "rule is not among the columns", 8),
    "no key": ("key: [rule_id]", "key: []", "key", 8),
    "a key column twice": ("key: [rule_id]", "key: [rule_id, rule_id]", "twice", 8),
    "a column without description": ('["boolean", the enabled]', "[boolean]", "enabled", 11),
    "a description torn by a comma": ("the enabled]", "served, or not]", "enabled", 11),
    "a type that is no type": ('"boolean"', '"boolean); DROP TABLE x"', "no plain PostgreSQL type", 9),
    "a key given twice": ("grain: one row per test", "grain: one\ngrain: two", "twice", 6),
    "YAML that is none": ("grain: one row per test", "grain: [one", "YAML", None),
    "a number where a word belongs": ("grain: one row per test", "grain: 7", "grain", 5),
    "a cell on a view": ("materialized: view", "materialized: view\ncell: day", "cell", 5),
    "a cell model without a cell": ("materialized: view", "materialized: cell", "cell", None),
    "a list instead of keys": ("name: rules", "- name: rules", "YAML", None),
}


@pytest.mark.parametrize("case", HEADER_REFUSALS)
def test_the_header_is_refused_for(case: str, folder: ModelFolder) -> None:
    before, after, said, line = HEADER_REFUSALS[case]
    path = folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    error = refusal(folder)
    assert error.message.startswith("models/aggregates/rules.sql:")
    assert said in error.message
    if line is not None:
        assert error.message.startswith(f"models/aggregates/rules.sql:{line}:"), error.message


def test_a_file_without_a_header_is_refused(folder: ModelFolder) -> None:
    path = folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    path.write_text("-- rules\n" + RULES_SQL)
    error = refusal(folder)
    assert "does not begin with a header" in error.message
    assert error.hint is not None
    assert "/*---" in error.hint


def test_a_file_that_is_not_utf8_is_refused(folder: ModelFolder) -> None:
    path = folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    path.write_bytes(path.read_bytes() + b"-- caf\xe9\n")
    assert "not UTF-8" in refusal(folder).message


def test_a_name_is_used_once_over_all_rooms_and_is_no_table(folder: ModelFolder) -> None:
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"])
    folder.write("rules", RULES_SQL, RULE, key=["rule_id"], room="delivery")
    assert "already taken by models/aggregates/rules.sql" in refusal(folder).message
    folder.remove("rules", "delivery")
    folder.write("patterns", RULES_SQL, RULE, key=["rule_id"])
    assert "that of a table" in refusal(folder).message


@pytest.mark.parametrize(
    ("cell", "key", "missing"),
    [("day", "site_id", "day"), ("day", "day", "site_id"), ("site", "day", "site_id")],
)
def test_a_cell_model_has_its_cell_in_its_key(cell: str, key: str, missing: str, folder: ModelFolder) -> None:
    folder.write(
        "cells",
        "SELECT site_id::text AS site_id, event_at::date AS day FROM execution_telemetry",
        {"site_id": "text", "day": "date"},
        key=[key],
        materialized="cell",
        cell=cell,
    )
    assert f"needs {missing} in its key" in refusal(folder).message


# -------------------------------------------------------------------------------- refusals: the SQL

SQL_REFUSALS = {
    "two statements": (RULES_SQL + ";\nSELECT 1", "2 statements"),
    "no statement": ("-- nothing", "no SELECT follows"),
    "an INSERT": ("INSERT INTO l1_rules (rule_id) SELECT 'x'", "one SELECT"),
    "VALUES": ("VALUES ('a', true)", "one SELECT"),
    "a parenthesised SELECT": (f"({RULES_SQL})", "one SELECT"),
    "SELECT *": ("SELECT * FROM l1_rules", "SELECT *"),
    "a star of one table": ("SELECT r.* FROM l1_rules AS r", "SELECT *"),
    "a star in one branch of a union": (RULES_SQL + " UNION ALL SELECT * FROM l1_rules", "SELECT *"),
    "a data-modifying CTE": (
        "WITH gone AS (DELETE FROM patterns RETURNING pattern_id) " + RULES_SQL,
        "data-modifying",
    ),
    "SELECT INTO": (RULES_SQL.replace(" FROM", " INTO copy FROM"), "SELECT INTO"),
    "FOR UPDATE": (RULES_SQL + " FOR UPDATE", "row locks"),
    "FOR SHARE in a subquery": (
        "SELECT r.rule_id::text AS rule_id, r.enabled FROM (SELECT * FROM l1_rules FOR SHARE) AS r",
        "row locks",
    ),
    "a missing column": (
        "SELECT r.rule_id::text AS rule_id FROM l1_rules AS r",
        "declared but not selected: enabled",
    ),
    "a column too many": (RULES_SQL.replace(" FROM", ", r.state FROM"), "selected but not declared: state"),
    "another order": ("SELECT r.enabled, r.rule_id::text AS rule_id FROM l1_rules AS r", "another order"),
    "a column without a name": (
        "SELECT r.rule_id::text AS rule_id, r.match_count > 0 FROM l1_rules AS r",
        "column 2 of the SELECT has no name",
    ),
    "a column twice": (RULES_SQL.replace(" FROM", ", r.enabled FROM"), "twice"),
    "a table that nobody declared": (
        "SELECT rule_id, enabled FROM legacy_rules",
        "legacy_rules is neither a model",
    ),
    "a catalogue table": (
        "SELECT relname::text AS rule_id, relhasindex AS enabled FROM pg_class",
        "pg_class is neither a model",
    ),
    "a table named with its schema": (
        RULES_SQL.replace("l1_rules", "public.l1_rules"),
        "named with its schema",
    ),
    "a CTE that hides a table": (
        "WITH patterns AS (SELECT 1 AS one) " + RULES_SQL + " CROSS JOIN patterns",
        "the CTE patterns hides",
    ),
    "a CTE that hides a model": ("WITH rules AS (SELECT 1 AS one) " + RULES_SQL, "the CTE rules hides"),
    "a CTE with the name of a scope": (
        "WITH scope_days AS (SELECT 1 AS one) " + RULES_SQL,
        "the CTE scope_days hides",
    ),
    "a table of the refresh": (
        "SELECT site_id AS rule_id, true AS enabled FROM scope_sites",
        "no model may read",
    ),
    "a template": (RULES_SQL.replace("l1_rules", "{{ ref('l1_rules') }}"), "template"),
    "a template block": ("{% if x %}" + RULES_SQL + "{% endif %}", "template"),
    "a named parameter": (RULES_SQL + " WHERE r.source = :source", "placeholder"),
    "a driver's parameter": (RULES_SQL + " WHERE r.source = %s", "placeholder"),
    "a driver's named parameter": (RULES_SQL + " WHERE r.source = %(source)s", "placeholder"),
    "a numbered parameter": (RULES_SQL + " WHERE r.source = $1", "placeholder"),
    "SQL that is none": ("SELECT FROM WHERE rule_id", ""),
    "an open string": ("SELECT 'x AS rule_id", "cannot be read"),
}


@pytest.mark.parametrize("case", SQL_REFUSALS)
def test_the_sql_is_refused_for(case: str, folder: ModelFolder) -> None:
    sql, said = SQL_REFUSALS[case]
    folder.write("rules", sql, RULE, key=["rule_id"])
    error = refusal(folder)
    assert error.message.startswith("models/aggregates/rules.sql:")
    assert said in error.message


def test_what_only_looks_like_a_template_or_a_write_is_accepted(folder: ModelFolder) -> None:
    folder.write(
        "rules",
        'SELECT r.rule_id::text AS rule_id, r.incident_pattern @> \'{"a": "{{ x }} :name %s"}\' AS enabled\n'
        "FROM l1_rules AS r -- {{ delete }} FOR UPDATE\n"
        "WHERE r.rule_id NOT LIKE '%s' AND (ARRAY[1, 2])[1:1] = ARRAY[1] AND r.match_count % 2 = 0",
        RULE,
        key=["rule_id"],
    )
    assert folder.load().models["rules"].dependencies == {"l1_rules"}


def test_a_parse_error_names_the_line_of_the_file(folder: ModelFolder) -> None:
    path = folder.write(
        "rules", "SELECT r.rule_id,\n  r.enabled\nFROM l1_rules AS r\nWHERE (r.enabled", RULE, key=["rule_id"]
    )
    last = len(path.read_text().splitlines())
    assert refusal(folder).message.startswith(f"models/aggregates/rules.sql:{last}:")


def test_models_that_read_each_other_are_refused(folder: ModelFolder) -> None:
    folder.write("one", "SELECT rule_id, enabled FROM two", RULE, key=["rule_id"])
    folder.write("two", "SELECT rule_id, enabled FROM one", RULE, key=["rule_id"])
    error = refusal(folder)
    assert "in a circle" in error.message
    assert "one -> two" in error.message or "two -> one" in error.message


def test_a_model_that_reads_itself_is_refused(folder: ModelFolder) -> None:
    folder.write("one", "SELECT rule_id, enabled FROM one", RULE, key=["rule_id"])
    assert "in a circle" in refusal(folder).message


# ---------------------------------------------------------------------------- refusals: cell models

DAY = {"site_id": "text", "day": "date", "n": "bigint"}
DAY_SQL = (
    "SELECT site_id::text AS site_id, (event_at AT TIME ZONE 'UTC')::date AS day, count(*) AS n\n"
    "FROM execution_telemetry\nWHERE {where}\nGROUP BY 1, 2"
)

MOMENTS = [
    "created_at < now()",
    "created_at < NOW ( )",
    "created_at < pg_catalog.now()",
    "created_at < current_timestamp",
    "created_at::date < CURRENT_DATE",
    "created_at < clock_timestamp()",
    "created_at < localtimestamp",
    "random() < 0.5",
    "execution_id <> gen_random_uuid()::text",
    "execution_id <> uuidv7()::text",
    "created_at < 'now'::timestamptz",
    "created_at < CAST('today' AS date)",
]


@pytest.mark.parametrize("where", MOMENTS)
def test_a_cell_model_may_not_depend_on_the_moment(where: str, folder: ModelFolder) -> None:
    path = folder.write(
        "daily", DAY_SQL.format(where=where), DAY, key=["site_id", "day"], materialized="cell", cell="day"
    )
    error = refusal(folder)
    line = path.read_text().splitlines().index(f"WHERE {where}") + 1
    assert error.message.startswith(f"models/aggregates/daily.sql:{line}: a cell model must give the same rows")


@pytest.mark.parametrize("where", MOMENTS)
def test_a_view_may_depend_on_the_moment_unless_a_cell_model_reads_it(where: str, folder: ModelFolder) -> None:
    folder.write("recent", DAY_SQL.format(where=where), DAY, key=["site_id", "day"])
    folder.load()
    folder.write(
        "daily",
        "SELECT site_id, day, n FROM recent",
        DAY,
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    error = refusal(folder)
    assert error.message.startswith("models/aggregates/recent.sql:")
    assert "read by the cell model daily" in error.message


def test_a_word_that_only_looks_like_the_clock_is_accepted_in_a_cell_model(folder: ModelFolder) -> None:
    where = "status <> 'now' AND error_message <> 'current_date' AND tags ->> 'today' IS NULL"
    folder.write("daily", DAY_SQL.format(where=where), DAY, key=["site_id", "day"], materialized="cell", cell="day")
    assert folder.load().models["daily"].cell == "day"


def test_a_cell_model_may_not_read_a_rebuilt_table(folder: ModelFolder) -> None:
    folder.write("snapshot", DAY_SQL.format(where="true"), DAY, key=["site_id", "day"], materialized="table")
    folder.write(
        "daily",
        "SELECT site_id, day, n FROM snapshot",
        DAY,
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    assert "may not read snapshot" in refusal(folder).message


def test_a_cell_of_a_day_may_not_read_a_cell_of_a_site_nor_a_cell_of_a_site_read_telemetry(
    folder: ModelFolder,
) -> None:
    folder.write("daily", DAY_SQL.format(where="true"), DAY, key=["site_id", "day"], materialized="cell", cell="day")
    site = {"site_id": "text", "n": "bigint"}
    total = "SELECT site_id, sum(n)::bigint AS n FROM daily GROUP BY site_id"
    folder.write("totals", total, site, key=["site_id"], materialized="cell", cell="site")
    graph = folder.load()
    assert [m.name for m in graph.inlined_path(graph.models["totals"])] == ["daily"]
    folder.write(
        "share",
        "SELECT d.site_id, d.day, t.n FROM daily AS d JOIN totals AS t ON t.site_id = d.site_id",
        DAY,
        key=["site_id", "day"],
        materialized="cell",
        cell="day",
    )
    assert "may not read totals" in refusal(folder).message
    folder.remove("share")
    direct = "SELECT site_id::text AS site_id, count(*) AS n FROM execution_telemetry GROUP BY 1"
    folder.write("totals", direct, site, key=["site_id"], materialized="cell", cell="site")
    assert "reads telemetry through a model of cell day" in refusal(folder).message


# --------------------------------------------------------------------------------------- the import


def test_the_loader_imports_neither_pandas_nor_dagster_nor_great_expectations() -> None:
    program = (
        "import sys, flywheel_pipeline.sql_models.loader as l, flywheel_pipeline.sql_models.sync, "
        "flywheel_pipeline.sql_models.cells, flywheel_pipeline.sql_models.metadata; l.load_models(); "
        "print([m for m in ('pandas', 'numpy', 'dagster', 'great_expectations') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_empty_folder_gives_an_empty_graph(tmp_path: Path) -> None:
    graph = load_models(tmp_path)
    assert dict(graph.models) == {}
    assert graph.source_tables == frozenset()
