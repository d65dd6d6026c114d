"""Many writers, several refreshers, killed refreshers: nothing is lost and nothing is counted twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
import sqlalchemy as sa
from exactness import assert_exact, graph
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.aggregates.recount import recount
from flywheel_pipeline.aggregates.refresh import rebuild, refresh
from flywheel_pipeline.telemetry import sensors
from flywheel_pipeline.telemetry.sensors import wait_for_work, waiting_work

WRITERS = 8
SITES = ["site-a", "site-b", "site-c"]
IDENTITIES = [
    {"runbook_id": "L1-SSH-001"},
    {"runbook_id": "RB-AUTO-NOBODY"},
    {"runbook_id": "RB-LIN-SSH-001", "resolution_level": "L2"},
]
KILLS = 50


def some_rows(pick: random.Random, count: int) -> list[dict[str, object]]:
    return [
        row(
            at=NOON.replace(day=pick.randrange(1, 5), hour=pick.randrange(24)),
            site_id=pick.choice(SITES),
            hostname=f"h{pick.randrange(4)}",
            success=pick.random() < 0.7,
            **pick.choice(IDENTITIES),
        )
        for _ in range(count)
    ]


@contextmanager
def running(*work: Callable[[], None]) -> Iterator[list[threading.Thread]]:
    """Run these in threads; end them all and raise the first error of any."""
    errors: list[BaseException] = []

    def run(what: Callable[[], None]) -> None:
        try:
            what()
        except BaseException as error:  # noqa: BLE001 (raised again below, in the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=run, args=[what], daemon=True) for what in work]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        if errors:
            raise errors[0]


def waits_for_a_lock(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return bool(
            connection.execute(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
            ).scalar_one()
        )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refresh_once(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        refresh(connection, graph())


def test_eight_writers_lose_nothing_while_a_cursor_on_the_last_id_does(engine: sa.Engine) -> None:
    done = threading.Event()
    committed = [0] * WRITERS
    by_cursor = {"cursor": 0, "rows": 0}
    with engine.connect() as slow:
        # A writer that takes its ids first and commits last: what a long transaction on a busy day looks like.
        insert(slow, some_rows(random.Random(0), 5))

        def write(number: int) -> None:
            pick = random.Random(number)
            for _ in range(20):
                with engine.connect() as connection:
                    count = pick.randrange(1, 6)
                    insert(connection, some_rows(pick, count))
                    time.sleep(pick.random() * 0.02)
                    if pick.random() < 0.25:
                        connection.rollback()
                    else:
                        connection.commit()
                        committed[number] += count

        def follow_the_last_id() -> None:
            while not done.is_set():
                with engine.begin() as connection:
                    found = connection.execute(
                        sa.text("SELECT count(*) AS rows, max(id) AS last FROM execution_telemetry WHERE id > :cursor"),
                        by_cursor,
                    ).one()
                by_cursor["rows"] += found.rows
                by_cursor["cursor"] = found.last or by_cursor["cursor"]
                time.sleep(0.005)

        def keep_refreshing() -> None:
            while not done.is_set():
                refresh_once(engine)

        with running(follow_the_last_id, keep_refreshing, keep_refreshing):
            try:
                with running(*(lambda n=n: write(n) for n in range(WRITERS))):  # type: ignore[misc]
                    pass
                time.sleep(0.05)
                slow.commit()
                time.sleep(0.05)
            finally:
                done.set()
    rows = sum(committed) + 5
    refresh_once(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one() == rows
        counted = connection.exec_driver_sql("SELECT sum(executions) FROM telemetry_daily_volume").scalar_one()
    assert counted == rows
    assert_exact(engine)
    assert by_cursor["rows"] <= rows - 5  # the control: it never sees the rows of the slow writer


def test_two_refreshers_wait_for_each_other(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        insert(connection, some_rows(random.Random(1), 20))
    with engine.connect() as first:
        assert refresh(first, graph()).rows_written > 0
        with engine.begin() as connection:
            insert(connection, some_rows(random.Random(2), 20))
        with running(lambda: refresh_once(engine)):
            until(lambda: waits_for_a_lock(engine))
            first.commit()
    assert_exact(engine)


def test_refreshes_and_rebuilds_in_parallel_agree(engine: sa.Engine) -> None:
    def write() -> None:
        pick = random.Random(3)
        for _ in range(15):
            with engine.begin() as connection:
                insert(connection, some_rows(pick, 4))
                connection.exec_driver_sql(
                    "UPDATE execution_telemetry SET success = NOT success WHERE mod(id, 7) = 0 AND hostname = 'h1'"
                )

    with running(
        write,
        lambda: [refresh_once(engine) for _ in range(10)] and None,
        lambda: [rebuild(engine, chunk_cells=3) for _ in range(2)] and None,
        lambda: rebuild(engine, site="site-a") and None,
    ):
        pass
    refresh_once(engine)
    assert_exact(engine)


@pytest.mark.parametrize(
    "change",
    [
        "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('site-a', 'site-z', 'test', 'renamed')",
        "INSERT INTO rule_aliases (alias, rule_id, actor, reason) VALUES ('RB-AUTO-NOBODY', 'L1-SSH-001', 'test', 'cut')",
        "INSERT INTO outcome_class_rules (rule_name, outcome_class, field, pattern, description) "
        "VALUES ('odd', 'unreachable', 'error_message', 'odd_thing', 'test')",
    ],
    ids=["site alias", "rule alias", "class rule"],
)
def test_a_row_that_arrives_while_the_reading_changes_is_read_the_new_way(engine: sa.Engine, change: str) -> None:
    def late() -> dict[str, object]:
        return row(runbook_id="RB-AUTO-NOBODY", success=False, error_message="odd thing")

    with engine.begin() as connection:
        insert(connection, [late()])
    refresh_once(engine)
    with engine.connect() as changing:
        changing.exec_driver_sql(change)  # it has looked for rows that it concerns, and has not committed
        with engine.begin() as connection:
            insert(connection, [late()])
        with running(lambda: refresh_once(engine)):
            until(lambda: waits_for_a_lock(engine))
            changing.commit()
    refresh_once(engine)
    assert_exact(engine)


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE execution_telemetry",
        "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('site-a', 'site-z', 'test', 'renamed')",
        "UPDATE outcome_class_rules SET enabled = false WHERE rule_name = 'unknown_action'",
        "SELECT flywheel_touch_all()",
    ],
)
def test_what_looks_for_rows_refuses_an_old_snapshot(engine: sa.Engine, statement: str) -> None:
    old = engine.connect().execution_options(isolation_level="REPEATABLE READ")
    with old as connection, pytest.raises(sa.exc.DatabaseError, match="isolation level read committed"):
        connection.exec_driver_sql(statement)


def test_a_commit_wakes_the_sensor_and_one_that_left_it_to_another_is_seen_soon(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    at_most = 30.0  # the sensor looks a last time then, whatever it missed

    def look(engine: sa.Engine) -> tuple[int, int]:
        found = waiting_work(engine)
        looked.set()
        return found

    def commit_after_a_look() -> None:
        assert looked.wait(20)
        with engine.begin() as connection:
            insert(connection, [row()])

    def waited() -> float:
        looked.clear()
        begun = time.monotonic()
        with running(commit_after_a_look):
            assert wait_for_work(engine, at_most)[0] > 0
            return time.monotonic() - begun

    monkeypatch.setattr(sensors, "waiting_work", look)
    with monkeypatch.context() as patch:
        patch.setattr(sensors, "LOOK_SECONDS", 2 * at_most)  # nothing but a NOTIFY has it look before the end
        assert waited() < at_most
    refresh_once(engine)
    with engine.connect() as waker:
        insert(waker, [row()])  # it would wake the sensor, at its commit
        assert waited() < at_most
        waker.rollback()


def _refresh_and_be_killed(engine: sa.Engine, begun: Connection) -> None:
    engine.dispose(close=False)  # the parent's connections are the parent's
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        begun.send(True)
        refresh(connection, graph())
        connection.commit()
    begun.send(True)
    signal.pause()


def test_a_refresh_killed_at_any_moment_leaves_exact_figures(engine: sa.Engine) -> None:
    fork = multiprocessing.get_context("fork")
    pick = random.Random(20260215)
    begun = time.monotonic()
    with engine.begin() as connection:
        insert(connection, some_rows(pick, 30))
        refresh(connection, graph())
    takes = time.monotonic() - begun
    unfinished = 0
    for kill in range(KILLS):
        with engine.begin() as connection:
            insert(connection, some_rows(pick, 3))
            connection.exec_driver_sql(
                f"UPDATE execution_telemetry SET success = NOT success WHERE mod(id, 11) = {kill % 11}"
            )
        reports, sends = fork.Pipe(duplex=False)
        child = fork.Process(target=_refresh_and_be_killed, args=(engine, sends))
        child.start()
        assert reports.recv()
        begun, moment = time.monotonic(), pick.uniform(0, 1.2)
        finished = reports.poll(moment * takes)
        lasted = time.monotonic() - begun
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        unfinished += not finished
        # The next moment is drawn over what one takes now: a busy machine makes one measurement worth nothing.
        if finished:
            takes = (takes + lasted) / 2
        elif moment > 1:
            takes *= 1.25
        if kill % 5 == 0:  # waiting cells apart, all is exact even before anybody repairs anything
            assert recount(engine).offenders == ()
    assert unfinished >= KILLS // 5
    refresh_once(engine)
    assert_exact(engine)
