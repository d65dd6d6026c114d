"""`flywheel adopt` on a database as the old system left it: nothing is lost, nothing is imagined, and there is a way back."""

from __future__ import annotations

import datetime as dt
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import old_system
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from flywheel_pipeline.aggregates.recount import recount
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.cli.app import app
from flywheel_pipeline.database import adopt, migrate
from flywheel_pipeline.database.adopt_plan import TypeChange, judge_type
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch, UsageError
from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.promotion.quality import registry_equals_ledger
from flywheel_pipeline.simulation.replay import write_ndjson
from flywheel_pipeline.telemetry.intake import import_file

# What an adoption may alter in a row of the old system's: a unit, a missing value, a recounted counter.
ALTERED = {
    "execution_telemetry": {"created_at"},
    "l1_rules": {
        *("match_count", "success_count", "failure_count", "success_rate"),
        *("source", "updated_at", "enabled", "promoted_from_l2"),
    },
    "runbooks": {"name"},
    "appliances": {"last_checkin"},
}
FOREIGN = ("portal.tickets", "rule_audit")


_numbers = itertools.count(1)


@contextmanager
def database(server: EmbeddedServer, template: str | None = None) -> Iterator[sa.Engine]:
    """Make a database, a copy of `template` if given; drop it after."""
    name = f"adopt_{next(_numbers)}"
    postgres = open_engine(server.url.set(database="postgres")).execution_options(isolation_level="AUTOCOMMIT")
    run(postgres, f"CREATE DATABASE {name}" + (f" TEMPLATE {template} STRATEGY file_copy" if template else ""))
    engine = open_engine(server.url.set(database=name))
    yield engine
    engine.dispose()
    run(postgres, f"DROP DATABASE {name} WITH (FORCE)")
    postgres.dispose()


@pytest.fixture(scope="module")
def old_template(server: EmbeddedServer) -> Iterator[str]:
    """Name of a database as the old system left it, to be copied."""
    with database(server) as engine:
        old_system.make(engine)
        engine.dispose()
        yield str(engine.url.database)


@pytest.fixture(scope="module")
def adopted_template(server: EmbeddedServer, old_template: str) -> Iterator[str]:
    """Name of an adopted database, to be copied."""
    with database(server, old_template) as engine:
        adopt.apply(engine, actor="Dana", reason="the pilot is over")
        engine.dispose()
        yield str(engine.url.database)


@pytest.fixture
def old(server: EmbeddedServer, old_template: str) -> Iterator[sa.Engine]:
    """Engine on a database as the old system left it."""
    with database(server, old_template) as engine:
        yield engine


@pytest.fixture
def adopted(server: EmbeddedServer, adopted_template: str) -> Iterator[sa.Engine]:
    """Engine on an adopted database."""
    with database(server, adopted_template) as engine:
        yield engine


