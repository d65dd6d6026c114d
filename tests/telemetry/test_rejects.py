"""Rejects at rest: listing, retrying, discarding, purging."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from posts import NOW, SITE, failed, line, ndjson, post, rows, scalar

from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.telemetry import batch, rejects
from flywheel_pipeline.telemetry.batch import parse_batch, take_batch
from flywheel_pipeline.telemetry.intake import import_file, post_execution
from flywheel_pipeline.telemetry.rejects import discard, list_rejects, purge, retry
from flywheel_pipeline.telemetry.reporters import Reporter

LATER = NOW + timedelta(days=1)


def parked(engine: sa.Engine, path: Path, *values: object) -> list[int]:
    report = import_file(engine, ndjson(path, *values), received_at=NOW)
    assert report.rejected == len(values)
    return report.reject_ids


def test_the_same_bad_line_seen_again_is_one_reject_seen_twice(engine: sa.Engine, tmp_path: Path):
    first = parked(engine, tmp_path / "a.ndjson", post(colour="red"), b"{")
    again = parked(engine, tmp_path / "a.ndjson", post(colour="red"), b"{")
    assert first == again
    with engine.connect() as connection:
        listed = list_rejects(connection)
    assert [(row.line_number, row.times_seen) for row in listed] == [(2, 2), (1, 2)]
    assert listed[1].payload == line(post(colour="red"))
    assert "execution.colour" in listed[1].reason


def test_the_same_bad_post_sent_again_is_one_reject(engine: sa.Engine):
    ids = {post_execution(engine, post(colour="red"), received_at=NOW).reject_id for _ in range(3)}
    assert len(ids) == 1
    assert scalar(engine, "SELECT times_seen FROM telemetry_rejects") == 3


def test_the_list_is_bounded_and_by_status(engine: sa.Engine, tmp_path: Path):
    ids = parked(engine, tmp_path / "a.ndjson", *[b"{%d" % n for n in range(5)])
    with engine.begin() as connection:
        assert [row.id for row in list_rejects(connection, limit=2)] == ids[:-3:-1]
        assert discard(connection, ids[:2]) == 2
        assert [row.id for row in list_rejects(connection)] == ids[:1:-1]
        assert {row.id for row in list_rejects(connection, "discarded")} == set(ids[:2])
        assert len(list_rejects(connection, None)) == 5


def test_a_row_parked_for_a_fast_clock_lands_once_its_time_has_come(engine: sa.Engine, tmp_path: Path):
    fast = post(started_at="2026-02-15T20:00:00Z", completed_at=None)
    fast["reported_at"] = "2026-02-15T20:01:00Z"
    (reject_id,) = parked(engine, tmp_path / "a.ndjson", fast)
    report = retry(engine, now=NOW)
    assert (report.tried, report.accepted, report.refused) == (1, 0, Counter(future_event=1))
    report = retry(engine, now=LATER)
    assert (report.tried, report.accepted, report.refused) == (1, 1, Counter())
    assert rows(engine)["exec-1"]["created_at"] == NOW
    with engine.connect() as connection:
        (row,) = list_rejects(connection, "accepted")
    assert (row.id, row.execution_id) == (reject_id, "exec-1")
    assert row.retried_at is not None
    assert retry(engine, now=LATER).tried == 0


def test_a_retry_after_a_fix_in_the_database_lands_the_row(engine: sa.Engine, tmp_path: Path):
    post_execution(engine, post(hostname="WRONG"), received_at=NOW)
    ids = parked(engine, tmp_path / "a.ndjson", failed(reported=5))
    assert retry(engine, ids, now=NOW).refused == Counter(conflicting_identity=1)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE execution_telemetry SET hostname = 'NVDC01'"))
    assert retry(engine, ids, now=NOW).accepted == 1
    assert rows(engine)["exec-1"]["success"] is False


def test_csv_rows_can_be_retried_too(engine: sa.Engine, tmp_path: Path):
    header = "site_id,execution_id,hostname,runbook_id,success,started_at,resolution_level"
    (tmp_path / "a.csv").write_text(f"{header}\nsite,exec-1,NVDC01,L1-X,t,2026-02-15 20:00:00+00,L1\n")
    assert import_file(engine, tmp_path / "a.csv", received_at=NOW).reasons == Counter(future_event=1)
    assert retry(engine, now=LATER).accepted == 1
    assert rows(engine)["exec-1"]["success"] is True


def test_bytes_that_cannot_be_read_keep_their_first_reason(engine: sa.Engine, tmp_path: Path):
    path = tmp_path / "a.ndjson"
    path.write_bytes(b"\xff\n[]\n" + b"x" * 2_000_000 + b'\n{"cut')
    import_file(engine, path, received_at=NOW)
    before = scalar(engine, "SELECT string_agg(reason_code || reason, ';' ORDER BY id) FROM telemetry_rejects")
    assert retry(engine, now=LATER).refused == Counter(invalid_utf8=1, not_an_object=1, line_too_long=1, truncated=1)
    assert scalar(engine, "SELECT string_agg(reason_code || reason, ';' ORDER BY id) FROM telemetry_rejects") == before


def test_a_retry_goes_through_all_batches(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rejects, "_RETRY_ROWS", 3)
    monkeypatch.setattr(rejects, "_RETRY_BYTES", 1_000)
    fast = [post(f"exec-{n}", started_at="2026-02-15T20:00:00Z", completed_at=None) for n in range(10)]
    for row in fast:
        row["reported_at"] = "2026-02-15T20:01:00Z"
    parked(engine, tmp_path / "a.ndjson", *fast)
    report = retry(engine, now=LATER)
    assert (report.tried, report.accepted) == (10, 10)
    assert len(rows(engine)) == 10


def test_an_id_that_is_no_open_reject_is_named_and_nothing_happens(engine: sa.Engine, tmp_path: Path):
    (reject_id,) = parked(engine, tmp_path / "a.ndjson", b"{")
    with pytest.raises(UsageError, match="999"):
        retry(engine, [reject_id, 999])
    with engine.begin() as connection, pytest.raises(UsageError, match="999"):
        discard(connection, [reject_id, 999])
    with engine.begin() as connection:
        assert discard(connection, [reject_id]) == 1
        with pytest.raises(UsageError, match=str(reject_id)):
            discard(connection, [reject_id])


# -- purging -------------------------------------------------------------------------------------------------------

KEEP_DAYS = 90
PURGE = timedelta(days=KEEP_DAYS)


def decided(engine: sa.Engine, status: str, at: datetime | None, *, retried: datetime | None = None) -> int:
    """A reject of this status, decided then."""
    with engine.begin() as connection:
        return int(
            connection.execute(
                sa.text(
                    "INSERT INTO telemetry_rejects (source, line_number, reason_code, reason, payload, payload_bytes, "
                    "payload_hash, status, decided_at, retried_at, received_at) "
                    "VALUES ('f', (SELECT count(*) FROM telemetry_rejects), 'invalid_json', 'no JSON', '{', 1, 'hash', "
                    ":status, :at, :retried, '2020-01-01Z') RETURNING id"
                ),
                {"status": status, "at": at, "retried": retried},
            ).scalar_one()
        )


def purged(engine: sa.Engine, now: datetime | None = NOW, keep_days: int = KEEP_DAYS) -> tuple[int, int]:
    """Purge; return how many accepted and discarded rejects went."""
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL lock_timeout = '10s'"))  # it waits for nobody
        report = purge(connection, keep_days=keep_days, actor="dana", now=now)
    return report.accepted, report.discarded


def left(engine: sa.Engine) -> set[int]:
    with engine.connect() as connection:
        return set(connection.execute(sa.text("SELECT id FROM telemetry_rejects")).scalars())


def test_what_was_decided_longer_ago_than_it_is_kept_goes_and_is_on_record(engine: sa.Engine):
    instant = timedelta(microseconds=1)
    stays = {
        decided(engine, "open", None),
        decided(engine, "accepted", NOW - PURGE),  # not longer ago
        decided(engine, "discarded", NOW - PURGE + instant),
        decided(engine, "discarded", NOW),
    }
    for status in ("accepted", "discarded", "discarded"):
        decided(engine, status, NOW - PURGE - instant)
    assert purged(engine) == (1, 2)
    assert left(engine) == stays
    with engine.connect() as connection:
        record = connection.execute(sa.text("SELECT actor, decided_before, accepted, discarded FROM reject_purges"))
        assert [tuple(row) for row in record] == [("dana", NOW - PURGE, 1, 2)]
    assert purged(engine) == (0, 0)
    assert scalar(engine, "SELECT count(*) FROM reject_purges") == 1
    assert purged(engine, NOW + instant) == (1, 0)


def ago(age: timedelta | None) -> datetime | None:
    return None if age is None else NOW - age


AGES = st.one_of(st.none(), st.timedeltas(min_value=timedelta(0), max_value=2 * PURGE))
REJECTS = st.lists(st.tuples(st.sampled_from(["open", "accepted", "discarded"]), AGES, AGES), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(given_=[("open", 2 * PURGE, 2 * PURGE)], keep_days=1)
@given(given_=REJECTS, keep_days=st.integers(1, KEEP_DAYS))
def test_open_rejects_survive_every_purge_and_what_went_adds_up(
    engine: sa.Engine, given_: list[tuple[str, timedelta | None, timedelta | None]], keep_days: int
):
    with engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE telemetry_rejects, reject_purges"))
    expected = set()
    for status, age, retried in given_:
        id_ = decided(engine, status, ago(age), retried=ago(retried))
        known = age if age is not None else retried if status == "accepted" else None
        if status == "open" or known is None or known <= timedelta(days=keep_days):
            expected.add(id_)
    accepted, discarded = purged(engine, keep_days=keep_days)
    assert left(engine) == expected
    assert len(given_) == len(expected) + accepted + discarded
    # A decision without a date counts from the purge that found it.
    opened = {
        id_ for id_ in expected if scalar(engine, f"SELECT status FROM telemetry_rejects WHERE id = {id_}") == "open"
    }
    assert purged(engine, keep_days=keep_days) == (0, 0)
    purged(engine, NOW + timedelta(days=keep_days, seconds=1), keep_days)
    assert left(engine) == opened
    assert len(given_) - len(opened) == (scalar(engine, "SELECT sum(accepted + discarded) FROM reject_purges") or 0)


def test_a_decision_is_dated_when_it_is_made_and_not_when_the_row_came(engine: sa.Engine, tmp_path: Path):
    fast = post(started_at="2026-02-15T20:00:00Z", completed_at=None)
    fast["reported_at"] = "2026-02-15T20:01:00Z"
    first, second, third = parked(engine, tmp_path / "a.ndjson", fast, b"{", b"[")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE telemetry_rejects SET received_at = '2020-01-01Z'"))
    begun = scalar(engine, "SELECT clock_timestamp()")
    assert retry(engine, [first, second], now=LATER).accepted == 1
    with engine.begin() as connection:
        discard(connection, [third])
    with engine.connect() as connection:
        dates = {row.id: row.decided_at for row in list_rejects(connection, None)}
    assert dates[second] is None
    assert begun <= dates[first] <= dates[third]
    assert purged(engine, dates[first] + PURGE) == (0, 0)
    assert purged(engine, dates[third] + PURGE + timedelta(seconds=1)) == (1, 1)
    assert left(engine) == {second}
    # What the accepted one became stays, and the open one can still be tried, and decided.
    assert rows(engine)["exec-1"]["created_at"] is not None
    assert retry(engine, now=LATER).tried == 1
    with engine.begin() as connection:
        assert discard(connection, [second]) == 1


def test_the_bytes_of_a_purged_reject_sent_again_are_a_new_open_reject(engine: sa.Engine):
    first = post_execution(engine, post(colour="red"), received_at=NOW).reject_id
    assert first is not None
    with engine.begin() as connection:
        discard(connection, [first])
    assert post_execution(engine, post(colour="red"), received_at=NOW).reject_id == first  # as long as it is on record
    assert purged(engine, scalar(engine, "SELECT now()") + PURGE) == (0, 1)
    again = post_execution(engine, post(colour="red"), received_at=NOW).reject_id
    assert again not in (None, first)
    with engine.connect() as connection:
        assert [row.id for row in list_rejects(connection)] == [again]
    with pytest.raises(UsageError, match=str(first)):
        retry(engine, [first])


def refused_batch(connection: sa.Connection) -> None:
    now = datetime.now(UTC)
    payload = b"{" + b"x" * 5_000
    reporter = Reporter("site-a-01", frozenset({SITE}))
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    take_batch(driver, [payload], parse_batch([payload], received_at=now), reporter, received_at=now)


def test_a_reject_that_is_being_sent_again_is_left_to_the_next_purge(engine: sa.Engine):
    with engine.begin() as connection:
        refused_batch(connection)
    with engine.begin() as connection:
        discard(connection, list(left(engine)))
    later = scalar(engine, "SELECT now()") + PURGE
    with engine.begin() as sending:
        refused_batch(sending)
        assert purged(engine, later) == (0, 0)
    assert scalar(engine, "SELECT times_seen FROM telemetry_rejects") == 2
    assert purged(engine, later) == (0, 1)


def test_a_batch_that_meets_a_purge_at_work_keeps_the_bound(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch):
    with engine.begin() as connection:
        refused_batch(connection)
    with engine.begin() as connection:
        discard(connection, list(left(engine)))
    monkeypatch.setattr(batch, "KEPT_BYTES", 2_000)  # less than the payload: it is kept whole no more

    def send() -> None:
        with engine.begin() as connection:
            refused_batch(connection)

    sender = threading.Thread(target=send)
    with engine.begin() as purging:
        report = purge(purging, keep_days=1, actor="dana", now=datetime.now(UTC) + PURGE)
        assert report.discarded == 1
        sender.start()
        deadline = time.monotonic() + 30
        with engine.connect() as watcher:
            while time.monotonic() < deadline and sender.is_alive():
                if watcher.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one():
                    break
                watcher.rollback()
    sender.join()
    with engine.connect() as connection:
        (row,) = list_rejects(connection)
    assert (len(row.payload), row.payload_bytes, row.times_seen) == (1_024, 5_001, 1)
