"""Human acts as Dagster jobs: a launchpad form with actor and reason, the same function as the command line."""

from typing import Any, cast

import dagster as dg
from pydantic import Field

from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.promotion.acts import Act, act, scope_of
from flywheel_pipeline.sql_models.metadata import unlinked

ACTS: dict[str, str] = {
    "approve": "Approves patterns by name; the next run's gates read it. Subjects: pattern keys.",
    "reject": "Rejects patterns. Subjects: pattern keys.",
    "quarantine": "Takes rules out of service and out of every manifest; at one site or agent version only, if named. "
    "Subjects: rule ids.",
    "lift": "Ends the quarantine of rules at a site or an agent version; their CUSUM there begins anew. Subjects: rule ids.",
    "pause": "Stops the rollout of rules at their step; they are still demoted. Subjects: rule ids.",
    "resume": "Lets paused rollouts go on. Subjects: rule ids.",
    "abort": "Backs out of a rollout: quarantined, out of every manifest, back as a new version only. Subjects: rule ids.",
    "retire": "Retires rules for ever. Subjects: rule ids.",
    "freeze": "Stops promotion until it is thawed; never stops demotion. No subjects.",
    "thaw": "Ends a freeze. No subjects.",
}
READMIT = "Re-admits a quarantined rule as a new version, with changed content; it begins again as proposed."


class Signed(dg.Config):
    """What is acted on, who acts, and why."""

    subjects: list[str] = Field(default=[], description="pattern keys for approve and reject, rule ids else")
    actor: str = Field(description="who decides this, by name")
    reason: str = Field(description="why, for the auditor who asks next year")


class Scoped(Signed):
    """As signed, for a part of the fleet: a site or an agent version; neither: the whole rule."""

    site: str = Field(default="", description="only at this site")
    agent_version: str = Field(default="", description="only on agents of this release")


class Readmission(dg.Config):
    """Which rule comes back, with what changed, who acts, and why. What is left empty stays as it was."""

    rule_id: str = Field(description="a quarantined rule")
    runbook_id: str = Field(default="", description="the runbook it is to run now")
    incident_type: str = Field(default="", description="the incident type it is to match now")
    platform: str = Field(default="", description="windows, linux or macos")
    actor: str = Field(description="who decides this, by name")
    reason: str = Field(description="why, for the auditor who asks next year")


def _form(step: str, **fields: Any) -> dict[str, Any]:
    """Return the run configuration that the launchpad opens with: every field of the form, to be filled in."""
    return {"ops": {step: {"config": {**fields, "actor": "", "reason": ""}}}}


def _tags(name: str) -> dict[str, str]:
    return {"flywheel/trigger": "human_act", "flywheel/act": name}


def _act(
    context: dg.OpExecutionContext,
    database: FlywheelDatabase,
    what: Act,
    subjects: list[str],
    actor: str,
    reason: str,
    change: dict[str, Any] | None = None,
    scope: tuple[str, str] | None = None,
) -> None:
    try:
        reports = act(database.engine, what, subjects, actor=actor, reason=reason, change=change, scope=scope)
    except FlywheelError as error:
        raise dg.Failure(description=f"{error.message} {error.hint or ''}".strip(), allow_retries=False) from None
    for report in reports:
        context.log.info(unlinked(f"{report.subject}: {report.message}"))
    refused = [report for report in reports if not report.done]
    if refused:
        said = "; ".join(f"{report.subject}: {report.message}" for report in refused)
        raise dg.Failure(description=unlinked(said), allow_retries=False)


def _human_job(name: str, description: str) -> dg.JobDefinition:
    step = f"{name}_act"

    @dg.op(name=step)
    def do(context: dg.OpExecutionContext, config: Signed, database: FlywheelDatabase) -> None:
        _act(context, database, cast(Act, name), config.subjects, config.actor, config.reason)

    form = _form(step) if name in ("freeze", "thaw") else _form(step, subjects=[])

    @dg.job(
        name=f"human_{name}",
        description=description,
        executor_def=dg.in_process_executor,
        config=form,
        tags=_tags(name),
    )
    def job() -> None:
        do()

    return job


def _scoped_job(name: str, description: str) -> dg.JobDefinition:
    step = f"{name}_act"

    @dg.op(name=step)
    def do(context: dg.OpExecutionContext, config: Scoped, database: FlywheelDatabase) -> None:
        try:
            scope = scope_of(config.site, config.agent_version)
        except FlywheelError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None
        _act(context, database, cast(Act, name), config.subjects, config.actor, config.reason, scope=scope)

    form = _form(step, subjects=[], site="", agent_version="")

    @dg.job(
        name=f"human_{name}",
        description=description,
        executor_def=dg.in_process_executor,
        config=form,
        tags=_tags(name),
    )
    def job() -> None:
        do()

    return job


def _readmit_job() -> dg.JobDefinition:
    @dg.op
    def readmit_act(context: dg.OpExecutionContext, config: Readmission, database: FlywheelDatabase) -> None:
        change: dict[str, Any] = {}
        if config.runbook_id:
            change["runbook_id"] = config.runbook_id
        if config.incident_type:
            change["incident_pattern"] = {"incident_type": config.incident_type}
        if config.platform:
            change["platform"] = config.platform
        _act(context, database, "readmit", [config.rule_id], config.actor, config.reason, change)

    @dg.job(
        name="human_readmit",
        description=READMIT,
        executor_def=dg.in_process_executor,
        tags=_tags("readmit"),
        config=_form("readmit_act", rule_id="", runbook_id="", incident_type="", platform=""),
    )
    def job() -> None:
        readmit_act()

    return job


def human_jobs() -> list[dg.JobDefinition]:
    """Return one job for each human act."""
    scoped = ("quarantine", "lift")
    return [
        *((_scoped_job if name in scoped else _human_job)(name, description) for name, description in ACTS.items()),
        _readmit_job(),
    ]