def run(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def one(engine: sa.Engine, statement: str) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql(statement).scalar_one()


def by_key(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in rows}


def counted(engine: sa.Engine) -> dict[str, tuple[int, int]]:
    """(matches, successes) of each rule, counted here from the raw rows; each L1 row names its rule in runbook_id."""
    matches: Counter[str] = Counter()
    successes: Counter[str] = Counter()
    for row in old_system.rows(engine, "execution_telemetry", ["resolution_level", "runbook_id", "success"]):
        if row["resolution_level"] == "L1":
            matches[row["runbook_id"]] += 1
            successes[row["runbook_id"]] += row["success"]
    return {rule: (matches[rule], successes[rule]) for rule in matches}


# The dry run


def test_a_dry_run_lists_every_change_and_touches_nothing(old: sa.Engine) -> None:
    catalog, contents = old_system.fingerprint(old), old_system.contents(old)
    plan = adopt.dry_run(old)
    assert (old_system.fingerprint(old), old_system.contents(old)) == (catalog, contents)
    assert not plan.applied
    assert plan.obstacles == ()
    changes = {(c["table"], c["column"]): c for c in plan.changes if c["column"]}
    assert changes["execution_telemetry", "event_at"]["what"].startswith(
        "add timestamp with time zone GENERATED ALWAYS"
    )
    assert changes["execution_telemetry", "confidence"]["what"] == "real becomes double precision"
    assert changes["l1_rules", "success_rate"]["why"].startswith("a rate is a fraction here")
    assert all(change["what"] and change["why"] for change in plan.changes)
    whats = [change["what"] for change in plan.changes]
    assert "drop the trigger trg_l1_rule_counters" in whats
    assert "drop the function public.update_l1_rule_counters()" in whats
    assert "recount every counter from 4,000 executions" in whats
    assert "enter 7 enabled rules in the ledger as fleet and 13 disabled ones as quarantined" in whats
    left = {line["object"] for line in plan.left}
    assert {"trigger audit_rule on l1_rules", "trigger l1_rules_updated_at on l1_rules"} <= left
    assert {"column sites.clinic_name", "constraint appliances_site_id_fkey on appliances"} <= left
    assert any("bump_rule" in note for note in plan.notes)


@pytest.mark.long
def test_a_dry_run_does_not_wait_for_writers(old: sa.Engine) -> None:
    with old.begin() as writer:
        writer.exec_driver_sql("UPDATE l1_rules SET match_count = match_count + 1")
        writer.exec_driver_sql("LOCK TABLE execution_telemetry IN ROW EXCLUSIVE MODE")
        assert adopt.dry_run(old).changes


# The adoption


def test_every_row_and_everything_of_other_systems_stays(old: sa.Engine) -> None:
    catalog, contents = old_system.fingerprint(old), old_system.contents(old)
    adopt.apply(old, actor="Dana", reason="the pilot is over")
    after = old_system.contents(old)
    for table, rows in contents.items():
        altered = ALTERED.get(table, set())
        columns = [name for name in rows[0] if name not in altered] if rows else []
        found = [{name: row[name] for name in columns} for row in after[table]]
        for row in rows:
            assert {name: row[name] for name in columns} in found or table == "execution_telemetry"
        assert len(after[table]) >= len(rows)
    key = "execution_id"
    before, now = by_key(contents["execution_telemetry"], key), by_key(after["execution_telemetry"], key)
    assert before.keys() == now.keys()
    for execution, row in before.items():
        same = {name for name in row if name not in ALTERED["execution_telemetry"]}
        assert {name: row[name] for name in same} == {name: now[execution][name] for name in same}
        assert row["created_at"] in (None, now[execution]["created_at"])
    for table in FOREIGN:
        assert after[table] == contents[table], table
    present = old_system.fingerprint(old)
    theirs = ("portal.", "rule_audit", "rule_rates")
    for kind, facts in catalog.items():
        kept = [fact for fact in facts if str(fact[0]).startswith(theirs)]
        # The unit of a rate and a column's width change under a view; the view itself does not.
        if kind == "columns":
            kept = [
                fact for fact in kept if fact[1] not in ("confidence", "rule_id", "incident_type") or "." not in fact[0]
            ]
            kept = [fact for fact in kept if fact[0] != "rule_rates"]
        assert [fact for fact in kept if fact not in present[kind]] == [], kind
    keys = [fact for fact in catalog["constraints"] if "FOREIGN KEY" in fact[2]]
    assert [fact for fact in keys if fact not in present["constraints"]] == []


def test_the_figures_equal_an_independent_recount_and_the_old_ones_stand_beside_them(old: sa.Engine) -> None:
    before = by_key(old_system.rows(old, "l1_rules"), "rule_id")
    expected = counted(old)
    done = adopt.apply(old, actor="Dana", reason="the pilot is over")
    lines = {line.rule_id: line for line in done.counters}
    assert {rule: (line.matches, line.successes) for rule, line in lines.items() if line.matches} == expected
    assert done.unresolved == 0
    for rule, row in before.items():
        line = lines[rule]
        assert (line.old_matches, line.old_successes, line.old_failures) == (
            row["match_count"],
            row["success_count"],
            row["failure_count"],
        )
    assert lines["RB-AUTO-BITLOCKE"].differs  # its trigger came late
    assert not lines["RB-AUTO-PASSWORD"].differs
    assert recount(old).differences == 0
    rates = by_key(old_system.rows(old, "l1_rules"), "rule_id")
    matches, successes = expected["RB-AUTO-BITLOCKE"]
    assert rates["RB-AUTO-BITLOCKE"]["success_rate"] == pytest.approx(successes / matches)
    assert rates["RB-AUTO-PASSWORD"]["success_rate"] is None


def test_rules_enter_the_ledger_as_they_stood(old: sa.Engine) -> None:
    before = by_key(old_system.rows(old, "l1_rules"), "rule_id")
    adopt.apply(old, actor="Dana", reason="the pilot is over")
    rules = by_key(old_system.rows(old, "l1_rules"), "rule_id")
    for rule_id, row in before.items():
        rule = rules[rule_id]
        assert rule["state"] == ("fleet" if row["enabled"] else "quarantined")
        assert rule["enabled"] == bool(row["enabled"])
        assert (rule["state_actor"], rule["state_reason"]) == ("Dana", "as the old system left it")
        assert (rule["incident_pattern"], rule["runbook_id"]) == (row["incident_pattern"], row["runbook_id"])
        assert (rule["confidence"], rule["id"], rule["created_at"]) == (row["confidence"], row["id"], row["created_at"])
    assert {row["kind"] for row in old_system.rows(old, "rule_events")} == {"imported", "registered"}
    assert rules["L1-FIREWALL-001"]["source"] == "builtin"
    assert rules["L1-NTP-001"]["state_reason"] == "a built-in rule that agents ship with"
    with old.connect() as connection:
        assert registry_equals_ledger(connection).passed
    bitlocker = rules["RB-AUTO-BITLOCKE"]
    assert (bitlocker["platform"], bitlocker["pattern_key"]) == ("windows", "bitlocker_status~RB-WIN-SEC-005~windows")


@pytest.mark.long
def test_patterns_get_the_platform_and_key_that_the_replay_knows(adopted: sa.Engine) -> None:
    found = by_key(old_system.rows(adopted, "patterns"), "pattern_id")
    known = by_key(old_system.replay().patterns, "pattern_id")
    assert found.keys() == known.keys()
    wrong = {
        pattern: (found[pattern]["platform"], known[pattern]["platform"])
        for pattern in known
        if found[pattern]["platform"] not in (None, known[pattern]["platform"])
    }
    assert wrong == {}
    assert sum(row["pattern_key"] is not None for row in found.values()) > 40


def test_an_adopted_database_has_no_differences_and_a_second_adoption_changes_nothing(adopted: sa.Engine) -> None:
    assert migrate.check(adopted) == []
    assert migrate.upgrade(adopted).changes == ()
    catalog, contents = old_system.fingerprint(adopted), old_system.contents(adopted)
    for again in (adopt.dry_run(adopted), adopt.apply(adopted, actor="Dana", reason="once more")):
        assert (again.changes, again.applied) == ((), False)
    assert (old_system.fingerprint(adopted), old_system.contents(adopted)) == (catalog, contents)


@pytest.mark.long
def test_what_changes_later_in_the_old_parts_is_a_difference(adopted: sa.Engine) -> None:
    run(
        adopted,
        "CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER trg_l1_rule_counters AFTER INSERT ON execution_telemetry FOR EACH ROW EXECUTE FUNCTION again()",
        "ALTER TABLE execution_telemetry ALTER COLUMN ingest_node DROP DEFAULT",
    )
    assert [(found.object, found.problem) for found in migrate.check(adopted)] == [
        ("column execution_telemetry.ingest_node", "not declared"),
        ("trigger trg_l1_rule_counters on execution_telemetry", "not declared"),
    ]


def test_old_writers_and_the_intake_both_go_on(adopted: sa.Engine, tmp_path: Path) -> None:
    run(
        adopted,
        "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, status, success, "
        "resolution_level) VALUES ('late-1', 'north-valley-dental', 'unknown', 'RB-AUTO-FIREWALL', 'h', 'success', true, 'L1')",
    )
    file = tmp_path / "posts.ndjson"
    posts = [post for post in old_system.posts() if post["execution"].get("confidence") is not None][-500:]
    write_ndjson(file, posts)
    arrival = dt.datetime(2026, 2, 16, tzinfo=dt.UTC)
    import_file(adopted, file, received_at=arrival)
    again = import_file(adopted, file, received_at=arrival)
    assert (again.inserted, again.corrected, again.rejected) == (0, 0, 0)  # a REAL would never read back as it was sent
    before = by_key(old_system.rows(adopted, "l1_rules"), "rule_id")["RB-AUTO-FIREWALL"]["match_count"]
    with adopted.begin() as connection:
        refresh(connection)
    after = by_key(old_system.rows(adopted, "l1_rules"), "rule_id")["RB-AUTO-FIREWALL"]["match_count"]
    assert after == before + 1
    assert recount(adopted).differences == 0


@pytest.mark.long
def test_a_writer_with_few_rights_is_not_locked_out(old: sa.Engine) -> None:
    role = f"old_writer_{old.url.database}"
    run(old, f"CREATE ROLE {role}", f"GRANT SELECT, INSERT, UPDATE ON execution_telemetry, l1_rules TO {role}")
    run(old, f"GRANT USAGE ON SEQUENCE execution_telemetry_id_seq TO {role}", f"GRANT INSERT ON rule_audit TO {role}")
    try:
        adopt.apply(old, actor="Dana", reason="the pilot is over")
        run(
            old,
            f"SET LOCAL ROLE {role}",
            "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, status, success) "
            "VALUES ('late-1', 's', 'a', 'RB-AUTO-FIREWALL', 'h', 'success', true)",
            "UPDATE execution_telemetry SET success = false WHERE execution_id = 'late-1'",
            "UPDATE l1_rules SET match_count = match_count + 1",
        )
        assert one(old, "SELECT count(*) FROM touched_cells WHERE site_id = 's'") == 2
    finally:
        run(old, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("execution_telemetry.tags", marks=pytest.mark.long),
        "seed builtin",
        pytest.param("adopted", marks=pytest.mark.long),
    ],
)
def test_a_failure_in_the_middle_leaves_the_old_database_as_it_was(old: sa.Engine, at: str) -> None:
    catalog, contents = old_system.fingerprint(old), old_system.contents(old)

    def break_off(change: str) -> None:
        if change.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adopt.apply(old, actor="Dana", reason="the pilot is over", progress=break_off)
    assert (old_system.fingerprint(old), old_system.contents(old)) == (catalog, contents)


