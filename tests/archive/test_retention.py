"""Telemetry goes only where the archive holds it, and archived and live rows are all there ever were."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from archived_fleet import DAY, NOON, TODAY, in_archive, in_postgresql, row, settle, state_of, write

from flywheel_pipeline.aggregates.refresh import purge
from flywheel_pipeline.archive.days import State
from flywheel_pipeline.archive.errors import NothingToArchive, NotSafelyArchived
from flywheel_pipeline.archive.export import export_day, export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.archive.quality import archived_and_live_are_all
from flywheel_pipeline.archive.sweep import sweep
from flywheel_pipeline.quality import Finding

BEFORE = DAY + dt.timedelta(days=3)


@pytest.fixture
def fleet(engine: sa.Engine) -> sa.Engine:
    """Two executions a day for five days, one corrected, one synthetic, one by a wrong clock; all counted."""
    for day in range(5):
        at = NOON + dt.timedelta(days=day)
        write(engine, row(at=at, execution_id=f"good {day}"), row(at=at, hostname="h2", success=False))
    write(engine, row(chaos_campaign_id="c"), row(created_at=NOON - dt.timedelta(hours=1)))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = false WHERE execution_id = 'good 1'")
    settle(engine)
    return engine


def found(engine: sa.Engine, archive: Archive | None) -> Finding:
    with engine.connect() as connection:
        return archived_and_live_are_all(connection, archive, today=TODAY, after_days=1)


def live(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one())


def test_what_is_archived_may_be_purged_and_stays_readable_as_it_was(fleet: sa.Engine, archive: Archive) -> None:
    assert found(fleet, archive).figures["days_to_export"] == 5
    export_due(fleet, archive, today=TODAY, after_days=1)
    with fleet.connect() as connection:
        before = {day: in_postgresql(connection, "executions", DAY + dt.timedelta(days=day)) for day in range(3)}
    assert sum(purge(fleet, before=BEFORE, actor="test", archive=archive).values()) == 8
    assert live(fleet) == 4
    for day, rows in before.items():
        assert in_archive(archive, "executions", DAY + dt.timedelta(days=day)) == rows
    assert state_of(fleet, archive).state is State.SEALED
    all_of_it = found(fleet, archive)
    assert all_of_it.passed, all_of_it
    assert {name: all_of_it.figures[name] for name in ("live_rows", "archived_alone_rows", "all_time_rows")} == {
        "live_rows": 4,
        "archived_alone_rows": 8,
        "all_time_rows": 12,
    }
    # Neither an export nor a sweep touches what lies in the archive alone.
    with pytest.raises(NothingToArchive, match="was purged"):
        export_day(fleet, archive, DAY)
    assert (
        export_due(fleet, archive, today=TODAY, after_days=1, again=True, to_day=BEFORE - dt.timedelta(days=1)).exported
        == ()
    )
    assert sweep(fleet, archive, grace_hours=0) == []
    assert purge(fleet, before=BEFORE, actor="test", archive=archive) == {}
    assert not found(fleet, None).passed


def lose(archive: Archive) -> None:
    archive.fs.rm_file(archive.full_path(archive.manifest(DAY).files("executions")[0].path))


def spoil(archive: Archive) -> None:
    path = archive.full_path(archive.manifest(DAY).files("executions")[0].path)
    content = archive.fs.cat_file(path)
    archive.fs.pipe_file(path, content[:100] + bytes([content[100] ^ 1]) + content[101:])


def drop_manifest(archive: Archive) -> None:
    archive.fs.rm_file(archive.full_path(archive.manifest_path(DAY)))


@pytest.mark.parametrize(
    ("harm", "words"),
    [(lose, "which is not there"), (spoil, "its SHA-256 differs"), (drop_manifest, "did not finish")],
)
def test_a_purge_refuses_what_the_archive_does_not_hold_whole(
    fleet: sa.Engine, archive: Archive, harm: Callable[[Archive], None], words: str
) -> None:
    with pytest.raises(NotSafelyArchived, match="2026-02-02 is not in the archive"):
        purge(fleet, before=BEFORE, actor="test", archive=archive)
    export_due(fleet, archive, today=TODAY, after_days=1)
    harm(archive)
    with pytest.raises(NotSafelyArchived, match=words):
        purge(fleet, before=BEFORE, actor="test", archive=archive)
    assert live(fleet) == 12
    assert (
        sum(purge(fleet, before=DAY, actor="test", archive=archive).values()) == 0
    )  # nothing older: nothing to refuse


def test_a_purge_refuses_a_day_that_was_corrected_since(fleet: sa.Engine, folder: Archive) -> None:
    export_due(fleet, folder, today=TODAY, after_days=1)
    with fleet.begin() as connection:
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = false WHERE execution_id = 'good 2'")
    settle(fleet)
    with pytest.raises(NotSafelyArchived, match="2026-02-04: Its telemetry changed after it was exported"):
        purge(fleet, before=BEFORE, actor="test", archive=folder)
    assert [made.day for made in export_due(fleet, folder, today=TODAY, after_days=1).exported] == [
        BEFORE - dt.timedelta(days=1)
    ]
    assert sum(purge(fleet, before=BEFORE, actor="test", archive=folder).values()) == 8


def test_a_purged_day_that_is_lost_or_exchanged_is_an_offence(fleet: sa.Engine, folder: Archive) -> None:
    export_due(fleet, folder, today=TODAY, after_days=1)
    purge(fleet, before=BEFORE, actor="test", archive=folder)
    manifest = folder.manifest(DAY)
    folder.publish(manifest.model_copy(update={"generation": "another"}))
    finding = found(fleet, folder)
    assert (finding.passed, finding.offenders) == (False, 1)
    assert "generation another" in finding.sentence
    folder.publish(manifest)
    assert found(fleet, folder).passed
    lose(folder)
    finding = found(fleet, folder)
    assert (finding.passed, finding.sample[0]["day"]) == (False, "2026-02-02")


def test_a_sweep_leaves_the_files_of_a_purged_day_whose_manifest_is_lost_or_another(
    fleet: sa.Engine, archive: Archive
) -> None:
    export_due(fleet, archive, today=TODAY, after_days=1)
    export_day(fleet, archive, DAY)  # a second generation: the first one is remains
    purge(fleet, before=BEFORE, actor="test", archive=archive)
    manifest = archive.manifest(DAY)
    text = archive.fs.cat_file(archive.full_path(archive.manifest_path(DAY)))
    archive.publish(manifest.model_copy(update={"generation": "another", "files_": (), "rows": 0}))
    assert state_of(fleet, archive).state is State.LOST
    swept = sweep(fleet, archive, grace_hours=0)
    assert len(swept) == 1
    assert manifest.generation not in swept[0].path
    drop_manifest(archive)
    assert sweep(fleet, archive, grace_hours=0) == []
    archive.fs.pipe_file(archive.full_path(archive.manifest_path(DAY)), text)
    archive.verify(DAY)
    assert state_of(fleet, archive).state is State.SEALED


def test_days_purged_before_there_was_an_archive_count_by_their_figures(fleet: sa.Engine, folder: Archive) -> None:
    purge(fleet, before=BEFORE, actor="test")
    export_due(fleet, folder, today=TODAY, after_days=1)
    finding = found(fleet, folder)
    assert finding.passed, finding
    assert finding.figures["purged_unarchived_rows"] == 8
    assert state_of(fleet, folder).state is State.PURGED
    assert found(fleet, None).passed


def test_rows_that_are_counted_nowhere_are_an_offence(fleet: sa.Engine, folder: Archive) -> None:
    assert found(fleet, folder).passed
    with fleet.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("DELETE FROM execution_telemetry WHERE execution_id = 'good 0'")
    finding = found(fleet, folder)
    assert not finding.passed
    assert "3 rows are there, 4 are counted" in finding.sentence
