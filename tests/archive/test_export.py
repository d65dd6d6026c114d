"""What is exported is the day, exactly: every value, every row, and nothing of another day."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from archived_fleet import DAY, NOON, TODAY, in_archive, in_postgresql, row, settle, state_of, write

from flywheel_pipeline.aggregates.refresh import rebuild
from flywheel_pipeline.archive import columns, parquet
from flywheel_pipeline.archive.days import State
from flywheel_pipeline.archive.errors import ArchiveUnreachable, NothingToArchive, NotRepresentable
from flywheel_pipeline.archive.export import export_day, export_due
from flywheel_pipeline.archive.layout import SCHEMA_VERSION, TABLES, Archive
from flywheel_pipeline.archive.sweep import sweep
from flywheel_pipeline.errors import DatabaseUnavailable

MIDNIGHT = dt.datetime(2026, 2, 2, tzinfo=dt.UTC)
LAST_MOMENT = MIDNIGHT + dt.timedelta(days=1, microseconds=-1)


def odd_rows() -> list[dict[str, Any]]:
    """Rows whose values are easily lost: empty and null, Unicode, exact decimals, JSON as written, the edges of the day."""
    return [
        row(at=MIDNIGHT, execution_id="first moment", error_message="", human_feedback=None),
        row(at=LAST_MOMENT, execution_id="last moment", error_message="naïve 修复 \U0001f9ef e\u0301 \"'\t\r\n,\\N"),
        row(at=MIDNIGHT - dt.timedelta(microseconds=1), execution_id="the day before"),
        row(at=MIDNIGHT + dt.timedelta(days=1), execution_id="the day after"),
        row(started_at=None, completed_at=NOON, execution_id="by its end"),
        row(started_at=None, completed_at=None, created_at=NOON, execution_id="by its arrival"),
        row(cost_usd=Decimal("123456.000001"), input_tokens=2**31 - 1, duration_seconds=0.1, confidence=float("nan")),
        row(cost_usd=Decimal("-0.000001"), duration_seconds=float("inf"), verification_passed=None, success=False),
        row(state_before=sa.text("""'{"b": 1.50, "a": 12345678901234567890.10, "é": "\\u0041 ü"}'::jsonb""")),
        row(
            tags={"synthetic": True},
            chaos_campaign_id="c-1",
            executed_steps=[1, None, "x"],
            state_diff=sa.text("'null'::jsonb"),
        ),
        row(at=dt.datetime(2026, 2, 3, 1, 30, tzinfo=dt.timezone(dt.timedelta(hours=2))), execution_id="local time"),
    ]


def test_every_value_of_every_column_comes_back_exactly(engine: sa.Engine, archive: Archive) -> None:
    write(engine, *odd_rows())
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE execution_telemetry SET success = NOT success, error_message = 'ü' WHERE cost_usd > 0")
        )
    settle(engine)
    made = export_day(engine, archive, DAY)
    assert (made.rows, made.corrections, made.replaced) == (9, 1, False)
    with engine.connect() as connection:
        for table in TABLES:
            held = in_archive(archive, table)
            assert repr(held) == repr(in_postgresql(connection, table))  # by their text: NaN is not itself
    names = {values["execution_id"] for values in in_archive(archive, "executions")}
    assert names >= {"first moment", "last moment", "by its end", "by its arrival", "local time"}
    assert not names & {"the day before", "the day after"}
    manifest = Archive.open(archive.fs.unstrip_protocol(archive.root)).verify(DAY)
    assert manifest.control["executions"]["cost_usd"] == 2
    assert manifest.columns["executions"]["cost_usd"] == "decimal128(12, 6)"


@pytest.mark.parametrize("first", [5 * 10**18, -(2**63), 2**63 - 5])
def test_ids_whose_sum_is_more_than_a_bigint_add_up(engine: sa.Engine, archive: Archive, first: int) -> None:
    write(engine, *(row(id=first + number, execution_id=f"large {number}") for number in range(5)))
    settle(engine)
    assert export_day(engine, archive, DAY).rows == 5
    assert archive.verify(DAY).control["executions"]["ids"] == 5 * first + 10
    with engine.connect() as connection:
        assert in_archive(archive, "executions") == in_postgresql(connection, "executions")


def test_the_columns_of_this_schema_version_are_these() -> None:
    # Another column or type is another SCHEMA_VERSION, which older releases refuse to read.
    assert SCHEMA_VERSION == 1
    assert len(columns.described("executions")) == 45
    assert columns.described("corrections") == {
        "day": "date32[day]",
        "id": "int64",
        "execution_id": "string",
        "corrected_at": "timestamp[us, tz=UTC]",
        "before": "string",
        "after": "string",
    }
    kinds: dict[str, set[str]] = {}
    for name, kind in columns.described("executions").items():
        kinds.setdefault(kind, set()).add(name)
    assert kinds.pop("string") >= {
        "state_before",
        "state_after",
        "state_diff",
        "executed_steps",
        "tags",
        "execution_id",
    }
    assert kinds == {
        "date32[day]": {"day"},
        "int64": {"id"},
        "int32": {"error_step", "retry_count", "input_tokens", "output_tokens"},
        "double": {"duration_seconds", "confidence"},
        "decimal128(12, 6)": {"cost_usd"},
        "timestamp[us, tz=UTC]": {"started_at", "completed_at", "created_at", "reported_at", "event_at"},
        "bool": {
            "success",
            "verification_passed",
            "was_correct_runbook",
            "was_correct_diagnosis",
            "manual_intervention_needed",
        },
    }


def test_a_type_without_an_exact_arrow_type_is_refused() -> None:
    for kind in (sa.Numeric(), sa.Interval()):
        with pytest.raises(TypeError, match="exact"):
            columns.arrow_type(sa.Column("x", kind))


def test_a_day_is_exported_once_it_is_closed_and_again_once_it_is_corrected(
    engine: sa.Engine, archive: Archive
) -> None:
    young = TODAY - dt.timedelta(days=1)
    write(engine, row(execution_id="x"), row(at=NOON + dt.timedelta(days=1)), row(at=NOON + (young - DAY)))
    assert {state_of(engine, archive, day).state for day in (DAY, DAY + dt.timedelta(days=1))} == {State.WAITING}
    settle(engine)
    assert state_of(engine, archive).state is State.DUE
    report = export_due(engine, archive, today=TODAY, after_days=1)
    assert [made.day for made in report.exported] == [DAY, DAY + dt.timedelta(days=1)]
    assert report.left == {young: "It is too young to be closed."}
    assert archive.days() == [DAY, DAY + dt.timedelta(days=1)]
    assert export_due(engine, archive, today=TODAY, after_days=1).exported == ()

    first = archive.manifest(DAY)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = false WHERE execution_id = 'x'")
    assert state_of(engine, archive).state is State.WAITING
    with pytest.raises(NothingToArchive, match="wait for a refresh"):
        export_day(engine, archive, DAY)
    settle(engine)
    assert state_of(engine, archive).state is State.CORRECTED
    assert archive.manifest(DAY) == first  # it stays readable until it is exchanged
    (made,) = export_due(engine, archive, today=TODAY, after_days=1).exported
    assert (made.day, made.replaced, made.corrections) == (DAY, True, 1)
    assert [values["success"] for values in in_archive(archive, "executions")] == [False]
    assert state_of(engine, archive).state is State.ARCHIVED

    replaced = {file.path for file in first.files_}
    assert sweep(engine, archive) == []  # somebody may still read what was exchanged a moment ago
    assert {remains.path for remains in sweep(engine, archive, grace_hours=0, dry_run=True)} == replaced
    assert {remains.path for remains in sweep(engine, archive, grace_hours=0)} == replaced
    assert sweep(engine, archive, grace_hours=0) == []
    archive.verify(DAY)


def test_what_only_changes_how_rows_are_read_corrects_no_archived_day(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row())
    settle(engine)
    export_due(engine, folder, today=TODAY, after_days=1)
    rebuild(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO rule_aliases (alias, rule_id, actor, reason) VALUES ('L1-SSH-001', 'L1-OTHER', 'test', 'test')"
        )
        connection.exec_driver_sql("SELECT flywheel_touch_all()")
    assert state_of(engine, folder).state is State.WAITING
    settle(engine)
    assert state_of(engine, folder).state is State.ARCHIVED


def test_a_row_that_moves_to_another_day_corrects_both(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row(execution_id="mover"), row(at=NOON + dt.timedelta(days=1)))
    settle(engine)
    export_due(engine, folder, today=TODAY, after_days=1)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE execution_telemetry SET started_at = started_at + interval '1 day' WHERE execution_id = 'mover'"
        )
    settle(engine)
    report = export_due(engine, folder, today=TODAY, after_days=1)
    assert [(made.rows, made.corrections) for made in report.exported] == [(0, 0), (2, 1)]
    assert folder.manifest(DAY).files_ == ()
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM execution_telemetry")
    settle(engine)
    assert [made.rows for made in export_due(engine, folder, today=TODAY, after_days=1).exported] == [0]


@pytest.mark.parametrize(
    "fields", [{"cost_usd": "NaN"}, {"completed_at": "infinity"}, {"reported_at": "0044-03-15 12:00 BC"}]
)
def test_what_no_file_can_hold_is_named_and_nothing_is_published(
    engine: sa.Engine, folder: Archive, fields: dict[str, Any]
) -> None:
    ((column, value),) = fields.items()
    write(engine, row(execution_id="odd one"), row())
    with engine.begin() as connection:
        kind = columns.SOURCES["executions"].columns[column].type.compile(connection.dialect)
        connection.execute(
            sa.text(f"UPDATE execution_telemetry SET {column} = CAST(:value AS {kind}) WHERE execution_id = 'odd one'"),
            {"value": value},
        )
    settle(engine)
    with pytest.raises(NotRepresentable, match="odd one"):
        export_day(engine, folder, DAY)
    assert folder.days() == []


def test_a_large_day_is_several_files_of_several_row_groups(
    engine: sa.Engine, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    monkeypatch.setattr(parquet, "FILE_BYTES", 1)
    monkeypatch.setattr("flywheel_pipeline.archive.stream.BATCH_BYTES", 4000)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, started_at, error_message) "
            "SELECT 'e' || n, 's', 'L1-X', 'h', true, '2026-02-02 12:00+00', repeat('x', n) FROM generate_series(1, 200) AS n"
        )
    settle(engine)
    seen: list[int] = []
    made = export_day(engine, archive, DAY, progress=lambda _day, rows, of: seen.append(rows if of == 200 else -1))
    assert made.files == len(archive.manifest(DAY).files("executions")) > 3
    assert seen == sorted(seen)
    assert seen[-1] == 200
    with engine.connect() as connection:
        assert in_archive(archive, "executions") == in_postgresql(connection, "executions")
    archive.verify(DAY)


def test_rows_written_past_the_outbox_are_seen_by_their_number(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row())
    settle(engine)
    export_due(engine, folder, today=TODAY, after_days=1)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.execute(sa.insert(columns.SOURCES["executions"]).values(row()))
    found = state_of(engine, folder)
    assert found.state is State.CORRECTED
    assert "1 rows of it and the database 2" in found.reason


def test_a_file_system_that_refuses_leaves_the_old_day(engine: sa.Engine, folder: Archive) -> None:
    write(engine, row())
    settle(engine)
    export_day(engine, folder, DAY)
    before = folder.verify(DAY)
    Path(folder.root, "executions", f"day={DAY}").rename(Path(folder.root, "aside"))
    Path(folder.root, "executions", f"day={DAY}").write_text("a file where a folder should be")
    with pytest.raises(ArchiveUnreachable, match="refused the file executions/day=2026-02-02/"):
        export_day(engine, folder, DAY)
    Path(folder.root, "executions", f"day={DAY}").unlink()
    Path(folder.root, "aside").rename(Path(folder.root, "executions", f"day={DAY}"))
    assert folder.verify(DAY) == before


def test_a_database_that_breaks_off_leaves_the_old_day(
    engine: sa.Engine, folder: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1 << 20)
    monkeypatch.setattr("flywheel_pipeline.archive.stream.BATCH_BYTES", 1 << 20)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, started_at, error_message) "
            "SELECT 'e' || n, 's', 'L1-X', 'h', true, '2026-02-02 12:00+00', repeat(md5(n::text), 100) FROM generate_series(1, 4000) AS n"
        )
    settle(engine)
    killer = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")

    def break_off(_day: dt.date, _rows: int, _of: int) -> None:
        with killer.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND query ILIKE '%%COPY%%' AND pid <> pg_backend_pid()"
            )

    with pytest.raises(DatabaseUnavailable, match="broke off the export"):
        export_day(engine, folder, DAY, progress=break_off)
    killer.dispose()
    assert folder.days() == []
    assert export_day(engine, folder, DAY).rows == 4000
