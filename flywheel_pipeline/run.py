"""Running the whole graph in this process, on the real Dagster instance, with progress.

Belongs here: the instance, one run, and what came out of its checks. Does not belong here: terminal output.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.tags import REPOSITORY_LABEL_TAG

from flywheel_pipeline.database.dagster_home import dagster_environment, write_dagster_home
from flywheel_pipeline.database.roles import DAGSTER_SCHEMA
from flywheel_pipeline.database.settings import Settings, get_settings


@dataclass(frozen=True)
class CheckOutcome:
    """One check's result in a run."""

    asset: str
    name: str
    passed: bool
    severity: str
    blocking: bool
    sentence: str


@dataclass(frozen=True)
class RunOutcome:
    """What one run of the graph did. `failures` names the steps that failed, with their message."""

    run_id: str
    success: bool
    duration_seconds: float
    checks: tuple[CheckOutcome, ...]
    failures: tuple[tuple[str, str], ...] = field(default_factory=tuple)


@contextmanager
def dagster_instance(url: sa.URL, settings: Settings | None = None) -> Iterator[dg.DagsterInstance]:
    """Open the real instance: DAGSTER_HOME under FLYWHEEL_HOME, storage in PostgreSQL, and the environment of runs."""
    settings = settings or get_settings()
    write_dagster_home(settings, url)
    os.environ.update(dagster_environment(settings, url))
    with dg.DagsterInstance.get() as instance:
        # Dagster's storage opens a connection for each of some 800 statements of a run, unless it is told to keep one.
        instance.optimize_for_webserver(statement_timeout=0, pool_recycle=3_600, max_overflow=20)
        yield instance


def runs_are_readable(connection: sa.Connection) -> bool:
    """Say whether this login may open Dagster's storage: read all its tables, or make them where there are none yet."""
    return bool(
        connection.execute(
            sa.text(
                "SELECT has_schema_privilege(n.oid, 'USAGE') AND (has_schema_privilege(n.oid, 'CREATE') OR "
                "(SELECT bool_and(has_table_privilege(c.oid, 'SELECT')) FROM pg_class AS c "
                "WHERE c.relnamespace = n.oid AND c.relkind IN ('r', 'p'))) FROM pg_namespace AS n WHERE n.nspname = :schema"
            ),
            {"schema": DAGSTER_SCHEMA},
        ).scalar_one_or_none()
    )


def run_pipeline(
    instance: dg.DagsterInstance,
    *,
    full_recount: bool = False,
    nightly: bool = False,
    trigger: str = "command line",
    progress: Callable[[str], None] | None = None,
) -> RunOutcome:
    """Run the job `pipeline` (or `pipeline_nightly`) in this process and return its outcome; a failing gate is an outcome, not an error.

    `progress` is called with the name of each step as it starts.
    """
    import time

    from flywheel_pipeline.aggregates.checks import FULL_RECOUNT_TAG
    from flywheel_pipeline.build import CODE_LOCATION, NIGHTLY_JOB, PIPELINE_JOB, build_defs

    # The second tag lets the UI list the run under the job of its code location, as it does with its own runs.
    tags = {"flywheel/trigger": trigger, REPOSITORY_LABEL_TAG: f"__repository__@{CODE_LOCATION}"}
    if full_recount:
        tags[FULL_RECOUNT_TAG] = "true"
    job_name = NIGHTLY_JOB if nightly else PIPELINE_JOB
    run_id = str(uuid.uuid4())

    def listen(event: dg.EventLogEntry) -> None:
        started = event.dagster_event
        if progress is not None and started is not None and started.is_step_start and started.step_key:
            progress(started.step_key)

    instance.add_event_listener(run_id, listen)
    begun = time.monotonic()
    job = build_defs().resolve_job_def(job_name)
    result = job.execute_in_process(
        instance=instance,
        run_id=run_id,
        tags=tags,
        raise_on_error=False,
        # The terminal shows the outcome; the event log, in the UI, holds every line.
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    checks = tuple(
        CheckOutcome(
            asset=e.asset_key.to_user_string(),
            name=e.check_name,
            passed=e.passed,
            severity=e.severity.value,
            blocking=e.blocking or False,
            sentence=e.description or "",
        )
        for e in result.get_asset_check_evaluations()
    )
    failures = []
    for event in result.all_events:
        if event.is_step_failure and event.step_key:
            data = event.step_failure_data
            message = ""
            if data.user_failure_data is not None and data.user_failure_data.description:
                message = data.user_failure_data.description
            elif data.error is not None:
                cause: Any = data.error.cause or data.error
                message = cause.message.strip()
                if cause.cls_name == "DagsterAssetCheckFailedError":
                    # Its checks say above what is wrong; the class name would only look like a crash.
                    gates = ", ".join(line.rpartition(": ")[2] for line in message.splitlines()[1:])
                    message = f"what stands behind it did not run, because this gate did not pass: {gates}"
            failures.append((event.step_key, message))
    return RunOutcome(run_id, result.success, time.monotonic() - begun, checks, tuple(failures))


def latest_checks(instance: dg.DagsterInstance) -> list[dict[str, Any]]:
    """Return the latest result of every check of the graph: {asset, name, passed, sentence}; passed null: never ran."""
    from flywheel_pipeline.build import build_defs

    keys = sorted(
        build_defs().resolve_asset_graph().asset_check_keys,
        key=lambda key: (key.asset_key.to_user_string(), key.name),
    )
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    found = []
    for key in keys:
        record = records.get(key)
        evaluation = None
        if record is not None and record.event is not None and record.event.dagster_event is not None:
            evaluation = record.event.dagster_event.asset_check_evaluation_data
        found.append(
            {
                "asset": key.asset_key.to_user_string(),
                "name": key.name,
                "passed": None if evaluation is None else evaluation.passed,
                "sentence": None if evaluation is None else evaluation.description,
            }
        )
    return found
