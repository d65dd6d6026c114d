"""Fixtures of the delivery tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from agent_http import Api, enrol
from fleet_database import Fleet
from starlette.testclient import TestClient

from flywheel_pipeline.database import roles
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.delivery.api.app import create_app
from flywheel_pipeline.delivery.api.limits import Limits


@pytest.fixture
def fleet(engine: sa.Engine) -> Iterator[Fleet]:
    """Two sites: site-a with a current agent, site-b with the agent of 2026-02-15."""
    with engine.connect() as conn, conn.begin() as transaction:
        made = Fleet(conn)
        made.appliance("site-a-01")
        made.appliance("site-b-01", agent_version="1.0.56")
        yield made
        transaction.rollback()


@pytest.fixture
def committed(engine: sa.Engine) -> Callable[[Callable[[Fleet], Any]], Any]:
    """Run an act on the fleet in a transaction of its own and commit it."""

    def run(act: Callable[[Fleet], Any]) -> Any:
        with engine.begin() as conn:
            return act(Fleet(conn))

    return run


@pytest.fixture(scope="session")
def agent_login(new_login: Callable[..., str]) -> str:
    """A login of the server that was granted the role of the agent API, and nothing else."""
    return new_login("the_agent_api", roles.AGENT_API)


@pytest.fixture
def api_login(engine: sa.Engine, agent_login: str) -> Iterator[sa.Engine]:
    """The database of `engine` as that login."""
    login = open_engine(engine.url.set(username=agent_login))
    yield login
    login.dispose()


@pytest.fixture
def api(engine: sa.Engine, api_login: sa.Engine) -> Iterator[Api]:
    """The agent API in this process under its own login, on a database with two sites of one appliance each."""
    tokens = [enrol(engine, f"site-{name}-01", f"site-{name}") for name in "ab"]
    limits = Limits(requests_per_second=10_000.0, rows_per_second=1_000_000.0)
    with TestClient(create_app(api_login, limits), raise_server_exceptions=False) as client:
        yield Api(client, engine, *tokens)