@pytest.mark.long
def test_an_adoption_waits_for_writers_and_none_of_their_rows_is_missed(old: sa.Engine) -> None:
    expected = counted(old)["RB-AUTO-FIREWALL"][0] + 1
    with old.connect() as writer:
        writer.exec_driver_sql(
            "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, status, success, "
            "resolution_level) VALUES ('late-1', 's', 'a', 'RB-AUTO-FIREWALL', 'h', 'success', true, 'L1')"
        )
        pid = writer.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        thread = threading.Thread(target=adopt.apply, args=(old,), kwargs={"actor": "Dana", "reason": "now"})
        thread.start()
        deadline = time.monotonic() + 60
        while not one(old, f"SELECT count(*) FROM pg_stat_activity WHERE {pid} = ANY (pg_blocking_pids(pid))"):
            assert thread.is_alive(), "it did not wait for the writer"
            assert time.monotonic() < deadline, "it never came to where it waits"
            time.sleep(0.05)
        writer.commit()
    thread.join()
    assert by_key(old_system.rows(old, "l1_rules"), "rule_id")["RB-AUTO-FIREWALL"]["match_count"] == expected


@pytest.mark.long
def test_a_writer_who_does_not_let_go_ends_it_in_a_sentence(old: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopt, "LOCK_TIMEOUT_SECONDS", 1)
    with old.begin() as writer:
        writer.exec_driver_sql("UPDATE l1_rules SET match_count = match_count + 1")
        with pytest.raises(DatabaseUnavailable, match="did not let go of the old tables, so nothing was changed"):
            adopt.apply(old, actor="Dana", reason="now")


