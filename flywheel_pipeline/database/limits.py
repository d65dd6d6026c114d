"""Limits that a server sets on sessions: which of them long work lifts, and what it says when one of the others ends it.

Belongs here: work that lasts minutes and waits for more than the database. Does not belong here: limits that Flywheel sets
itself (`migrate.py`, `adopt.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
import sqlalchemy as sa

from flywheel_pipeline.errors import DatabaseUnavailable

_ENDED: Final = (
    psycopg.OperationalError,  # statement_timeout, lock_timeout, a deadlock, the end of the session or the server
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.TransactionTimeout,
)


def let_idle(connection: sa.Connection) -> None:
    """Let the caller's transaction wait for something that is not the database, however long: a file system, an engine.

    A server that ends transactions which stand idle means those that somebody forgot. What limits work stays as it is set:
    `statement_timeout`, `lock_timeout`, `transaction_timeout`. It takes no snapshot.
    """
    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")


@contextmanager
def broken_off(work: str, hint: str) -> Iterator[None]:
    """Around a transaction: say in one sentence that the database broke off this work, and why.

    Raises:
        DatabaseUnavailable: with the server's reason, and the hint.
    """
    try:
        yield
    except Exception as error:
        reason = _first_reason(error)
        if reason is None:
            raise
        raise ended(work, reason, hint) from error


def ended(work: str, reason: Exception, hint: str) -> DatabaseUnavailable:
    """Return the sentence on work that the database broke off, with the first line of a driver's error."""
    said = str(reason).strip().splitlines()[0].rstrip(".")
    return DatabaseUnavailable(f"The database broke off the {work}: {said}.", hint=hint)


def _first_reason(error: BaseException) -> psycopg.Error | None:
    """The first refusal on the way to an error of the database: of a session that was ended, all later ones say that alone."""
    if not isinstance(error, (sa.exc.DBAPIError, psycopg.Error)):
        return None
    found = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _ENDED):
            found = cause
        cause = cause.__context__
    return found
