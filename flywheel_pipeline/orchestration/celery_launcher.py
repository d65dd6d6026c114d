"""Dagster's Celery launcher, with one question more: whether the worker that has a run still lives.

Dagster's own launcher believes the last thing that Celery heard: a worker killed with -9 stays `STARTED` for ever, and its
run with it. Here a run must give a sign: its own lock in the database (a worker cut off from Redis works on), or, where it
holds none, its worker's answer to a ping. A run without either has failed, and Dagster's run retries take it up, without
the steps that were done.
"""

from __future__ import annotations

import time
from typing import Any, Final

from dagster import DagsterRun
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG

from flywheel_pipeline.database.life import gives_sign
from flywheel_pipeline.database.resource import FlywheelDatabase

PING_SECONDS: Final = 2.0
PINGS: Final = 2
#: A dead worker's other runs do not wait for pings of their own.
SILENT_SECONDS: Final = 15.0


class WatchedCeleryRunLauncher(CeleryRunLauncher):
    """`CeleryRunLauncher` that notices a killed worker: within `poll_interval_seconds` and two pings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._silent: dict[str, float] = {}

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Tell whether the worker of a started run lives.

        Raises:
            kombu.exceptions.OperationalError: Redis does not answer; the daemon logs it and asks again, and no run is
                taken for dead meanwhile.
        """
        found = super().check_run_worker_health(run)
        if found.status not in (WorkerStatus.RUNNING, WorkerStatus.UNKNOWN):
            return found
        if gives_sign(FlywheelDatabase().engine, run.run_id):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        said = self.celery.AsyncResult(run.tags[DAGSTER_CELERY_TASK_ID_TAG]).info
        worker = said.get("hostname") if isinstance(said, dict) else None
        if worker is None or self._answers(worker):
            return found
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            f"The worker {worker} answers no ping, and the run no longer holds its lock in the database: the worker was "
            "killed, or its host is gone. What the run had not committed is undone; a retry does it.",
        )

    def _answers(self, worker: str) -> bool:
        if time.monotonic() - self._silent.get(worker, float("-inf")) < SILENT_SECONDS:
            return False
        if any(self.celery.control.ping(destination=[worker], timeout=PING_SECONDS) for _ in range(PINGS)):
            self._silent.pop(worker, None)
            return True
        self._silent[worker] = time.monotonic()
        return False
