"""Landing: new executions by COPY, versions of known ones through staging, whoever else is writing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from posts import NOW, failed, line, post, rows, scalar

from flywheel_pipeline.telemetry.contract import ParsedRow, parse_line
from flywheel_pipeline.telemetry.landing import Landed, land


def parsed(*posts: dict[str, Any]) -> list[ParsedRow]:
    found = [parse_line(line(one), None, received_at=NOW) for one in posts]
    assert all(isinstance(row, ParsedRow) for row in found)
    return [row for row in found if isinstance(row, ParsedRow)]


@contextmanager
def driver(engine: sa.Engine) -> Iterator[psycopg.Connection[Any]]:
    with engine.begin() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        yield raw


def figures(landed: Landed) -> tuple[int, int, int, int, int]:
    return landed.inserted, landed.corrected, landed.repeated, landed.superseded, len(landed.refused)


def statements(engine: sa.Engine, *batches: list[ParsedRow]) -> list[Landed]:
    with driver(engine) as connection:
        return [land(connection, batch) for batch in batches]


def test_new_rows_known_rows_and_versions_in_one_batch_are_each_counted_once(engine: sa.Engine):
    statements(engine, parsed(post("known"), post("kept")))
    batch = parsed(
        post("new-b"),
        failed("known", reported=5),
        post("kept"),
        post("new-a"),
        failed("new-a", reported=5),
        post("new-a"),
        failed("kept", reported=-5),
    )
    (landed,) = statements(engine, batch)
    assert figures(landed) == (2, 2, 2, 1, 0)
    stored = rows(engine)
    assert {name: row["success"] for name, row in stored.items()} == {
        "known": False,
        "kept": True,
        "new-a": False,
        "new-b": True,
    }
    assert scalar(engine, "SELECT count(*) FROM execution_corrections") == 3  # the superseded version is kept too


def test_a_batch_of_new_rows_needs_no_staging_table(engine: sa.Engine):
    with driver(engine) as connection:
        assert land(connection, parsed(*(post(f"exec-{n}") for n in range(50)))).inserted == 50
        staged = connection.execute("SELECT to_regclass('pg_temp.staged_executions')").fetchone()
        assert staged == (None,)
        assert land(connection, parsed(failed("exec-7", reported=5), post("exec-50"))).corrected == 1
        staged = connection.execute("SELECT to_regclass('pg_temp.staged_executions') IS NOT NULL").fetchone()
        assert staged == (True,)
    assert len(rows(engine)) == 51


@pytest.mark.parametrize("other_commits", [True, False])
def test_a_row_that_another_writer_commits_after_our_look_is_a_version_of_it(engine: sa.Engine, other_commits: bool):
    landed: list[Landed] = []
    batch = parsed(post("exec-0"), failed("exec-1", reported=5), post("exec-2"))
    thread = threading.Thread(target=lambda: landed.extend(statements(engine, batch)))
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        raw.execute("SELECT 1")  # a transaction is open, so that landing does not commit by itself
        land(raw, parsed(post("exec-1")))
        thread.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'transactionid' AND query LIKE 'COPY execution%'"
        )
        deadline = time.monotonic() + 20
        while scalar(engine, waiting) == 0:
            assert time.monotonic() < deadline, "the second writer never came to wait for the first"
            time.sleep(0.02)
        if other_commits:
            raw.commit()
        else:
            raw.rollback()
    thread.join()
    assert [figures(one) for one in landed] == [(2, 1, 0, 0, 0) if other_commits else (3, 0, 0, 0, 0)]
    assert {name: row["success"] for name, row in rows(engine).items()} == {
        "exec-0": True,
        "exec-1": False,
        "exec-2": True,
    }
    assert scalar(engine, "SELECT count(*) FROM execution_corrections") == int(other_commits)


def test_a_row_that_breaks_somebody_elses_unique_key_is_refused_alone(engine: sa.Engine):
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE UNIQUE INDEX one_bundle ON execution_telemetry (evidence_bundle_id)"))
    bundles = ["a", "b", "c", "b", "d"]
    batch = parsed(*(post(f"exec-{n}", evidence_bundle_id=bundle) for n, bundle in enumerate(bundles)))
    (landed,) = statements(engine, batch)
    assert landed.inserted == 4
    ((position, reject),) = landed.refused.items()
    assert bundles[position] == "b"
    assert reject.reason_code == "refused_by_database"
    assert "one_bundle" in reject.reason
    assert sorted(row["evidence_bundle_id"] for row in rows(engine).values()) == ["a", "b", "c", "d"]


def test_rows_that_somebodys_trigger_leaves_out_are_not_counted_as_inserted(engine: sa.Engine):
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "IF NEW.hostname = 'LAB' THEN RETURN NULL; END IF; RETURN NEW; END $$"
            )
        )
        connection.execute(
            sa.text(
                "CREATE TRIGGER leave_out BEFORE INSERT ON execution_telemetry "
                "FOR EACH ROW EXECUTE FUNCTION leave_out()"
            )
        )
    (landed,) = statements(engine, parsed(post("exec-1"), post("exec-2", hostname="LAB"), post("exec-3")))
    assert figures(landed) == (2, 0, 1, 0, 0)
    assert rows(engine).keys() == {"exec-1", "exec-3"}


def test_every_type_of_value_lands_as_it_was_sent(engine: sa.Engine):
    sent = post(
        "exec-1",
        state_before={"é": ["ü", None, 1.5, True]},
        tags=[],
        cost_usd=0.123456,
        input_tokens=2_147_483_647,
        error_step=-1,
        confidence=0.1,
        manual_intervention_needed=False,
        human_feedback="tab\tnewline\nback\\slash \\N 'quote' 漢字",
    )
    statements(engine, parsed(sent))
    stored = rows(engine)["exec-1"]
    for name, value in sent["execution"].items():
        if name == "cost_usd":
            assert float(stored[name]) == value
        elif name not in ("started_at", "completed_at"):
            assert stored[name] == value, name
    assert stored["started_at"].isoformat() == "2026-02-15T09:00:00+00:00"
    assert stored["reasoning"] is None
