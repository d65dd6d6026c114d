"""Dagster's Celery launcher, with one question more: whether the worker that has a run still lives.

Dagster's own launcher believes the last thing that Celery heard: a worker killed with -9 stays `STARTED` for ever, and its
run with it. Here the worker is pinged, and where it does not answer the run's own sign of life in the database decides: a
worker cut off from Redis may work on. A run that gives neither sign has failed, and Dagster's run retries take it up,
without the steps that were done.
"""

from __future__ import annotations

from typing import Final

from dagster import DagsterRun
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG

from flywheel_pipeline.database.life import gives_sign
from flywheel_pipeline.database.resource import FlywheelDatabase

PING_SECONDS: Final = 3.0
PINGS: Final = 2


class WatchedCeleryRunLauncher(CeleryRunLauncher):
    """`CeleryRunLauncher` that notices a killed worker: within `poll_interval_seconds` and two pings."""

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Tell whether the worker of a started run lives.

        Raises:
            kombu.exceptions.OperationalError: Redis does not answer; the daemon logs it and asks again, and no run is
                taken for dead meanwhile.
        """
        result = self.celery.AsyncResult(run.tags[DAGSTER_CELERY_TASK_ID_TAG])
        found = super().check_run_worker_health(run)
        if found.status == WorkerStatus.UNKNOWN and gives_sign(FlywheelDatabase().engine, run.run_id):
            # Redis was emptied: nobody knows the task any more, and its process works on.
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if found.status != WorkerStatus.RUNNING:
            return found
        worker = result.info.get("hostname") if isinstance(result.info, dict) else None
        if worker is None or self._answers(worker) or gives_sign(FlywheelDatabase().engine, run.run_id):
            return found
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            f"The worker {worker} answers no ping, and the run no longer holds its lock in the database: the worker was "
            "killed, or its host is gone. What the run had not committed is undone; a retry does it.",
        )

    def _answers(self, worker: str) -> bool:
        return any(self.celery.control.ping(destination=[worker], timeout=PING_SECONDS) for _ in range(PINGS))
