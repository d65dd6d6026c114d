"""The database as the handlers see it: a transaction of one appliance, and an autocommit connection per reading thread.

Belongs here: connections and what to do when the database goes away. Does not belong here: any query. A pool with a
liveness probe before each use doubles the round trips of a request that has one query; a connection that turns out to
be dead is replaced instead, and the query, which only reads or sets, is asked again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
import sqlalchemy as sa

from flywheel_pipeline.database.roles import AGENT_API
from flywheel_pipeline.delivery.api.problems import Problem
from flywheel_pipeline.delivery.tokens import Caller

_log = logging.getLogger("flywheel.api")
Result = TypeVar("Result")

#: Threads of one worker. Python runs one of them at a time; the others wait for PostgreSQL.
READERS = 4
WRITERS = 4


#: The role is missing only where the database's owner may create none; `flywheel db roles` and the server's log say so.
_SPEAK: Final = (
    "SELECT set_config('flywheel.site_id', %s, true), set_config('flywheel.appliance_id', %s, true), "
    "set_config('role', coalesce((SELECT rolname::text FROM pg_roles WHERE rolname = %s), 'none'), true)"
)


def speak_for(connection: psycopg.Connection[Any], caller: Caller) -> None:
    """Begin the transaction of an authenticated appliance: it speaks for that one alone until it ends.

    Its role is that of the agent API, so that row security holds it, whatever the server's own role may do.

    Every statement that an appliance's request makes runs behind this, but for the look-up of its token, which precedes it.
    """
    connection.execute(_SPEAK, (caller.site_id, caller.appliance_id, AGENT_API))


@contextmanager
def speaking_for(connection: psycopg.Connection[Any], caller: Caller) -> Iterator[None]:
    """A transaction of the appliance on an autocommit connection; sent at once, so it costs no more round trips than its queries."""
    with connection.pipeline(), connection.transaction():
        speak_for(connection, caller)
        yield


class Connections:
    """Runs database work in threads: `read` on the thread's own connection, `write` in a transaction of the caller."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="flywheel-api-read")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="flywheel-api-write")
        self._own = threading.local()
        self._opened: list[psycopg.Connection[Any]] = []

    async def read(self, work: Callable[[psycopg.Connection[Any]], Result]) -> Result:
        """Run short, repeatable work on an autocommit connection.

        Raises:
            Problem: 503, the database cannot be reached.
        """
        return await self._run(self._readers, lambda: self._read(work))

    async def write(self, caller: Caller, work: Callable[[sa.Connection], Result]) -> Result:
        """Run work in one transaction of the caller, committed when this returns; it is not repeated.

        Raises:
            Problem: 503, the database went away or refused to go on.
        """

        def in_transaction() -> Result:
            with self.engine.begin() as connection:
                speak_for(driver_of(connection), caller)
                return work(connection)

        return await self.compute(in_transaction)

    async def compute(self, work: Callable[[], Result]) -> Result:
        """Run work that would hold up the event loop.

        Raises:
            Problem: 503, as `write`.
        """
        return await self._run(self._writers, work)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except (psycopg.OperationalError, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            _log.error("the database cannot be used: %s", first_line(error))
            raise unavailable() from error

    def _read(self, work: Callable[[psycopg.Connection[Any]], Result]) -> Result:
        connection: psycopg.Connection[Any] | None = getattr(self._own, "connection", None)
        if connection is not None:
            try:
                return work(connection)
            except psycopg.OperationalError:
                if not connection.broken:
                    raise
                self._forget(connection)
        return work(self._connect())

    def _connect(self) -> psycopg.Connection[Any]:
        pooled = self.engine.raw_connection()
        driver = pooled.driver_connection
        pooled.detach()
        assert isinstance(driver, psycopg.Connection)  # noqa: S101 - engine.DRIVER
        driver.autocommit = True
        self._own.connection = driver
        self._opened.append(driver)
        return driver

    def _forget(self, connection: psycopg.Connection[Any]) -> None:
        self._own.connection = None
        self._opened.remove(connection)
        connection.close()

    def close(self) -> None:
        """End threads and connections; work that runs is waited for."""
        self._writers.shutdown()
        self._readers.shutdown()
        for connection in self._opened:
            connection.close()
        self.engine.dispose()


def driver_of(connection: sa.Connection) -> psycopg.Connection[Any]:
    """The driver's connection, in the same transaction."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 - engine.DRIVER
    return driver


def first_line(error: BaseException) -> str:
    """What an error says, without statements and parameters."""
    shown = str(getattr(error, "orig", None) or error).strip()
    return shown.partition("\n")[0] or type(error).__name__


def unavailable() -> Problem:
    """503: the database cannot be used now."""
    return Problem(
        503,
        "database_unavailable",
        "The database cannot be used at the moment.",
        "Send the same request again; what has landed already is recognised.",
        headers={"Retry-After": "5"},
    )
