"""Archived days, live days and purged days through an engine; and what is refused, with nothing half-written."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from digits import NOON, SECRETS, archive_with_secrets, contents, differences, empty, row, write

from flywheel_pipeline.aggregates import refresh
from flywheel_pipeline.aggregates.refresh import lock_refresh
from flywheel_pipeline.archive.errors import ArchivedFileLost, DayNotArchived, ManifestFromTheFuture
from flywheel_pipeline.archive.export import export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.engines.choose import chosen_computation
from flywheel_pipeline.engines.duck import DuckEngine
from flywheel_pipeline.engines.errors import EngineError, EngineNotInstalled, EngineUnreachable
from flywheel_pipeline.engines.job import Job
from flywheel_pipeline.engines.plan import Step
from flywheel_pipeline.engines.rebuild import rebuild
from flywheel_pipeline.engines.spark import SparkEngine, check_master
from flywheel_pipeline.engines.work import Computation
from flywheel_pipeline.errors import DatabaseUnavailable, FlywheelError, UsageError

DAYS = [NOON + dt.timedelta(days=n) for n in range(4)]
TODAY = DAYS[-1].date()  # the last of them is open


@pytest.fixture
def archived(engine: sa.Engine, tmp_path: Path) -> Archive:
    """Four days, of which the first three are archived; each success but the last comes back within a day."""
    write(engine, [row(at=at + dt.timedelta(hours=n), hostname=f"host-{n % 3}") for at in DAYS for n in range(9)])
    refresh.rebuild(engine)
    archive = Archive.open(tmp_path / "archive", create=True)
    report = export_due(engine, archive, today=TODAY, after_days=0)
    assert len(report.exported) == 3
    return archive


def test_archived_and_live_days_are_all_days(engine: sa.Engine, archived: Archive) -> None:
    assert differences(engine, DuckEngine(), archived) == {}


def test_a_day_that_was_corrected_since_is_read_from_postgresql(engine: sa.Engine, archived: Archive) -> None:
    with engine.begin() as connection:
        changed = connection.exec_driver_sql(
            "UPDATE execution_telemetry SET success = false, verification_passed = false WHERE hostname = 'host-1'"
        ).rowcount
    assert changed == 12
    assert differences(engine, DuckEngine(), archived) == {}


def test_purged_days_are_rebuilt_from_the_archive_and_read_their_aliases_anew(
    engine: sa.Engine, archived: Archive
) -> None:
    before = contents(engine)
    refresh.purge(engine, before=DAYS[2].date(), actor="test", archive=archived)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one() == 18
    empty(engine)
    refresh.rebuild(engine)
    assert contents(engine) != before  # PostgreSQL alone cannot
    rebuild(engine, Computation(DuckEngine(), archived))
    assert contents(engine) == before
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('site-a', 'site-z', 'test', 'test')"
        )
    rebuild(engine, Computation(DuckEngine(), archived))
    with engine.begin() as connection:
        named = connection.exec_driver_sql("SELECT DISTINCT site_id, day FROM episodes ORDER BY day").all()
        assert [(name, day) for name, day in named] == [("site-z", at.date()) for at in DAYS]
        connection.exec_driver_sql("DELETE FROM site_aliases")
    rebuild(engine, Computation(DuckEngine(), archived))
    assert contents(engine) == before


def test_one_site_and_its_days_alone_are_set(engine: sa.Engine, archived: Archive) -> None:
    right = contents(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE episodes SET executions = executions + 1")
    rebuild(engine, Computation(DuckEngine(), archived), site="site-a", from_day=DAYS[1].date(), to_day=DAYS[1].date())
    with engine.begin() as connection:
        wrong = connection.exec_driver_sql("SELECT DISTINCT day FROM episodes WHERE executions > 3").scalars().all()
    # The day before is set too: what happened on a day decides whether a success of the day before held.
    assert sorted(wrong) == [DAYS[2].date(), DAYS[3].date()]
    rebuild(engine, Computation(DuckEngine(), archived))
    assert contents(engine) == right


def _refused(engine: sa.Engine, computation: Computation, expected: type[FlywheelError]) -> str:
    """The one sentence of a rebuild that fails, after which everything is as it was."""
    before = contents(engine)
    with pytest.raises(expected) as refused:
        rebuild(engine, computation)
    assert contents(engine) == before
    assert refused.value.hint
    return refused.value.message


def test_a_lost_file_of_the_archive_is_named_and_nothing_is_written(engine: sa.Engine, archived: Archive) -> None:
    (file,) = archived.manifest(DAYS[1].date()).files("executions")
    assert file.local_path is not None
    file.local_path.unlink()
    assert file.path in _refused(engine, Computation(DuckEngine(), archived), ArchivedFileLost)


def test_a_file_that_is_no_parquet_is_one_sentence_and_nothing_is_written(engine: sa.Engine, archived: Archive) -> None:
    (file,) = archived.manifest(DAYS[1].date()).files("executions")
    assert file.local_path is not None
    file.local_path.write_bytes(b"x" * file.bytes)
    said = _refused(engine, Computation(DuckEngine(), archived), EngineError)
    assert said.startswith("DuckDB could not compute the models: ")


def lose(archive: Archive, path: str) -> None:
    archive.fs.rm_file(path)


def spoil(archive: Archive, path: str) -> None:
    archive.fs.pipe_file(path, b"x" * archive.fs.size(path))


def spoil_a_late_column(archive: Archive, path: str) -> None:
    """What is read only as the rows are landed: the ends of executions, for the violations."""
    content = bytearray(archive.fs.cat_file(path))
    with archive.fs.open(path, "rb") as stream:
        group = pq.ParquetFile(stream).metadata.row_group(0)
    (column,) = (c for n in range(group.num_columns) if (c := group.column(n)).path_in_schema == "started_at")
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    archive.fs.pipe_file(path, bytes(content))


@pytest.mark.parametrize("url", ["file://AKIA1234:ab-SE+CRET@host/x", "memory://AKIA1234:ab-SE+CRET@host/x"])
@pytest.mark.parametrize("harm", [lose, spoil, spoil_a_late_column])
def test_what_duckdb_says_of_a_file_repeats_no_secret_of_the_archive(
    engine: sa.Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    harm: Callable[[Archive, str], None],
) -> None:
    monkeypatch.chdir(tmp_path)  # file:// without a third slash is a folder here
    archive, path = archive_with_secrets(engine, url)

    class Late(DuckEngine):
        """DuckDB that comes to a file when something has happened to it."""

        def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
            harm(archive, path)
            yield from super().compute(job)

    before = contents(engine)
    with pytest.raises(EngineError, match="DuckDB could not compute the models: ") as refused:
        rebuild(engine, Computation(Late(), archive))
    assert contents(engine) == before
    told = "".join(traceback.format_exception(refused.value))
    assert [secret for secret in SECRETS if secret in told] == []
    if harm is not spoil_a_late_column:
        assert "***:***@host/x/executions/day=2026-02-02/" in refused.value.message
    archive.fs.rm(archive.root, recursive=True)


def test_a_manifest_from_the_future_is_refused(engine: sa.Engine, archived: Archive) -> None:
    path = Path(archived.full_path(archived.manifest_path(DAYS[0].date())))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert "99" in _refused(engine, Computation(DuckEngine(), archived), ManifestFromTheFuture)


def test_purged_days_without_their_archive_are_refused_or_left_alone(
    engine: sa.Engine, archived: Archive, tmp_path: Path
) -> None:
    refresh.purge(engine, before=DAYS[2].date(), actor="test", archive=archived)
    before = contents(engine)
    rebuild(engine, Computation(DuckEngine()))  # no archive is set: sealed days stay as they are
    assert contents(engine) == before
    other = Archive.open(tmp_path / "other", create=True)
    said = _refused(engine, Computation(DuckEngine(), other), DayNotArchived)
    assert said.startswith(f"{DAYS[0].date()} is not in the archive")


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "12026-02-02 00:00+00", "0044-03-15 12:00+00 BC"])
def test_a_row_that_no_engine_can_hold_is_named_and_nothing_is_written(
    engine: sa.Engine, archived: Archive, moment: str
) -> None:
    write(engine, [row(at=DAYS[3], execution_id="odd one")])
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE execution_telemetry SET created_at = CAST(:at AS timestamptz) WHERE execution_id = 'odd one'"
            ),
            {"at": moment},
        )
    said = _refused(engine, Computation(DuckEngine(), archived), EngineError)
    assert said == "The row odd one has a time outside the years 1 to 9999 for created_at, which no engine holds."


def test_a_row_that_is_too_long_for_an_engine_is_said(engine: sa.Engine, archived: Archive) -> None:
    write(engine, [row(at=DAYS[3], error_message="x" * (20 << 20))])
    said = _refused(engine, Computation(DuckEngine(), archived), EngineError)
    assert said == "Rows of these days cannot be handed to an engine: one is longer than 8 MB."


class SlowEngine(DuckEngine):
    """DuckDB with more to compute than here: a second passes before its first row."""

    def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
        time.sleep(1)
        yield from super().compute(job)


def test_a_server_that_ends_idle_transactions_lets_an_engine_take_its_time(
    impatient: sa.Engine, archived: Archive
) -> None:
    assert differences(impatient, SlowEngine(), archived) == {}


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("statement_timeout", "canceling statement due to statement timeout"),
        ("lock_timeout", "canceling statement due to lock timeout"),
        ("transaction_timeout", "terminating connection due to transaction timeout"),
    ],
)
def test_what_a_limit_of_the_server_ends_is_one_sentence_and_nothing_is_written(
    engine: sa.Engine, archived: Archive, limit: str, said: str
) -> None:
    limited = open_engine(engine.url.update_query_dict({"options": f"-c{limit}=500"}))
    with engine.begin() as held:
        if limit != "transaction_timeout":  # the chunk waits: for so long, or for this lock
            lock_refresh(held)
        message = _refused(limited, Computation(SlowEngine(), archived), DatabaseUnavailable)
    assert message == f"The database broke off the rebuild: {said}."
    limited.dispose()


def test_masters_that_are_none_or_do_not_answer_are_refused_at_once(engine: sa.Engine, archived: Archive) -> None:
    for master in ("spark:/host", "http://host:7077", "spark://host", ""):
        with pytest.raises(EngineUnreachable, match="Spark master"):
            check_master(master)
    said = _refused(engine, Computation(SparkEngine("spark://127.0.0.1:9"), archived), EngineUnreachable)
    assert "spark://127.0.0.1:9 cannot be reached" in said
    for master in ("local", "local[2]", "local[*]", "yarn", "k8s://https://host:6443"):
        check_master(master)


def test_an_engine_that_is_not_installed_says_which_extra_to_install(tmp_path: Path) -> None:
    """A real interpreter that finds neither package: its path leads to a copy of what is imported, without them."""
    packages = tmp_path / "packages"
    packages.mkdir()
    site = Path(sa.__file__).parent.parent
    for entry in site.iterdir():
        if not entry.name.lower().startswith(("duckdb", "_duckdb", "pyspark", "adbc_driver_duckdb")):
            (packages / entry.name).symlink_to(entry)
    code = (
        "from flywheel_pipeline.engines.duck import DuckEngine\n"
        "from flywheel_pipeline.engines.spark import SparkEngine\n"
        "from flywheel_pipeline.engines.errors import EngineNotInstalled\n"
        "for engine in (DuckEngine(), SparkEngine()):\n"
        "    try: engine.check()\n"
        "    except EngineNotInstalled as error: print(error.message, error.hint)\n"
    )
    root = Path(__file__).parents[2]
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    done = subprocess.run(
        [str(base), "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{root}:{packages}", "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "flywheel-pipeline[duckdb]" in done.stdout
    assert "flywheel-pipeline[spark]" in done.stdout
    assert issubclass(EngineNotInstalled, EngineError)


def test_the_code_location_loads_neither_engine(tmp_path: Path) -> None:
    code = (
        "import sys, flywheel_pipeline.definitions\n"
        "print([name for name in ('pyspark', 'duckdb', 'great_expectations') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLYWHEEL_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_an_engine_of_no_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="There is no engine 'presto'"):
        chosen_computation("presto")
    monkeypatch.setenv("FLYWHEEL_ENGINE", "presto")
    with pytest.raises(UsageError, match="FLYWHEEL_ENGINE"):
        chosen_computation()
    monkeypatch.setenv("FLYWHEEL_ENGINE", "duckdb")
    chosen = chosen_computation()
    assert chosen is not None
    assert chosen.engine.name == "duckdb"
    assert chosen_computation("postgres") is None


def test_a_driver_ends_with_the_process_that_started_it() -> None:
    driver = "import os, time; from flywheel_pipeline.engines.spark_job import end_with_parent; "
    driver += "end_with_parent(); print(os.getpid(), flush=True); time.sleep(120)"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {driver!r}])"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(timeout=30)
