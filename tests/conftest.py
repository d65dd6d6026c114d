"""Fixtures that every room shares: one real PostgreSQL 18 per test process, one fresh database per test.

Belongs here: servers and databases. Does not belong here: rows of any room.
"""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable

_numbers = itertools.count(1)

#: Each test copies a database of some five hundred files: in memory, where there is room, that takes a fifth of the time.
MEMORY = Path("/dev/shm")  # noqa: S108 (made and removed by tempfile)
ROOM_BYTES = 6 * 2**30


def _memory_has_room() -> bool:
    return MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES


if "TMPDIR" not in os.environ and _memory_has_room():
    tempfile.tempdir = str(MEMORY)  # pytest's directories are made there too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole days of the graph first: they take longest, and at the end one worker would run them alone."""
    items.sort(key=lambda item: "pipeline" not in item.path.parts)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """One embedded server of this test process; without fsync, since nobody needs its data tomorrow."""
    home = Path(tempfile.mkdtemp(prefix="fw-"))
    embedded = EmbeddedServer(
        home,
        options={
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "shared_buffers": "128MB",
            "max_wal_size": "256MB",
        },
    )
    embedded.ensure_running()
    yield embedded
    embedded.remove()
    shutil.rmtree(home)


def _administer(server: EmbeddedServer, statement: str, *names: str) -> None:
    conninfo = psycopg.conninfo.make_conninfo(
        host=str(server.socket_directory), port=5432, user="flywheel", dbname="postgres"
    )
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@pytest.fixture(scope="session")
def template_database(server: EmbeddedServer) -> str:
    """Name of a database on `server` that migrate.upgrade made once; fresh databases are copies of it."""
    name = "flywheel_template"
    _administer(server, "CREATE DATABASE {}", name)
    engine = open_engine(server.url.set(database=name))
    migrate.upgrade(engine)
    engine.dispose()
    return name


@pytest.fixture
def engine(server: EmbeddedServer, template_database: str) -> Iterator[sa.Engine]:
    """Engine on a fresh, fully migrated database of this test alone."""
    name = f"test_{next(_numbers)}"
    _administer(server, "CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, template_database)
    fresh = open_engine(server.url.set(database=name))
    yield fresh
    fresh.dispose()
    _administer(server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture(scope="session")
def new_login(server: EmbeddedServer, template_database: str) -> Callable[..., str]:
    """Function (name, *roles, options) of a new login of the server with these roles, and nothing else; returns the name."""

    def create(name: str, *roles: str, options: str = "") -> str:
        with (server.data / "pg_ident.conf").open("a") as identities:
            identities.write(f'flywheel "{getpass.getuser()}" {name}\n')
        _administer(server, f"CREATE ROLE {{}} LOGIN {options}", name)
        for role in roles:
            _administer(server, "GRANT {} TO {}", role, name)
        _administer(server, "SELECT pg_reload_conf()")
        deadline = time.monotonic() + 30
        while True:  # the server reads its files again a moment later
            try:
                open_engine(server.url.set(database=template_database, username=name)).dispose()
                return name
            except DatabaseUnavailable:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    return create


@pytest.fixture
def empty_engine(server: EmbeddedServer) -> Iterator[sa.Engine]:
    """Engine on a fresh database in which nothing was created."""
    name = f"empty_{next(_numbers)}"
    _administer(server, "CREATE DATABASE {}", name)
    fresh = open_engine(server.url.set(database=name))
    yield fresh
    fresh.dispose()
    _administer(server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def impatient(engine: sa.Engine) -> sa.Engine:
    """`engine` on a server that ends a transaction which stands idle for 300 ms."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %%I SET idle_in_transaction_session_timeout = 300', current_database()); END $$"
        )
    engine.dispose()  # the setting holds for new sessions
    return engine


@pytest.fixture
def database_url(engine: sa.Engine) -> str:
    """URL, with password if any, of the database of `engine`, as FLYWHEEL_DATABASE_URL takes it."""
    return engine.url.render_as_string(hide_password=False)
