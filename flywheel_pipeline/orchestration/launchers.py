"""The launcher by configuration: what `dagster.yaml` says about starting runs, watching them and counting them.

Belongs here: the sections of `dagster.yaml` that differ between one host, several hosts and a cluster. Does not belong
here: the sections that do not (`database/dagster_home.py`). Passwords stay in the environment: the file names variables.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import UsageError

#: The module that each launcher needs and the extra that brings it.
EXTRAS: Final = {"celery": "dagster_celery", "k8s": "dagster_k8s"}
#: Until a run that was handed over must have begun, in seconds. It includes the wait for a free worker: keep
#: FLYWHEEL_RUN_SLOTS at or below the workers' slots. A pod may have to fetch its image first.
START_SECONDS: Final = {"default": 120, "celery": 60, "k8s": 300}
#: Of any run. A day of 100 million rows takes PostgreSQL an hour and a half, the first refresh after a large import as long
#: as its rows ask for, and either may wait for the other's lock. A killed run is known by its missing sign of life, long before.
LONGEST_SECONDS: Final = 12 * 3600
POLL_SECONDS: Final = {"default": 30, "celery": 5, "k8s": 15}


def launcher_config(settings: Settings) -> dict[str, Any]:
    """Return the sections `run_launcher`, `run_coordinator` and `run_monitoring` of `dagster.yaml`.

    Raises:
        UsageError: the launcher's extra is not installed, or a setting it needs is not given.
    """
    name = settings.run_launcher
    if name in EXTRAS and find_spec(EXTRAS[name]) is None:
        raise UsageError(
            f"FLYWHEEL_RUN_LAUNCHER is {name}, and {EXTRAS[name].replace('_', '-')} is not installed.",
            hint=f"Install the extra: pip install 'flywheel-pipeline[{name}]', or unset FLYWHEEL_RUN_LAUNCHER.",
        )
    # No queue on one host: insert to promoted rule takes 2.4-3.7 s with DefaultRunCoordinator, 4-15 s with a queue polled
    # every second (7 trials). A run whose process was killed stays STARTED until its time is over, or until the launcher misses its worker.
    sections: dict[str, Any] = {
        "run_coordinator": {"module": "dagster._core.run_coordinator", "class": "DefaultRunCoordinator"},
        "run_monitoring": {
            "enabled": True,
            "start_timeout_seconds": START_SECONDS[name],
            "max_runtime_seconds": LONGEST_SECONDS,
            "poll_interval_seconds": POLL_SECONDS[name],
        },
    }
    if name == "default":
        return sections
    sections["run_launcher"] = _celery(settings) if name == "celery" else _kubernetes(settings)
    sections["run_coordinator"] = _queue(settings.run_slots)
    # A run is not resumed by another worker, it is retried as a new run: what was done is not done again, and the killed
    # run's record says how it ended.
    sections["run_monitoring"]["max_resume_run_attempts"] = 0
    return sections


def _queue(slots: int) -> dict[str, Any]:
    """Hand over no more runs than there are slots, and leave one of several to the minute path while days are backfilled."""
    config: dict[str, Any] = {"max_concurrent_runs": slots, "dequeue_interval_seconds": 1}
    if slots > 1:
        config["tag_concurrency_limits"] = [{"key": "dagster/backfill", "limit": slots - 1}]
    return {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator", "config": config}


def _celery(settings: Settings) -> dict[str, Any]:
    if settings.celery_broker_url is None:
        raise UsageError(
            "FLYWHEEL_RUN_LAUNCHER is celery, and FLYWHEEL_CELERY_BROKER_URL is not set.",
            hint="Set it to the Redis that the workers share, such as redis://redis:6379/0.",
        )
    if settings.executor != "in_process":
        raise UsageError(
            f"FLYWHEEL_RUN_LAUNCHER is celery, and FLYWHEEL_EXECUTOR is {settings.executor}: a worker's process may start no others.",
            hint="Unset FLYWHEEL_EXECUTOR: with Celery a run is one process, and days are spread over workers as runs.",
        )
    from flywheel_pipeline.orchestration.celery_app import CONFIG, QUEUE

    broker = {"env": "FLYWHEEL_CELERY_BROKER_URL"}
    return {
        "module": "flywheel_pipeline.orchestration.celery_launcher",
        "class": "WatchedCeleryRunLauncher",
        "config": {"broker": broker, "backend": broker, "default_queue": QUEUE, "config_source": dict(CONFIG)},
    }


def _kubernetes(settings: Settings) -> dict[str, Any]:
    if settings.k8s_image is None:
        raise UsageError(
            "FLYWHEEL_RUN_LAUNCHER is k8s, and FLYWHEEL_K8S_IMAGE is not set.",
            hint="Set it to the image that deploy/Dockerfile builds, with its registry and tag.",
        )
    return {
        "module": "dagster_k8s",
        "class": "K8sRunLauncher",
        "config": {
            "job_image": settings.k8s_image,
            "job_namespace": settings.k8s_namespace,
            "service_account_name": settings.k8s_service_account,
            "instance_config_map": settings.k8s_instance_config_map,
            "dagster_home": "/opt/dagster/dagster_home",
            "env_secrets": [settings.k8s_env_from],
            "fail_pod_on_run_failure": False,  # a failed gate is a result; Kubernetes must not start the pod again
        },
    }
