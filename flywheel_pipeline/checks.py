"""Findings as Dagster asset checks: one adapter for every room, so that each check looks alike and fails closed.

Belongs here: the conversion and the recording of gate verdicts. Does not belong here: any question.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch, open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.quality import Finding, record_error, record_verdict
from flywheel_pipeline.sql_models.metadata import as_metadata, markdown_table, unlinked

LONGEST_CELL = 400  # of a sample: three error templates of a failing rule

Question = Callable[[sa.Engine, Batch, Mapping[str, str]], Finding]


@dataclass(frozen=True)
class Check:
    """One check: the asset it speaks of, its name as a statement, and how to answer it.

    `gate`: its verdict is required for promotion, and it blocks what is downstream in the run.
    `warn`: a failure is a warning, unless the finding says how severe it is.
    """

    asset: str
    name: str
    description: str
    question: Question
    gate: bool = False
    warn: bool = False


def to_result(check: Check, finding: Finding) -> dg.AssetCheckResult:
    """Turn a finding into the check result that the UI shows.

    The sentence is its description; observed, required, offenders, figures (plotted) and a sample are its metadata.
    """
    metadata: dict[str, object] = {
        "observed": finding.observed,
        "required": finding.required,
        "offenders": finding.offenders,
        **{name: round(figure, 4) if isinstance(figure, float) else figure for name, figure in finding.figures.items()},
    }
    if finding.sample:
        metadata["sample"] = dg.MetadataValue.md(markdown_table(finding.sample, longest_cell=LONGEST_CELL))
    for name, page in finding.pages.items():
        metadata[name] = dg.MetadataValue.md(page)
    for name, path in finding.paths.items():
        metadata[name] = dg.MetadataValue.path(path)
    warn = check.warn if finding.severe is None else not finding.severe
    return dg.AssetCheckResult(
        passed=bool(finding.passed),
        asset_key=check.asset,
        check_name=check.name,
        severity=dg.AssetCheckSeverity.WARN if warn else dg.AssetCheckSeverity.ERROR,
        # The page renders this as Markdown, which would swallow masks such as <hex> and make links.
        description=unlinked(finding.sentence),
        metadata={key: as_metadata(value) for key, value in metadata.items() if value is not None},
    )


def check_step(name: str, checks: list[Check]) -> dg.AssetChecksDefinition:
    """Build one step that answers these checks in order; every one of them yields a result, or the step fails.

    A gate's verdict is committed before its result is yielded. A gate that cannot answer leaves the verdict `error`
    and fails the step: what is downstream does not run, and the database refuses the batch's promotions.
    """

    @dg.multi_asset_check(
        name=name,
        specs=[
            dg.AssetCheckSpec(check.name, asset=check.asset, description=check.description, blocking=check.gate)
            for check in checks
        ],
        can_subset=False,
    )
    def step(context: dg.AssetCheckExecutionContext, database: FlywheelDatabase) -> Iterator[dg.AssetCheckResult]:
        engine = database.engine
        with engine.begin() as connection:
            batch = open_batch(connection, context.run.run_id)
        for check in checks:
            try:
                finding = check.question(engine, batch, context.run.tags)
            except Exception as error:
                if check.gate:
                    with engine.begin() as connection:
                        record_error(connection, batch.batch_id, check.name, error)
                raise
            if check.gate:
                with engine.begin() as connection:
                    record_verdict(connection, batch.batch_id, check.name, finding)
            context.log.info(f"{check.name}: {'pass' if finding.passed else 'FAIL'}. {unlinked(finding.sentence)}")
            yield to_result(check, finding)

    return step


def reading(question: Callable[[sa.Connection], Finding]) -> Question:
    """Adapt a question that needs only a connection."""

    def ask(engine: sa.Engine, _batch: Batch, _tags: Mapping[str, str]) -> Finding:
        with engine.connect() as connection:
            return question(connection)

    return ask


def at_batch(question: Callable[[sa.Connection, dt.datetime], Finding]) -> Question:
    """Adapt a question that needs a connection and the clock of the batch."""

    def ask(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
        with engine.connect() as connection:
            return question(connection, batch.now)

    return ask
