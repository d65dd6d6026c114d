"""The Celery application of the workers: `flywheel node worker` starts one on it.

Belongs here: the application's settings, which launcher and workers share. Does not belong here: starting a worker.
Importing this module needs the extra `celery` and FLYWHEEL_CELERY_BROKER_URL only once `app` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flywheel_pipeline.database.settings import get_settings
from flywheel_pipeline.errors import UsageError

if TYPE_CHECKING:
    from celery import Celery

QUEUE: Final = "dagster"
CONFIG: Final[dict[str, Any]] = {
    # A worker takes a run when it has a free process, not before: what it had fetched would wait behind a long run, and be
    # lost with a killed worker.
    "worker_disable_prefetch": True,
    "worker_prefetch_multiplier": 1,
    # A process a run, as on one host: what a run leaves in memory ends with it.
    "worker_max_tasks_per_child": 1,
    "worker_hijack_root_logger": False,
    "broker_connection_retry_on_startup": True,
    # Results say which worker has a run. They are asked for while the run is unfinished, and forgotten after a day.
    "result_expires": 86_400,
    "task_default_queue": QUEUE,
}


def make_application() -> Celery:
    """Return the application with Dagster's own task that executes a run.

    Raises:
        UsageError: FLYWHEEL_CELERY_BROKER_URL is not set.
    """
    from dagster_celery.make_app import make_app
    from dagster_celery.tasks import create_execute_job_task

    broker = get_settings().celery_broker_url
    if broker is None:
        raise UsageError(
            "A worker needs FLYWHEEL_CELERY_BROKER_URL, and it is not set.",
            hint="Set it to the Redis that the workers share, such as redis://redis:6379/0.",
        )
    url = broker.get_secret_value()
    made: Celery = make_app(  # type: ignore[no-untyped-call]
        {"broker": url, "backend": url, "config_source": dict(CONFIG), "task_default_queue": QUEUE}
    )
    create_execute_job_task(made)
    return made


def __getattr__(name: str) -> Any:
    # `celery -A flywheel_pipeline.orchestration.celery_app` asks for `app`; the launcher asks for the settings alone.
    if name == "app":
        return make_application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
