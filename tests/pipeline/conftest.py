"""The day of 2026-02-15, staged once per test process; each test works on its own copy of the database.

Belongs here: databases with the day in them and Dagster instances over them. Does not belong here: any assertion.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from graph_runs import Answer, CopyDatabase, Environment, Flywheel, Graph, PlayedDay

from flywheel_pipeline.cli import main
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.roles import READER
from flywheel_pipeline.database.settings import get_settings
from flywheel_pipeline.run import dagster_instance, latest_checks, run_pipeline
from flywheel_pipeline.simulation.replay import Replay, build_replay
from flywheel_pipeline.simulation.stage import stage_evening, stage_morning
from flywheel_pipeline.status import read_status

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def copy_database(server: EmbeddedServer) -> Iterator[CopyDatabase]:
    """Make a copy of a database of the session's server, by its name; all copies are dropped with the session."""
    administrator = open_engine(server.url.set(database="postgres")).execution_options(isolation_level="AUTOCOMMIT")
    engines: list[sa.Engine] = []

    def copy(template: str) -> sa.Engine:
        name = f"pipeline_{next(_numbers)}"
        with administrator.connect() as connection:
            # A template must have no sessions; the pools of earlier tests still hold some.
            connection.execute(
                sa.text("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name"),
                {"name": template},
            )
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        engines.append(open_engine(server.url.set(database=name)))
        return engines[-1]

    yield copy
    for engine in engines:
        engine.dispose()
        with administrator.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {engine.url.database} WITH (FORCE)")
    administrator.dispose()


@contextmanager
def _environment(engine: sa.Engine, home: Path) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["FLYWHEEL_HOME"] = str(home)
    os.environ["FLYWHEEL_DATABASE_URL"] = engine.url.render_as_string(hide_password=False)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def environment() -> Environment:
    """Point FLYWHEEL_* at a database and a home for a while; what Flywheel adds to the environment is undone too."""
    return _environment


@pytest.fixture(scope="session")
def replay() -> Replay:
    """The day as posts and rows."""
    return build_replay()


@pytest.fixture(scope="session")
def staged_database(
    copy_database: CopyDatabase, template_database: str, replay: Replay, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Name of a database that holds the whole day's telemetry, of which no run has seen anything yet."""
    engine = copy_database(template_database)
    directory = tmp_path_factory.mktemp("posts")
    stage_morning(engine, replay, directory)
    stage_evening(engine, replay, directory)
    assert engine.url.database is not None
    return engine.url.database


@pytest.fixture
def staged(copy_database: CopyDatabase, staged_database: str) -> sa.Engine:
    """Engine on a database of this test alone that holds the whole day, not yet refreshed: three patterns qualify."""
    return copy_database(staged_database)


@pytest.fixture
def graph(staged: sa.Engine) -> Iterator[Graph]:
    """The code location over `staged`, with a Dagster instance of its own."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield Graph(staged, instance)


@pytest.fixture(scope="session")
def played(
    copy_database: CopyDatabase,
    template_database: str,
    environment: Environment,
    replay: Replay,
    tmp_path_factory: pytest.TempPathFactory,
) -> PlayedDay:
    """The whole day, morning and evening staged and run, with Dagster's storage in the same PostgreSQL. Read only."""
    engine = copy_database(template_database)
    home = tmp_path_factory.mktemp("home")
    with environment(engine, home), dagster_instance(engine.url, get_settings()) as instance:
        morning = stage_morning(engine, replay, home / "replay")
        with engine.connect() as connection:
            before = read_status(connection)
        first = run_pipeline(instance, full_recount=True)
        with engine.connect() as connection:
            noon = read_status(connection)
        evening = stage_evening(engine, replay, home / "replay")
        second = run_pipeline(instance, full_recount=True)
        with engine.connect() as connection:
            after = read_status(connection)
        after["checks"] = latest_checks(instance)
    return PlayedDay(engine, home, (morning, evening), (first, second), before, noon, after)


@pytest.fixture
def played_copy(copy_database: CopyDatabase, played: PlayedDay) -> sa.Engine:
    """Engine on a copy of the played day, of this test alone."""
    assert played.engine.url.database is not None
    return copy_database(played.engine.url.database)


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Flywheel:
    """Run `flywheel …` in this process, through the same `main` as the console script."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["flywheel", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def reader_login(new_login: Callable[..., str]) -> str:
    """A login of the server that was granted the reader's role, and nothing else."""
    return new_login("the_reader", READER)