# What stands in the way


OBSTACLES = [
    ("CREATE VIEW episodes AS SELECT 1", "episodes", "Flywheel needs this name"),
    ("CREATE TABLE rule_events (id int)", "rule_events", "Flywheel needs this name"),
    ("ALTER TABLE execution_telemetry ADD COLUMN event_at date", "execution_telemetry", "rename the one that has it"),
    (
        "CREATE MATERIALIZED VIEW m AS SELECT tags::text FROM execution_telemetry",
        "execution_telemetry",
        "view public.m",
    ),
    (
        "CREATE TRIGGER t INSTEAD OF DELETE ON rule_rates FOR EACH ROW EXECUTE FUNCTION touch_updated_at()",
        "l1_rules",
        "rule_rates reads it and cannot be made again",
    ),
    ("CREATE TABLE part () INHERITS (execution_telemetry)", "execution_telemetry", "tables inherit from it"),
    (
        "ALTER TABLE execution_telemetry DROP CONSTRAINT uq_execution_telemetry_execution_id; "
        "UPDATE execution_telemetry SET execution_id = 'twice' WHERE id < 3",
        "execution_telemetry",
        "1 values stand there more than once",
    ),
    ("ALTER TABLE appliances DROP COLUMN site_id", "appliances", "nothing tells its value for"),
    ("ALTER TABLE l1_rules ALTER COLUMN incident_pattern TYPE text", "l1_rules", "no sound way"),
    (
        "UPDATE execution_telemetry SET started_at = 'infinity' WHERE id = 9",
        "execution_telemetry",
        "1 rows are dated on no day of this calendar",
    ),
]


