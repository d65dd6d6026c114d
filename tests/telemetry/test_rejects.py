"""Rejects at rest: listing, retrying, discarding."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from posts import NOW, failed, line, ndjson, post, rows, scalar

from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.telemetry import rejects
from flywheel_pipeline.telemetry.intake import import_file, post_execution
from flywheel_pipeline.telemetry.rejects import discard, list_rejects, retry

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
