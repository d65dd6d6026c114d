"""DAGSTER_HOME: the instance configuration of Dagster, with its storage in the same PostgreSQL.

Belongs here: writing dagster.yaml and the environment of Dagster's processes. Does not belong here: starting
those processes, and anything about assets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
import yaml
from sqlalchemy import URL, Engine

from flywheel_pipeline.database.engine import dagster_url
from flywheel_pipeline.database.roles import DAGSTER_SCHEMA
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.orchestration.launchers import launcher_config

# Sensors that wait for a NOTIFY inside their tick need threads of their own.
INSTANCE: Final[dict[str, Any]] = {
    "storage": {"postgres": {"postgres_url": {"env": "FLYWHEEL_DAGSTER_URL"}}},
    # A failed gate fails again: only crashes are retried.
    "run_retries": {"enabled": True, "max_retries": 2, "retry_on_asset_or_op_failure": False},
    # The daemon judges every asset's freshness policy twice a minute; the badge shows what it found last.
    "freshness": {"enabled": True},
    "sensors": {"use_threads": True, "num_workers": 4},
    "schedules": {"use_threads": True, "num_workers": 2},
    "retention": {
        "sensor": {"purge_after_days": {"skipped": 1, "failure": 30, "success": 30}},
        "schedule": {"purge_after_days": {"skipped": 7, "failure": 30, "success": 30}},
    },
    "telemetry": {"enabled": False},
    "nux": {"enabled": False},
}

_NOTE = "# Written by Flywheel at each start: changes here are lost. The database URL is in the environment.\n"


def instance_config(settings: Settings) -> dict[str, Any]:
    """Return what `dagster.yaml` says, as a mapping; Helm values and ConfigMaps say the same.

    Raises UsageError when the launcher's extra or a setting of it is missing.
    """
    return {**INSTANCE, **launcher_config(settings)}


def write_dagster_home(settings: Settings, url: URL) -> Path:
    """Write `dagster.yaml` into the Dagster home and return that directory.

    The file names the environment variable of the database URL and never the URL itself, which may hold a
    password; `url` is verified to be usable by dagster-postgres. The file is written only when it changes:
    Dagster's processes may be reading it. Raises UsageError when the directory cannot be written, and as
    `instance_config` does.
    """
    dagster_url(url)
    home = settings.dagster_home
    file = home / "dagster.yaml"
    text = _NOTE + yaml.safe_dump(instance_config(settings), sort_keys=False)
    try:
        home.mkdir(parents=True, exist_ok=True)
        settings.logs.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            scratch = file.with_name("dagster.yaml.new")
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(file)
    except OSError as error:
        raise UsageError(
            f"The Dagster home {home} cannot be written: {error.strerror}.",
            hint="Set FLYWHEEL_HOME to a directory of your own.",
        ) from error
    return home


def make_dagster_storage(engine: Engine) -> bool:
    """Have Dagster make its tables, where there are none yet; return whether it did.

    Done by the owner, they are open to each login that has a role for it; made at the start of whichever login comes first,
    they would be that login's alone.
    """
    with engine.connect() as connection:
        tables = set(sa.inspect(connection).get_table_names(DAGSTER_SCHEMA))
    if {"runs", "event_logs", "jobs"} <= tables:  # the tables by which its three storages know
        return False
    from dagster_postgres import DagsterPostgresStorage

    DagsterPostgresStorage(dagster_url(engine.url))  # makes what is missing; keeps no connection
    return True


def dagster_environment(settings: Settings, url: URL) -> dict[str, str]:
    """Return the variables that Dagster's processes and their runs need, to be merged into os.environ."""
    return {
        "DAGSTER_HOME": str(settings.dagster_home),
        "FLYWHEEL_DAGSTER_URL": dagster_url(url),
        "FLYWHEEL_DATABASE_URL": url.render_as_string(hide_password=False),
        "FLYWHEEL_HOME": str(settings.home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }
