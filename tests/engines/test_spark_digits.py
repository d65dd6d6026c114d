"""Spark gives the same figures to the last digit: in one process, on a cluster, and on one that loses a worker in mid-job."""

from __future__ import annotations

import datetime as dt
import itertools
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random

import dagster as dg
import pyarrow as pa
import pytest
import sqlalchemy as sa
from digits import (
    NOON,
    PATTERNS,
    ROWS,
    SECRETS,
    archive_with_secrets,
    contents,
    differences,
    empty,
    row,
    write,
    write_odd_ends,
)
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from spark_cluster import Cluster, cluster
from test_duckdb_digits import odd_rows, play_the_golden_day

from flywheel_pipeline.aggregates import refresh
from flywheel_pipeline.aggregates.assets import build_backfill_asset
from flywheel_pipeline.archive.export import export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.engines.errors import EngineError
from flywheel_pipeline.engines.job import Job
from flywheel_pipeline.engines.plan import Step
from flywheel_pipeline.engines.rebuild import rebuild
from flywheel_pipeline.engines.spark import SparkEngine
from flywheel_pipeline.engines.work import Computation
from flywheel_pipeline.simulation.fleet import lab
from flywheel_pipeline.simulation.fleet.scenario import load_scenario, scenario_names
from flywheel_pipeline.simulation.fleet.stream import FleetStream
from flywheel_pipeline.sql_models.loader import load_models

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800), pytest.mark.usefixtures("spark_on_loopback")]

#: Shuffles of which the worker then holds results; on the golden day it comes to that in the second of six steps that land.
STAGES_DONE = 3


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Cluster]:
    """A master and two workers."""
    with cluster(tmp_path) as running:
        yield running


def test_the_golden_day_is_equal_to_the_last_digit(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_the_golden_day(engine)
    monkeypatch.chdir(tmp_path)
    assert differences(engine, SparkEngine("local[2]")) == {}
    assert list(tmp_path.iterdir()) == []  # Spark leaves nothing where it was started


@pytest.mark.parametrize("name", scenario_names())
def test_every_trap_is_equal(engine: sa.Engine, name: str) -> None:
    lab.run_scenario(engine, FleetStream(load_scenario(name), 7))
    assert differences(engine, SparkEngine("local[2]")) == {}


def test_time_zones_nulls_ties_unicode_and_odd_ends_are_equal(engine: sa.Engine) -> None:
    many = st.tuples(st.lists(ROWS, min_size=12, max_size=12), st.lists(PATTERNS, min_size=4, max_size=4, unique=True))
    lists, patterns = find(
        many, lambda _: True, settings=settings(phases=[Phase.generate], database=None), random=Random(15)
    )
    rows = [{**one, "execution_id": f"x-{number}"} for number, one in enumerate(itertools.chain(*lists))]
    odd_rows(engine, rows, patterns)
    write_odd_ends(engine)
    assert differences(engine, SparkEngine("local[2]")) == {}
    assert differences(engine, SparkEngine("local[2]", piece_rows=40)) == {}  # results that come in many pieces


def test_a_file_that_is_no_parquet_is_one_sentence_and_nothing_is_written(engine: sa.Engine, tmp_path: Path) -> None:
    write(engine, [row(at=NOON)])
    refresh.rebuild(engine)
    archive = Archive.open(tmp_path / "archive", create=True)
    export_due(engine, archive, today=NOON.date() + dt.timedelta(days=2), after_days=0)
    (file,) = archive.manifest(NOON.date()).files("executions")
    assert file.local_path is not None
    file.local_path.write_bytes(b"x" * file.bytes)
    before = contents(engine)
    with pytest.raises(EngineError, match=r"Spark at local\[2\] could not compute the models: "):
        rebuild(engine, Computation(SparkEngine("local[2]"), archive))
    assert contents(engine) == before


def backfill(database_url: str, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """Backfill the day by Spark, as the launchpad does."""
    return dg.materialize(
        [build_backfill_asset(load_models())],
        partition_key=str(NOON.date()),
        resources={"database": FlywheelDatabase(url=database_url)},
        run_config={"ops": {"day_backfill": {"config": {"engine": "spark"}}}},
        instance=instance,
        raise_on_error=False,
    )


def test_what_spark_says_of_a_file_repeats_no_secret_of_the_archive(
    engine: sa.Engine,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = "file://AKIA1234:ab-SE+CRET@host/x"
    monkeypatch.chdir(tmp_path)  # file:// without a third slash is a folder here
    archive, path = archive_with_secrets(engine, url)
    archive.fs.pipe_file(path, b"x" * archive.fs.size(path))
    with pytest.raises(EngineError, match=r"Spark at local\[2\] could not compute the models: .*\*\*\*") as refused:
        rebuild(engine, Computation(SparkEngine("local[2]"), archive))
    told = "".join(traceback.format_exception(refused.value))

    monkeypatch.setenv("FLYWHEEL_SPARK_MASTER", "local[2]")
    monkeypatch.setenv("FLYWHEEL_ARCHIVE_URL", url)
    with dg.DagsterInstance.ephemeral() as instance:
        result = backfill(database_url, instance)
        assert not result.success
        logs = "\n".join(dg.serialize_value(log) for log in instance.all_logs(result.run_id))
    assert "SparkFailed" in logs  # of the driver, by Pipes
    assert "could not compute the models" in logs
    out, err = capfd.readouterr()
    assert [secret for secret in SECRETS for said in (told, logs, out, err) if secret in said] == []


def test_a_backfill_in_the_launchpad_runs_spark_through_pipes(
    engine: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(engine, [row(at=NOON + dt.timedelta(hours=n), hostname=f"host-{n % 3}") for n in range(9)])
    refresh.rebuild(engine)
    right = contents(engine)
    empty(engine)
    monkeypatch.setenv("FLYWHEEL_SPARK_MASTER", "local[2]")
    with dg.DagsterInstance.ephemeral() as instance:
        result = backfill(database_url, instance)
        assert result.success
        said = [log.user_message for log in instance.all_logs(result.run_id)]
    assert any(message.startswith("episodes: ") for message in said)  # the driver's own words, by Pipes
    (materialization,) = result.asset_materializations_for_node("day_backfill")
    assert materialization.metadata["engine"].value == "spark"
    assert contents(engine) == right


def test_a_worker_killed_in_mid_job_changes_no_digit(engine: sa.Engine, two_workers: Cluster, tmp_path: Path) -> None:
    play_the_golden_day(engine)
    refresh.rebuild(engine)
    archive = Archive.open(tmp_path / "archive", create=True)
    export_due(engine, archive, today=dt.date(2026, 2, 20), after_days=0)
    killed: list[set[str]] = []
    over = threading.Event()

    def kill_at_work() -> None:
        # It has done tasks of several stages by then, and what it holds of them is wanted by the stages that follow.
        while not over.is_set():
            if len(held := two_workers.shuffles(0)) >= STAGES_DONE:
                two_workers.kill(two_workers.workers[0])
                killed.append(held)
                return
            time.sleep(0.02)

    class Watched(SparkEngine):
        def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
            for number, made in enumerate(super().compute(job)):
                if number == 0:
                    over.set()  # Spark has done all steps; what follows are its files
                    assert killed, "the job was over before the worker was killed"
                yield made

    killer = threading.Thread(target=kill_at_work, daemon=True)
    killer.start()
    try:
        found = differences(engine, Watched(two_workers.url), archive)
    finally:
        over.set()
        killer.join()
    assert two_workers.workers[0].returncode == -9
    assert found == {}
