"""The telemetry table's contract as a Great Expectations suite, run over its latest rows.

Belongs here: the expectations, and results as plain values. Does not belong here: what may enter (`contract`
refuses that first) and Dagster. Great Expectations is imported inside the functions: it costs 4 to 6 seconds.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal

import sqlalchemy as sa

from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.telemetry.contract import CLOCK_TOLERANCE, OLDEST, REQUIRED_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations import ExpectationSuite

#: Rows looked at where nothing else is said: about 1.5 seconds of validation.
LATEST_ROWS: Final = 20_000
_SHOWN_OFFENDERS: Final = 20

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True, slots=True)
class ExpectationResult:
    """One expectation, judged.

    `passed` is False both when rows break it and when it could not be judged; then `error` says why and
    `observed` is empty. `offenders` counts breaking rows (None where the expectation is not about rows), and
    `sample` shows some of their values.
    """

    name: str
    passed: bool
    severity: Severity
    observed: str
    offenders: int | None = None
    sample: tuple[str, ...] = ()
    error: str | None = None


def latest_rows(connection: sa.Connection, limit: int = LATEST_ROWS) -> pd.DataFrame:
    """The rows that arrived last, at most `limit`, with the columns of `execution_telemetry`."""
    import pandas as pd

    columns = [column for column in execution_telemetry.c if not isinstance(column.type, sa.JSON)]
    query = sa.select(*columns).order_by(execution_telemetry.c.id.desc()).limit(limit)
    result = connection.execute(query)
    return pd.DataFrame(result.fetchall(), columns=list(result.keys()))


def run_suite(
    frame: pd.DataFrame, *, as_of: datetime, suite: ExpectationSuite | None = None
) -> list[ExpectationResult]:
    """Judge rows (columns of `execution_telemetry`, without the JSON ones) by the suite of the contract.

    `as_of` (aware) is the clock for rows from the future or from years ago; `suite` replaces
    `telemetry_suite(as_of)`. An expectation that raises, or that names a missing column, gives a result with
    `error`; it is no pass.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read while Great Expectations is imported
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("telemetry")
        .add_dataframe_asset("latest_rows")
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": frame})
    )
    validated = batch.validate(suite or telemetry_suite(as_of), result_format="SUMMARY")
    return [_result(result) for result in validated.results]


def telemetry_suite(as_of: datetime) -> ExpectationSuite:
    """The suite: identity, vocabulary, ranges and clocks of `execution_telemetry` as of `as_of` (aware)."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx

    gxe: Any = import_module("great_expectations.expectations")  # it exports nothing that mypy would see
    required = sorted(REQUIRED_COLUMNS | {"created_at", "event_at", "appliance_id"})
    return gx.ExpectationSuite(
        name="execution_telemetry",
        expectations=[
            gxe.ExpectTableRowCountToBeBetween(min_value=1, severity="critical"),  # no rows prove nothing
            gxe.ExpectColumnValuesToBeUnique(column="execution_id", severity="critical"),
            *(gxe.ExpectColumnValuesToNotBeNull(column=name, severity="critical") for name in required),
            *(
                gxe.ExpectColumnValuesToMatchRegex(column=name, regex=r"\S", severity="critical")
                for name in ("execution_id", "site_id", "hostname", "runbook_id")
            ),
            gxe.ExpectColumnValuesToBeInSet(
                column="resolution_level", value_set=["L1", "L2", "L3"], severity="critical"
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="event_at",
                min_value=as_of - OLDEST,
                max_value=as_of + CLOCK_TOLERANCE,
                severity="critical",
            ),
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="completed_at",
                column_B="started_at",
                or_equal=True,
                ignore_row_if="either_value_is_missing",
                severity="critical",
            ),
            gxe.ExpectColumnValuesToBeBetween(column="duration_seconds", min_value=0, severity="critical"),
            gxe.ExpectColumnValuesToBeBetween(column="confidence", min_value=0, max_value=1, severity="critical"),
            gxe.ExpectColumnValuesToNotBeNull(column="incident_type", mostly=0.99, severity="warning"),
            gxe.ExpectColumnValuesToNotBeNull(column="platform", mostly=0.95, severity="warning"),
            gxe.ExpectColumnValuesToBeInSet(
                column="status", value_set=["success", "failure", "partial"], mostly=0.95, severity="warning"
            ),
            gxe.ExpectColumnValuesToNotBeNull(column="agent_version", mostly=0.5, severity="info"),
        ],
    )


def _result(result: Any) -> ExpectationResult:
    configuration = result.expectation_config
    severity: Severity = getattr(configuration.severity, "value", configuration.severity) or "critical"
    name = _name(configuration.type, configuration.kwargs)
    error = _error(result.exception_info)
    if error is not None:
        return ExpectationResult(name, False, severity, "", error=error)
    found: dict[str, Any] = dict(result.result)
    offenders = found.get("unexpected_count")
    if offenders is None:
        observed = str(found.get("observed_value", ""))
    else:
        observed = f"{offenders} of {found.get('element_count', 0)} rows break it"
    return ExpectationResult(
        name,
        bool(result.success),
        severity,
        observed,
        offenders=None if offenders is None else int(offenders),
        sample=tuple(str(value) for value in found.get("partial_unexpected_list", ())[:_SHOWN_OFFENDERS]),
    )


def _name(kind: str, arguments: dict[str, Any]) -> str:
    """`expect_column_values_to_not_be_null`, column site_id -> `site_id values to not be null`."""
    columns = [arguments[key] for key in ("column", "column_A", "column_B") if key in arguments]
    words = kind.removeprefix("expect_").removeprefix("column_").replace("pair_", "").replace("_", " ")
    return " ".join([*columns, words])


def _error(info: Any) -> str | None:
    """The first exception in `exception_info`, which is either one record or one per metric."""
    if not info:
        return None
    for record in [info] if "raised_exception" in info else info.values():
        if record.get("raised_exception"):
            return str(record.get("exception_message") or "the expectation raised without a message")
    return None
