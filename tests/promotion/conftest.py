"""Fixtures of the promotion tests.

Belongs here: a database that a whole file shares, for tests that roll back. Does not belong here: rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def shared_engine(server: EmbeddedServer, template_database: str) -> Iterator[sa.Engine]:
    """Engine on one migrated database for a whole file; every test, and every example of a property, rolls back."""
    name = f"shared_{next(_numbers)}"
    administration = open_engine(server.url.set(database="postgres")).execution_options(isolation_level="AUTOCOMMIT")
    with administration.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template_database} STRATEGY file_copy")
    engine = open_engine(server.url.set(database=name))
    yield engine
    engine.dispose()
    with administration.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    administration.dispose()
