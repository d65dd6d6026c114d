"""Controls: a variant that is known to break breaks here too, and the checker sees it; the real one stands."""

from __future__ import annotations

import datetime as dt
import os
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa
from exactness import graph
from fault_lab import FORK, broken_invariants, refresh_once
from naive_variants import AddOnlyCounters, CursorOnTheLastId, gates_as_checks_alone, without_the_lock
from staged_fleet import AUDIT, StagedFleet
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.promotion.ledger import RuleEvent, append_events


@pytest.mark.parametrize("naive", [True, False], ids=["cursor on max id", "outbox"])
def test_a_writer_that_commits_late_is_lost_to_a_cursor_and_the_doctor_sees_it(engine: sa.Engine, naive: bool) -> None:
    cursor = CursorOnTheLastId(graph())
    with engine.connect() as slow:
        insert(slow, [row()])  # it has the lower id, and commits last
        with engine.begin() as connection:
            insert(connection, [row(site_id="site-b")])
        with engine.begin() as connection:
            cursor.refresh(connection) if naive else refresh(connection, graph())
        slow.commit()
    with engine.begin() as connection:
        cursor.refresh(connection) if naive else refresh(connection, graph())
    broken = broken_invariants(engine)
    # Counters are off (1), and so are those of synthetic rows (8): nobody counted the row at all.
    assert broken.keys() == ({1, 8} if naive else set())
    if naive:
        assert ", counted_matches" not in broken[1]  # it knows nothing of the row at all
        assert "recounted_matches 1" in broken[1]


def _add_and_be_killed(engine: sa.Engine, variant: AddOnlyCounters) -> None:
    engine.dispose(close=False)
    variant.refresh(engine, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_counters_that_are_added_to_count_twice_after_a_kill_and_the_doctor_sees_it(
    engine: sa.Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        insert(connection, [row(), row(hostname="host-2")])
        refresh(connection, graph())
        connection.exec_driver_sql("UPDATE l1_rules SET match_count = 0, success_count = 0, failure_count = 0")
    variant = AddOnlyCounters(tmp_path / "mark")
    child = FORK.Process(target=_add_and_be_killed, args=(engine, variant))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert broken_invariants(engine) == {}  # up to here it is right
    variant.refresh(engine, lambda: None)
    broken = broken_invariants(engine)
    assert broken.keys() == {1}
    assert "counted_matches 4, matches_of_its_days 2" in broken[1]
    refresh_once(engine, graph())  # the real one sets, so it mends what was added
    assert broken_invariants(engine) == {}


def test_two_refreshes_without_the_lock_write_back_an_older_moment_and_the_doctor_sees_it(engine: sa.Engine) -> None:
    without_the_lock(engine)
    with engine.begin() as connection:
        insert(connection, [row(at=NOON + dt.timedelta(days=1))])
    overtaken = False

    def overtake(_model: str) -> None:
        nonlocal overtaken
        if not overtaken:  # the first has read the log of both days, and has written nothing yet
            overtaken = True
            with engine.begin() as connection:
                insert(connection, [row()])
            with engine.begin() as connection:  # in chunks, as a rebuild goes: it takes the day before alone
                refresh(connection, graph(), max_cells=1)

    with engine.begin() as connection:
        refresh(connection, graph(), progress=overtake)
    broken = broken_invariants(engine)
    assert 1 in broken
    assert "day 2026-02-02, rule_id L1-SSH-001, recounted_matches 1" in broken[1]


def test_with_the_lock_the_second_waits_and_both_are_right(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        insert(connection, [row()])

    def impatiently() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '50ms'")
            insert(connection, [row(hostname="host-2")])
            refresh(connection, graph())

    def overtake(_model: str) -> None:
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            impatiently()

    with engine.begin() as connection:
        refresh(connection, graph(), progress=overtake)
    assert broken_invariants(engine) == {}


@pytest.mark.parametrize("naive", [True, False], ids=["checks alone", "padlock"])
def test_a_promotion_past_the_gates_is_refused_by_the_padlock_and_seen_without_it(
    engine: sa.Engine, naive: bool
) -> None:
    fleet = StagedFleet(engine, sites=6, policy="legacy")
    fleet.heal(AUDIT, 0)
    fleet.run(0.5)
    promoted = fleet.rows("SELECT * FROM rule_events WHERE rule_id = :id AND kind = 'promoted'", id=AUDIT.rule_id)[0]
    assert broken_invariants(engine) == {}

    # Somebody refreshes and materializes the ledger alone: of this batch no gate has given a verdict.
    with engine.begin() as connection:
        batch = open_batch(connection, "a run without checks")
        refresh(connection, graph(), batch_id=batch.batch_id)
    definition = {**promoted.definition, "pattern_key": "x~y~windows"}

    def materialize() -> None:
        with engine.begin() as connection:
            append_events(
                connection,
                [
                    RuleEvent("RB-AUTO-PAST", "proposed", "none", "proposed", definition, "somebody", "in a hurry"),
                    RuleEvent(
                        "RB-AUTO-PAST",
                        "promoted",
                        "proposed",
                        "fleet",
                        definition,
                        "somebody",
                        "in a hurry",
                        batch_id=batch.batch_id,
                        decision_id=promoted.decision_id,
                        certificate=promoted.certificate,
                    ),
                ],
            )

    if naive:
        gates_as_checks_alone(engine)
        materialize()
        broken = broken_invariants(engine)
        assert {5, 12} <= broken.keys()
        assert "promoted past the gates of its batch, rule_id RB-AUTO-PAST" in broken[5]
        assert "guard is missing" in broken[12]
    else:
        with pytest.raises(sa.exc.DatabaseError, match="did not pass its gates"):
            materialize()
