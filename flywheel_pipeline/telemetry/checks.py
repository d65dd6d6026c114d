"""Dagster checks of the telemetry room."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.checks import Check, check_step, reading
from flywheel_pipeline.quality import Finding
from flywheel_pipeline.telemetry import quality


def _contract(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    with engine.connect() as connection:
        return quality.telemetry_contract(connection, batch.now)


def _freshness(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    with engine.connect() as connection:
        return quality.telemetry_freshness(connection, batch.now)


def _releases(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    with engine.connect() as connection:
        return quality.agent_releases_report(connection, batch.now)


def _suite(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
    from flywheel_pipeline.telemetry.suite import LATEST_ROWS, latest_rows, run_suite

    with engine.connect() as connection:
        frame = latest_rows(connection)
    results = run_suite(frame, as_of=batch.now)
    errors = [r for r in results if r.error is not None]
    if errors:
        raise RuntimeError(f"the suite could not judge {errors[0].name}: {errors[0].error}")
    broken = [r for r in results if not r.passed]
    return Finding(
        passed=not broken,
        sentence=f"All {len(results)} expectations hold over the latest {len(frame):,} rows."
        if not broken
        else f"{len(broken)} of {len(results)} expectations are broken, first {broken[0].name}: {broken[0].observed}.",
        observed=f"{len(broken)} broken",
        required=f"none, over the latest {LATEST_ROWS:,} rows",
        offenders=len(broken),
        sample=[
            {
                "expectation": r.name,
                "passed": r.passed,
                "severity": r.severity,
                "observed": r.observed,
                "offenders": r.offenders,
                "sample": ", ".join(r.sample[:5]),
            }
            for r in sorted(results, key=lambda r: r.passed)
        ],
        figures={"expectations": len(results), "broken": len(broken), "rows": len(frame)},
    )


# Nightly only: importing Great Expectations costs 6 s of CPU, and the minute path asks the same of every touched row
# through telemetry_violations.
SUITE_CHECK = dg.AssetCheckKey(dg.AssetKey("execution_telemetry"), "expectation_suite")
telemetry_suite = check_step(
    "telemetry_suite",
    [
        Check(
            "execution_telemetry",
            "expectation_suite",
            "The latest rows of the log meet the Great Expectations suite of the contract; asked every night.",
            _suite,
        )
    ],
)

telemetry_checks = check_step(
    "telemetry_checks",
    [
        Check(
            "telemetry_violations",
            "telemetry_contract",
            "No row of the last 7 days breaks the telemetry contract. Required for promotion.",
            _contract,
            gate=True,
        ),
        Check(
            "telemetry_daily_volume",
            "telemetry_freshness",
            "The newest telemetry arrived within 24 hours. Required for promotion.",
            _freshness,
            gate=True,
        ),
        Check(
            "telemetry_violations",
            "no_skewed_clocks",
            "Every row has a credible event time.",
            reading(quality.no_skewed_clocks),
            warn=True,
        ),
        Check(
            "telemetry_violations",
            "no_open_rejects",
            "No rejected row waits to be retried or discarded.",
            reading(quality.no_open_rejects),
            warn=True,
        ),
        Check(
            "telemetry_daily_volume",
            "agent_releases_report",
            "Every agent release that reported through the week reported in the last 24 hours.",
            _releases,
            warn=True,
        ),
    ],
)
