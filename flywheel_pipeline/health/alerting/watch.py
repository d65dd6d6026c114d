"""One look of the watch: observe, record, send. The daemon's sensor, `flywheel up` and `flywheel alerts watch` share it.

Belongs here: putting the parts together. Does not belong here: the parts. A dead daemon cannot tell of itself, hence
the watchers outside of it; they may all look at once, a change is recorded once and sent once.
"""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from flywheel_pipeline.health.alerting.channels import Alerting
from flywheel_pipeline.health.alerting.outbox import Clock, Drained, drain, utc_now
from flywheel_pipeline.health.alerting.record import Observation, Recorded, escalate, lock_pass, record

if TYPE_CHECKING:
    import dagster as dg

Observe = Callable[[sa.Connection], Sequence[Observation]]


@dataclass(frozen=True)
class Look:
    """What one look saw and did. `recorded` is None where another watcher was at it."""

    observations: int
    recorded: Recorded | None
    open_alerts: int
    drained: Drained

    @property
    def sentence(self) -> str:
        """The look in one line of numbers."""
        r, d = self.recorded, self.drained
        changes = (
            "another watcher is looking"
            if r is None
            else f"{r.raised} raised, {r.changed} changed, {r.recovered} recovered, {r.escalated} escalated"
        )
        failing = "".join(f"; {alias}: {error}" for alias, error in sorted(d.errors.items()))
        return (
            f"{self.observations} observations: {changes}; {self.open_alerts} alerts open; "
            f"{d.sent} notifications sent in {d.messages} messages, {d.failed} failed, {d.waiting} waiting{failing}."
        )


def look(
    engine: sa.Engine,
    observe: Observe,
    alerting: Alerting,
    *,
    clock: Clock = utc_now,
    budget_seconds: float = 30.0,
) -> Look:
    """Observe and record in one transaction under the lock of the pass, escalate what is due, then send."""
    seen: Sequence[Observation] = ()
    recorded: Recorded | None = None
    with engine.begin() as connection:
        if lock_pass(connection):
            seen = observe(connection)
            now = clock()
            done = record(connection, seen, alerting, now)
            escalated = escalate(connection, alerting, now)
            recorded = Recorded(done.raised, done.changed, done.recovered, escalated)
    drained = drain(engine, alerting, clock=clock, budget_seconds=budget_seconds)
    with engine.connect() as connection:
        count = connection.execute(sa.text("SELECT count(*) FROM alerts WHERE state = 'open'")).scalar_one()
    return Look(len(seen), recorded, count, drained)


def everything(
    instance: dg.DagsterInstance, repository: Any, alerting: Alerting, *, watching_seconds: float = math.inf
) -> Observe:
    """Return the observation of all that can alert: checks, runs, daemon, quarantines, stuck patterns.

    `repository` is the code location's, whose graph names the checks and jobs. `watching_seconds`: a watcher that began
    with the daemon reads the last beat of the daemon before it, and judges no daemon until its own had time to beat.
    """
    from flywheel_pipeline.health.alerting import observe as o

    def observe(connection: sa.Connection) -> Sequence[Observation]:
        now = dt.datetime.now(dt.UTC)
        stale_after = alerting.rules.daemon_stale_after_seconds
        daemon = o.observe_daemon(instance, stale_after)
        return [
            *o.observe_checks(connection, instance, repository.asset_graph),
            *o.observe_runs(connection, instance, o.graph_jobs(repository)),
            *([daemon] if daemon.outcome == "pass" or watching_seconds > stale_after else []),
            *o.observe_quarantines(connection, now),
            *o.observe_candidates(connection, alerting.rules.stuck_after_days, now),
        ]

    return observe


def daemon_only(instance: dg.DagsterInstance, alerting: Alerting) -> Observe:
    """Return the observation of the daemon alone, for the process that started it."""
    from flywheel_pipeline.health.alerting.observe import observe_daemon

    return lambda _connection: [observe_daemon(instance, alerting.rules.daemon_stale_after_seconds)]


class DaemonWatch:
    """The watch that `flywheel up` keeps on its daemon: a look every ten seconds once the daemon had time to start.

    While the daemon reports, it delivers by itself and a look costs one query; while it does not, this process does.
    """

    EVERY_SECONDS = 10.0

    def __init__(self, engine: sa.Engine, instance: dg.DagsterInstance, alerting: Alerting) -> None:
        self._engine, self._instance, self._alerting = engine, instance, alerting
        # Before that the last beat is of the daemon before this one.
        self._next = time.monotonic() + alerting.rules.daemon_stale_after_seconds
        self.problem: str | None = None

    def tick(self) -> Look | None:
        """Look if it is time to; None otherwise. A database that does not answer is `problem`, and looked at again."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self.EVERY_SECONDS
        from dagster_postgres.utils import DagsterPostgresException

        from flywheel_pipeline.health.alerting.observe import observe_daemon

        try:
            seen = observe_daemon(self._instance, self._alerting.rules.daemon_stale_after_seconds)
            if seen.outcome == "pass":
                self.problem = None
                return None
            done = look(self._engine, daemon_only(self._instance, self._alerting), self._alerting)
        except (sa.exc.OperationalError, sa.exc.InterfaceError, DagsterPostgresException) as error:
            self.problem = f"The watch on the daemon cannot reach the database: {type(error).__name__}."
            return None
        self.problem = seen.sentence
        return done

    def ended(self, sentence: str) -> Look:
        """Tell that the daemon's process ended."""
        from flywheel_pipeline.health.alerting.observe import daemon_down

        return look(
            self._engine,
            lambda _connection: [daemon_down(sentence, time.time())],
            self._alerting,
            budget_seconds=15.0,
        )
