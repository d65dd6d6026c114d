"""Human acts as Dagster jobs: a launchpad form with actor and reason, the same function as the command line."""

from typing import cast

import dagster as dg
from pydantic import Field

from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.promotion.acts import Act, act

ACTS: dict[str, str] = {
    "approve": "Approves patterns by name; the next run's gates read it. Subjects: pattern keys.",
    "reject": "Rejects patterns. Subjects: pattern keys.",
    "quarantine": "Takes rules out of service and out of every manifest. Subjects: rule ids.",
    "retire": "Retires rules for ever. Subjects: rule ids.",
    "freeze": "Stops promotion until it is thawed; never stops demotion. No subjects.",
    "thaw": "Ends a freeze. No subjects.",
}


class Signed(dg.Config):
    """What is acted on, who acts, and why."""

    subjects: list[str] = Field(default=[], description="pattern keys for approve and reject, rule ids else")
    actor: str = Field(description="who decides this, by name")
    reason: str = Field(description="why, for the auditor who asks next year")


def _human_job(name: str, description: str) -> dg.JobDefinition:
    @dg.op(name=f"{name}_act")
    def do(context: dg.OpExecutionContext, config: Signed, database: FlywheelDatabase) -> None:
        reports = act(database.engine, cast(Act, name), config.subjects, actor=config.actor, reason=config.reason)
        for report in reports:
            context.log.info(f"{report.subject}: {report.message}")
        refused = [report for report in reports if not report.done]
        if refused:
            raise dg.Failure(description="; ".join(f"{r.subject}: {r.message}" for r in refused), allow_retries=False)

    @dg.job(name=f"human_{name}", description=description, executor_def=dg.in_process_executor)
    def job() -> None:
        do()

    return job


def human_jobs() -> list[dg.JobDefinition]:
    """Return one job for each human act that needs no more than subjects, actor and reason."""
    return [_human_job(name, description) for name, description in ACTS.items()]
