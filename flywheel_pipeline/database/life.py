"""Signs of life: a run holds a lock in the database for as long as its process lives.

Belongs here: giving the sign and asking for it. Does not belong here: what is done about a run that gives none
(`telemetry/sensors.py`). Dagster's default launcher notices a dead worker through the worker's parent alone: where that
was killed too (a machine that lost power), the run stays STARTED until `max_runtime_seconds` are over, half a day. The kernel
closes the dead process's connection at once, and PostgreSQL frees the lock with it; where the host is gone with its
kernel, PostgreSQL finds that out by asking it every five seconds (20 s). A restart of PostgreSQL frees it
too, while the run may live on: a run without the sign is doubtful, so nothing may rest on its being dead but haste.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

_ASK_THE_HOST = "SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"  # ignored on a socket file
_TAKE = sa.text("SELECT pg_advisory_lock_shared(hashtext('flywheel:run'), hashtext(:run_id))")
_TRY = sa.text("SELECT pg_try_advisory_xact_lock(hashtext('flywheel:run'), hashtext(:run_id))")


@contextmanager
def sign_of_life(engine: sa.Engine, run_id: str) -> Iterator[None]:
    """Hold the lock of this run on a connection of its own, as long as the context lasts."""
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    connection.detach()  # it never goes back into the pool with the lock on it
    try:
        connection.exec_driver_sql(_ASK_THE_HOST)
        connection.execute(_TAKE, {"run_id": run_id})
        yield
    finally:
        connection.close()  # the session ends, and the lock with it


def gives_sign(engine: sa.Engine, run_id: str) -> bool:
    """Tell whether a living process holds the lock of this run."""
    with engine.begin() as connection:
        return not connection.execute(_TRY, {"run_id": run_id}).scalar_one()
