"""FLYWHEEL_* settings, read from the environment.

Belongs here: where state lives, which database, which port. Does not belong here: promotion policy (YAML in
`promotion/policies/`), and anything that changes a decision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from flywheel_pipeline.errors import UsageError


class Settings(BaseSettings):
    """One reading of the FLYWHEEL_* environment variables.

    `home` (default `.flywheel` in the working directory) holds the embedded database, DAGSTER_HOME and logs.
    `database_url` unset or empty means the embedded server. `alert_urls` holds Apprise URLs separated by white space,
    `alert_rules` a YAML file of who hears what; `ui_url` is where links in alerts lead. `deliver_within_hours`: from
    promotion to delivery, and from a changed manifest to the appliance's report of it; `execute_within_hours`: from
    delivery to the first execution anywhere; `settle_within_hours`: from a command to its answer. `archive_url`: a folder or
    an fsspec URL for closed days of telemetry; unset, nothing is archived. `archive_after_days`: full days (UTC) that pass
    after a day's end before it counts as closed. `engine`: who computes rebuilds and backfills; the refresh of every minute is
    always PostgreSQL's. `spark_master`: URL of the Spark master, for the engine spark.

    `run_launcher` says where runs are executed (this host, Celery workers, a cluster) and `executor` how the steps of
    those that are not the minute path's; `run_slots` is how many runs at once over all hosts. `code_server` is the
    address, `host:port`, of a code location that runs as a server of its own at `code_host` and `code_port`.
    """

    model_config = SettingsConfigDict(env_prefix="FLYWHEEL_", frozen=True, extra="ignore", validate_default=True)

    home: Path = Path(".flywheel")
    database_url: SecretStr | None = None
    prepare_statements: bool = True  # false: behind a pooler that gives a session to one transaction at a time
    ui_host: str = "127.0.0.1"
    ui_port: int = Field(default=3000, ge=1, le=65535)
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=1, le=65535)
    api_workers: int = Field(default=2, ge=1, le=64)
    api_metrics_token: SecretStr | None = None
    ui_url: str | None = None
    alert_urls: SecretStr | None = None
    alert_rules: Path | None = None
    # Service levels of delivery: what takes longer is a warning with the offenders and their age. They decide nothing.
    deliver_within_hours: float = Field(default=24.0, gt=0)
    execute_within_hours: float = Field(default=14 * 24.0, gt=0)
    settle_within_hours: float = Field(default=48.0, gt=0)
    run_days: int = Field(default=30, ge=1, le=3650)  # of Dagster's finished runs, with their event logs
    reject_days: int = Field(default=90, ge=1, le=3650)  # of rejects since they were decided; open ones stay
    run_launcher: Literal["default", "celery", "k8s"] = "default"
    executor: Literal["in_process", "multiprocess", "k8s"] = "in_process"
    run_slots: int = Field(default=4, ge=1, le=1000)
    celery_broker_url: SecretStr | None = None
    code_server: str | None = Field(default=None, pattern=r"^[^\s:/]+:[1-9][0-9]{0,4}$")
    code_host: str = "127.0.0.1"
    code_port: int = Field(default=4000, ge=1, le=65535)
    k8s_image: str | None = None
    k8s_namespace: str = "flywheel"
    k8s_service_account: str = "flywheel"
    k8s_instance_config_map: str = "flywheel-dagster"
    k8s_env_from: str = "flywheel"  # name of the Secret whose keys are the environment of its pods

    archive_url: SecretStr | None = None
    archive_after_days: int = Field(default=1, ge=0, le=3650)
    engine: Literal["postgres", "duckdb", "spark"] = "postgres"
    spark_master: str = "local[*]"

    @field_validator("home", mode="after")
    @classmethod
    def _resolve_home(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator(
        "database_url",
        "ui_url",
        "alert_urls",
        "alert_rules",
        "api_metrics_token",
        "celery_broker_url",
        "code_server",
        "archive_url",
        "k8s_image",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if isinstance(value, str) and not value.strip() else value

    @property
    def dagster_home(self) -> Path:
        """DAGSTER_HOME: the instance configuration and compute logs."""
        return self.home / "dagster"

    @property
    def logs(self) -> Path:
        """Log files of the processes that `flywheel up` starts."""
        return self.home / "logs"


def get_settings() -> Settings:
    """Read the environment now.

    Raises UsageError, naming the variable, when a value is not usable.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        variable = "FLYWHEEL_" + "_".join(str(part) for part in first["loc"]).upper()
        raise UsageError(
            f"The environment variable {variable} is not usable: {first['msg']}.",
            hint=f"Correct or unset {variable}.",
        ) from error
