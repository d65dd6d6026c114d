"""Contracts in Dagster: one check an asset, the job that asks them, and the job that builds Data Docs.

Belongs here: the glue. Does not belong here: expectations and Great Expectations. Nothing here runs on the minute
path: judging costs seconds, and `telemetry_violations` asks the essentials of every touched row there.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace

import dagster as dg
import sqlalchemy as sa
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from flywheel_pipeline.aggregates.batches import Batch
from flywheel_pipeline.checks import Check, Question, check_step
from flywheel_pipeline.contracts.declared import Contract
from flywheel_pipeline.contracts.registry import CONTRACTS
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.quality import Finding

CHECK_NAME = "expectation_suite"
CONTRACTS_JOB = "contracts"
DATA_DOCS_JOB = "build_data_docs"

CONTRACT_CHECKS = tuple(dg.AssetCheckKey(dg.AssetKey(contract.asset), CHECK_NAME) for contract in CONTRACTS)


def _asking(contract: Contract) -> Question:
    def ask(engine: sa.Engine, batch: Batch, _tags: Mapping[str, str]) -> Finding:
        from flywheel_pipeline.contracts.adapter import judge_contract, to_finding
        from flywheel_pipeline.contracts.data_docs import data_docs_folder

        with engine.connect() as connection:
            results, rows = judge_contract(connection, contract, batch.now)
        page = data_docs_folder() / f"{contract.asset}.html"
        return replace(to_finding(contract, results, rows), paths={"data_docs": str(page)})

    return ask


# A step for each: that of the log must not wait for the registry, which a failed gate keeps from being made.
contract_steps = [
    check_step(
        f"{contract.asset}_contract",
        [
            Check(
                contract.asset,
                CHECK_NAME,
                f"{contract.title}: {contract.scope} meet the expectations of the contract; asked every night.",
                _asking(contract),
            )
        ],
    )
    for contract in CONTRACTS
]


def build_contracts_job() -> UnresolvedAssetJobDefinition:
    """Build the job `contracts`: the four suites, whenever somebody asks."""
    return dg.define_asset_job(
        CONTRACTS_JOB,
        selection=dg.AssetSelection.checks(*CONTRACT_CHECKS),
        description="Judges telemetry, runbook catalogue, candidates and rules by their contracts.",
        executor_def=dg.in_process_executor,
    )


def build_data_docs_job() -> dg.JobDefinition:
    """Build the job `build_data_docs`: it judges every contract and writes the pages."""

    @dg.op
    def write_pages(context: dg.OpExecutionContext, database: FlywheelDatabase) -> None:
        from flywheel_pipeline.contracts.data_docs import data_docs_folder, judge_all, write_data_docs

        now = dt.datetime.now(dt.UTC)
        judged = judge_all(database.engine, now)
        folder = data_docs_folder()
        index = write_data_docs(judged, folder, at=now)
        for item in judged:
            context.log_event(
                dg.AssetObservation(
                    item.contract.asset,
                    description=f"Data Docs written: {item.broken} of {len(item.results)} expectations broken.",
                    metadata={
                        "data_docs": dg.MetadataValue.path(str(folder / f"{item.contract.asset}.html")),
                        "expectations": len(item.results),
                        "broken": item.broken,
                        "rows_judged": item.rows,
                    },
                )
            )
        context.log.info(f"{sum(item.broken for item in judged)} broken expectations; the pages: {index}")

    @dg.job(
        name=DATA_DOCS_JOB,
        executor_def=dg.in_process_executor,
        description="Judges every contract and writes Data Docs, pages that open offline, under FLYWHEEL_HOME.",
    )
    def build_data_docs() -> None:
        write_pages()

    return build_data_docs


def build_data_docs_schedule(job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Build the nightly schedule of the pages, after the nightly run."""
    return dg.ScheduleDefinition(
        name="nightly_data_docs",
        job=job,
        cron_schedule="37 3 * * *",
        execution_timezone="UTC",
        tags={"flywheel/trigger": "nightly"},
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Data Docs of every contract, built after the nightly run.",
    )