def test_all_that_stands_in_the_way_is_named_and_nothing_is_changed(old: sa.Engine) -> None:
    run(old, *(statement for statements, _, _ in OBSTACLES for statement in statements.split("; ")))
    catalog, contents = old_system.fingerprint(old), old_system.contents(old)
    found = adopt.dry_run(old).obstacles
    for _, table, why in OBSTACLES:
        assert any(o["table"] == table and why in o["why"] for o in found), why
    assert len(found) == len(OBSTACLES)
    with pytest.raises(SchemaMismatch, match=f"{len(OBSTACLES)} things stand in the way"):
        adopt.apply(old, actor="Dana", reason="the pilot is over")
    assert (old_system.fingerprint(old), old_system.contents(old)) == (catalog, contents)


def test_rows_that_row_security_hides_stand_in_the_way(old: sa.Engine) -> None:
    role = f"tenant_{old.url.database}"
    run(
        old,
        f"CREATE ROLE {role}",
        f"ALTER TABLE l1_rules OWNER TO {role}",
        "ALTER TABLE l1_rules ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE l1_rules FORCE ROW LEVEL SECURITY",
        f"GRANT CREATE ON DATABASE {old.url.database} TO {role}",
    )
    tenant = open_engine(old.url.update_query_dict({"options": f"-crole={role}"}))
    try:
        found = {o["table"]: o["why"] for o in adopt.dry_run(tenant).obstacles}
        assert "row security hides rows" in found["l1_rules"]
        assert "only its owner flywheel may change it" in found["patterns"]
    finally:
        tenant.dispose()
        run(old, "ALTER TABLE l1_rules OWNER TO flywheel", f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.long
def test_a_trigger_of_another_table_that_writes_counters_is_told(old: sa.Engine) -> None:
    run(
        old,
        "CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN UPDATE l1_rules SET match_count = match_count + 1; RETURN NULL; END'",
        "CREATE TRIGGER count_twice AFTER INSERT ON portal.tickets FOR EACH ROW EXECUTE FUNCTION twice()",
    )
    assert any("count_twice on portal.tickets, which stays" in note for note in adopt.dry_run(old).notes)


@pytest.mark.long
def test_a_trigger_that_sets_counters_in_the_row_is_retired_and_comes_back_disabled_as_it_was(old: sa.Engine) -> None:
    run(
        old,
        "CREATE FUNCTION perfect() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.success_count := NEW.match_count; RETURN NEW; END'",
        "CREATE TRIGGER perfect BEFORE UPDATE ON l1_rules FOR EACH ROW EXECUTE FUNCTION perfect()",
        "ALTER TABLE l1_rules DISABLE TRIGGER perfect",
    )
    catalog = old_system.fingerprint(old)
    done = adopt.apply(old, actor="Dana", reason="the pilot is over")
    assert "drop the trigger perfect" in [change["what"] for change in done.changes]
    adopt.undo(old)
    assert old_system.fingerprint(old) == catalog


@pytest.mark.long
def test_a_rate_that_was_stored_is_computed_and_comes_back_with_its_values(old: sa.Engine) -> None:
    run(
        old,
        "ALTER TABLE l1_rules ALTER COLUMN success_rate DROP EXPRESSION",
        "ALTER TABLE l1_rules ALTER COLUMN success_rate TYPE numeric(5, 2)"
        if False
        else "UPDATE l1_rules SET success_rate = 77.5",
    )
    catalog, contents = old_system.fingerprint(old), old_system.contents(old)
    adopt.apply(old, actor="Dana", reason="the pilot is over")
    assert migrate.check(old) == []
    assert one(old, "SELECT max(success_rate) <= 1 FROM rule_rates")
    adopt.undo(old)
    assert old_system.contents(old) == contents
    for kind, facts in catalog.items():
        if kind != "columns":  # the column comes back as the last one
            assert old_system.fingerprint(old)[kind] == facts, kind


# The way back


def test_an_undo_gives_everything_back_as_it_was(old: sa.Engine) -> None:
    catalog, contents = old_system.fingerprint(old), old_system.contents(old)
    adopt.apply(old, actor="Dana", reason="the pilot is over")
    done = adopt.undo(old, actor="Dana", reason="the portal needs percent")
    assert old_system.fingerprint(old) == catalog
    assert old_system.contents(old) == contents
    assert (done.kept, done.executions_since) == ((), 0)
    assert one(old, f"SELECT count(*) FROM {done.archive}.rule_events") == 40
    assert one(old, f"SELECT actor FROM {done.archive}.adoption_journal WHERE kind = 'undone'") == "Dana"
    run(
        old,
        "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, status, success, "
        "resolution_level) VALUES ('late-1', 's', 'a', 'RB-AUTO-FIREWALL', 'h', 'success', true, 'L1')",
    )
    before = by_key(contents["l1_rules"], "rule_id")["RB-AUTO-FIREWALL"]["match_count"]
    assert by_key(old_system.rows(old, "l1_rules"), "rule_id")["RB-AUTO-FIREWALL"]["match_count"] == before + 1
    with pytest.raises(UsageError, match="not adopted"):
        adopt.undo(old)


@pytest.mark.long
def test_an_undo_keeps_what_came_since_and_what_was_decided_since(adopted: sa.Engine, tmp_path: Path) -> None:
    file = tmp_path / "posts.ndjson"
    newer = [post for post in old_system.replay().morning_posts if post["execution"].get("rule_id")][:50]
    known = {post["execution"]["execution_id"] for post in old_system.posts()}
    fresh = [{**post, "execution": {**post["execution"], "execution_id": f"new-{n}"}} for n, post in enumerate(newer)]
    assert not known & {post["execution"]["execution_id"] for post in fresh}
    write_ndjson(file, fresh)
    import_file(adopted, file, received_at=dt.datetime(2026, 2, 16, tzinfo=dt.UTC))
    act(adopted, "quarantine", ["RB-AUTO-BITLOCKE"], actor="Dana", reason="it does not encrypt")
    run(
        adopted,
        "INSERT INTO patterns (pattern_id, pattern_signature, incident_type, status) VALUES ('x', 'x', 'x', 'rejected')",
        f"INSERT INTO patterns (pattern_id, pattern_signature, incident_type) VALUES ('{'y' * 100}', 'y', 'y')",
        "INSERT INTO portal.tickets (execution, rule_id) SELECT max(id), 'L1-NTP-001' FROM execution_telemetry",
    )
    done = adopt.undo(adopted)
    assert done.executions_since == 50
    assert one(adopted, "SELECT count(*) FROM execution_telemetry") == old_system.ROWS + 50
    assert one(adopted, f"SELECT count(*) FROM {done.archive}.execution_telemetry_columns WHERE rule_id <> ''") == 50
    assert one(adopted, "SELECT enabled FROM l1_rules WHERE rule_id = 'RB-AUTO-BITLOCKE'") is False
    assert one(adopted, "SELECT count(*) FROM patterns WHERE status = 'rejected'") == 1
    kept = "\n".join(done.kept)
    assert "l1_rules: 20 rows that the adoption added, since others refer to them" in kept
    assert "patterns.pattern_id: character varying(64) becomes character varying(255) stays" in kept
    assert "patterns.status: checked for new rows only" in kept


@pytest.mark.long
def test_an_undone_adoption_can_be_made_again(adopted: sa.Engine) -> None:
    counters = old_system.rows(adopted, "l1_rules", ["rule_id", "match_count", "success_count", "state"])
    adopt.undo(adopted)
    adopt.apply(adopted, actor="Dana", reason="now for good")
    assert old_system.rows(adopted, "l1_rules", ["rule_id", "match_count", "success_count", "state"]) == counters
    assert migrate.check(adopted) == []
    assert adopt.undo(adopted).archive == "flywheel_undone_2"


@pytest.mark.parametrize(
    "at", [pytest.param("took back l1_rules.success_rate", marks=pytest.mark.long), "Flywheel's own tables"]
)
@pytest.mark.long
def test_an_undo_that_breaks_off_leaves_the_adopted_database_as_it_was(adopted: sa.Engine, at: str) -> None:
    catalog, contents = old_system.fingerprint(adopted), old_system.contents(adopted)

    def break_off(change: str) -> None:
        if change.startswith(at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adopt.undo(adopted, progress=break_off)
    assert (old_system.fingerprint(adopted), old_system.contents(adopted)) == (catalog, contents)


@pytest.mark.long
def test_an_undo_names_the_view_that_reads_what_has_to_go(adopted: sa.Engine) -> None:
    run(adopted, "CREATE VIEW portal.mine AS SELECT rule_id, matches FROM rule_scorecard")
    with pytest.raises(SchemaMismatch, match=r"view portal\.mine depends on view rule_scorecard"):
        adopt.undo(adopted)
    assert migrate.check(adopted) == []


# Types


@pytest.mark.parametrize(
    ("want", "live"),
    [
        ("character varying(255)", "text"),
        ("character varying(255)", "character varying(300)"),
        ("text", "character varying"),
        ("bigint", "integer"),
        ("integer", "bigint"),
        ("numeric(12,6)", "numeric"),
        ("numeric(12,6)", "numeric(14,8)"),
    ],
)
def test_a_type_that_holds_every_value_stays(want: str, live: str) -> None:
    assert isinstance(judge_type(want, live, is_id=False, exact=False), str)


@pytest.mark.parametrize(
    ("want", "live"),
    [
        ("character varying(255)", "character varying(100)"),
        ("character varying(255)", "uuid"),
        ("text", "character varying(1000)"),
        ("double precision", "real"),
        ("double precision", "numeric(10,3)"),
        ("numeric(12,6)", "numeric(10,4)"),
        ("timestamp with time zone", "timestamp without time zone"),
        ("timestamp with time zone", "timestamp(0) with time zone"),
        ("jsonb", "json"),
        ("jsonb", "text[]"),
        ("bigint", "smallint"),
    ],
)
def test_a_type_that_would_refuse_or_alter_a_value_is_changed(want: str, live: str) -> None:
    assert isinstance(judge_type(want, live, is_id=False, exact=False), TypeChange)


@pytest.mark.parametrize(
    ("want", "live"),
    [("boolean", "integer"), ("jsonb", "text"), ("uuid", "integer"), ("timestamp with time zone", "date")],
)
def test_a_type_without_a_sound_way_is_refused(want: str, live: str) -> None:
    assert judge_type(want, live, is_id=False, exact=False) is None


def test_an_id_may_be_of_any_kind_and_telemetry_integers_only_of_theirs() -> None:
    assert isinstance(judge_type("bigint", "uuid", is_id=True, exact=True), str)
    assert isinstance(judge_type("bigint", "integer", is_id=True, exact=True), str)
    assert isinstance(judge_type("integer", "bigint", is_id=False, exact=True), TypeChange)


# The command line


def command(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("FLYWHEEL_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return lambda *arguments: CliRunner().invoke(app, ["adopt", *arguments], catch_exceptions=True)


@pytest.mark.long
def test_the_command_shows_applies_and_takes_back(old: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    adopt_command = command(old, monkeypatch)
    dry = adopt_command()
    assert dry.exit_code == 0
    assert "none of them made" in dry.stdout
    assert isinstance(adopt_command("--apply").exception, UsageError)
    assert isinstance(adopt_command("--apply", "--undo").exception, UsageError)
    applied = adopt_command("--apply", "--actor", "Dana", "--reason", "the pilot is over")
    assert applied.exit_code == 0
    assert "rules had wrong counters" in applied.stdout
    again = adopt_command("--apply", "--actor", "Dana", "--reason", "the pilot is over")
    assert "nothing to change" in again.stdout
    undone = adopt_command("--undo")
    assert undone.exit_code == 0
    assert "are back" in undone.stdout


@pytest.mark.long
def test_the_command_exits_with_4_where_something_stands_in_the_way(
    old: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(old, "CREATE VIEW episodes AS SELECT 1")
    dry = command(old, monkeypatch)("--json")
    assert dry.exit_code == 4
    assert '"table": "episodes"' in dry.stdout


@pytest.mark.long
def test_an_upgrade_of_an_old_database_points_to_the_adoption(old: sa.Engine) -> None:
    with pytest.raises(SchemaMismatch) as refusal:
        migrate.upgrade(old)
    assert refusal.value.hint is not None
    assert "flywheel adopt" in refusal.value.hint


@pytest.mark.long
def test_a_database_without_the_old_tables_has_nothing_to_adopt(empty_engine: sa.Engine, engine: sa.Engine) -> None:
    with pytest.raises(UsageError, match="holds no execution_telemetry and no l1_rules"):
        adopt.dry_run(empty_engine)
    assert adopt.dry_run(engine).changes == ()
    with pytest.raises(UsageError, match="not adopted"):
        adopt.undo(engine)
