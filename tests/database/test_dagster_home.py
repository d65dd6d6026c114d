"""DAGSTER_HOME: an instance that loads, stores beside our tables and says nothing to the outside."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from flywheel_pipeline.database.dagster_home import dagster_environment, write_dagster_home
from flywheel_pipeline.database.settings import Settings


@dg.asset
def something() -> int:
    return 1


def test_the_instance_loads_and_stores_its_events_in_the_schema_dagster(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    home = write_dagster_home(settings, engine.url)
    for name, value in dagster_environment(settings, engine.url).items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.run_monitoring_enabled
        assert "FRESHNESS_DAEMON" in instance.get_required_daemon_types()
        assert type(instance.run_coordinator).__name__ != "QueuedRunCoordinator"
        assert dg.materialize([something], instance=instance).success
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM dagster.runs")).scalar_one() == 1
        assert "runs" not in sa.inspect(connection).get_table_names("public")


def test_no_password_is_written_to_the_disk(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    url = sa.make_url("postgresql+psycopg://user:s3cr3t@host/db")
    home = write_dagster_home(settings, url)
    assert "s3cr3t" not in (home / "dagster.yaml").read_text()
    assert "s3cr3t" in dagster_environment(settings, url)["FLYWHEEL_DAGSTER_URL"]


def test_writing_it_again_leaves_the_file_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    url = sa.make_url("postgresql+psycopg://host/db")
    file = write_dagster_home(settings, url) / "dagster.yaml"
    before = file.stat()
    write_dagster_home(settings, url)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
