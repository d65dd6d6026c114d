"""An archive in a bucket, over HTTP: the same as on a folder, and a store that fails is said in one sentence."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
import s3fs
import sqlalchemy as sa
from archived_fleet import DAY, NOON, TODAY, in_archive, in_postgresql, row, settle, state_of, write

from flywheel_pipeline.aggregates.refresh import purge
from flywheel_pipeline.archive.days import State
from flywheel_pipeline.archive.errors import ArchivedFileLost, ArchiveUnreachable
from flywheel_pipeline.archive.export import export_day, export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.archive.sweep import sweep
from flywheel_pipeline.engines.duck import DuckEngine
from flywheel_pipeline.engines.rebuild import rebuild
from flywheel_pipeline.engines.work import Computation


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of its own process that speaks S3; it chose its port, and says so in its log."""
    log = tmp_path_factory.mktemp("store") / "server.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 90
        while (found := re.search(r"Running on (http://\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, and the environment by which a client finds it."""
    _client(monkeypatch, store)
    name = f"fleet-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    return name


def _client(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "of-no-importance",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_day_lives_its_whole_life_in_a_bucket(engine: sa.Engine, bucket: str) -> None:
    write(engine, row(), row(site_id="site-ü", error_message="Zugriff verweigert\x1b[31m"), row(success=False))
    write(engine, row(at=NOON + dt.timedelta(days=1)))  # a purge keeps the last day
    settle(engine)
    archive = Archive.open(f"s3://{bucket}/flywheel", create=True)
    export_due(engine, archive, today=TODAY, after_days=1)
    assert state_of(engine, archive).state is State.ARCHIVED

    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE execution_telemetry SET success = true WHERE NOT success")
    settle(engine)
    assert state_of(engine, archive).state is State.CORRECTED
    (exported,) = export_due(engine, archive, today=TODAY, after_days=1).exported
    assert exported.replaced
    swept = sweep(engine, archive, grace_hours=0)
    assert len(swept) == 1  # the executions of the first generation; there were no corrections then
    manifest = archive.verify(DAY)
    assert [f"{file.table} {file.rows}" for file in manifest.files_] == ["executions 3", "corrections 1"]

    with engine.connect() as connection:
        before = {table: in_postgresql(connection, table) for table in ("executions", "corrections")}
        cells = connection.exec_driver_sql("SELECT * FROM rule_daily_stats ORDER BY 1, 2, 3").all()
    purge(engine, before=DAY + dt.timedelta(days=1), actor="tester", archive=archive)
    assert state_of(engine, archive).state is State.SEALED
    assert {table: in_archive(archive, table) for table in before} == before

    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM rule_daily_stats")
    rebuild(engine, Computation(DuckEngine(), archive))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT * FROM rule_daily_stats ORDER BY 1, 2, 3").all() == cells

    archive.fs.rm_file(archive.full_path(manifest.files("executions")[0].path))
    with pytest.raises(ArchivedFileLost):
        archive.verify(DAY)
    assert state_of(engine, archive).state is State.LOST


def test_a_misspelt_bucket_is_refused_and_not_made(engine: sa.Engine, bucket: str) -> None:
    write(engine, row())
    settle(engine)
    archive = Archive.open(f"s3://{bucket}-misspelt/flywheel", create=True)
    with pytest.raises(
        ArchiveUnreachable, match=r"refused the file executions/day=2026-02-02/.* bucket does not exist"
    ):
        export_day(engine, archive, DAY)
    assert f"{bucket}-misspelt" not in archive.fs.ls("")


def test_a_bucket_that_goes_in_mid_export_holds_no_day(engine: sa.Engine, bucket: str) -> None:
    write(engine, row())
    settle(engine)
    archive = Archive.open(f"s3://{bucket}/flywheel", create=True)
    with pytest.raises(ArchiveUnreachable, match="bucket does not exist"):
        export_day(engine, archive, DAY, progress=lambda _day, _rows, _of: archive.fs.rmdir(bucket))
    archive.fs.mkdir(bucket)
    assert archive.days() == []
    assert state_of(engine, archive).state is State.DUE
    assert export_day(engine, archive, DAY).rows == 1


def test_a_store_that_does_not_answer_is_said(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    write(engine, row())
    settle(engine)
    _client(monkeypatch, "http://127.0.0.1:9")
    archive = Archive.open("s3://fleet/flywheel", create=True)
    refused = r"The archive s3://fleet/flywheel cannot be used: EndpointConnectionError: Could not connect"
    with pytest.raises(ArchiveUnreachable, match=refused) as caught:
        archive.days()
    assert caught.value.hint is not None
    for attempt in (
        lambda: archive.verify(DAY),
        lambda: archive.walk("executions"),
        lambda: state_of(engine, archive),
        lambda: export_day(engine, archive, DAY),
        lambda: sweep(engine, archive),
        lambda: rebuild(engine, Computation(DuckEngine(), Archive.open("s3://fleet/flywheel"))),
    ):
        with pytest.raises(ArchiveUnreachable):
            attempt()
