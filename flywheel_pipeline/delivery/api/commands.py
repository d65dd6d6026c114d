"""POST /api/agent/commands/{id}/ack and POST /api/agent/state: what an appliance did, and what it runs.

Belongs here: the two small reports of an appliance about itself. Does not belong here: the life of commands (`publish`).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from flywheel_pipeline.delivery.api.auth import require_own
from flywheel_pipeline.delivery.api.problems import Problem, json_response
from flywheel_pipeline.delivery.api.state import admit, small_json, worker_of
from flywheel_pipeline.delivery.publish import acknowledge_command
from flywheel_pipeline.delivery.tokens import Caller
from flywheel_pipeline.errors import UsageError

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def _no_nul(value: str) -> str:
    if "\x00" in value:
        raise ValueError("holds a NUL character")
    return value


class Acknowledgement(BaseModel):
    """How a command ended on the appliance: done, or `failure` says why not. No body at all means done."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    failure: Annotated[
        Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(_no_nul)] | None,
        Field(description="Why it could not be done; null: done."),
    ] = None


_Form = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z_]{0,62}:?$")]


class StateReport(BaseModel):
    """What the appliance is and runs now. It replaces the report before it: what is left out is not known any more."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    agent_version: Annotated[
        str,
        StringConstraints(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,49}$"),
        Field(description="The agent's release, such as 1.0.70."),
    ]
    capabilities: Annotated[
        list[_Form] | None,
        Field(max_length=64, description="The action forms it understands; null: decided by its release."),
    ] = None
    manifest_hash: Annotated[
        str | None,
        StringConstraints(pattern=r"^[0-9a-f]{64}$"),
        Field(description="manifest_hash of the rule set it runs; null: it has none from us."),
    ] = None
    site_id: Annotated[str | None, Field(max_length=255, description="Must be the token's, where given.")] = None
    appliance_id: Annotated[str | None, Field(max_length=255, description="Must be the token's, where given.")] = None


async def acknowledge(request: Request) -> Response:
    """Answer a command: done, or failed with a reason. The same answer again changes nothing."""
    caller = await admit(request)
    named = str(request.path_params["command_id"])
    if _UUID.fullmatch(named) is None:
        raise Problem(422, "invalid_command_id", "A command id is a UUID.", "Take it from the answer of /agent/sync.")
    command_id = UUID(named)
    report = await small_json(request, Acknowledgement, empty=b"{}")
    answer = await worker_of(request).connections.write(
        caller, lambda connection: _acknowledged(connection, caller, command_id, report.failure)
    )
    return json_response(answer)


def _acknowledged(connection: sa.Connection, caller: Caller, command_id: UUID, failure: str | None) -> dict[str, Any]:
    try:
        changed = acknowledge_command(connection, caller.appliance_id, command_id, datetime.now(UTC), failure=failure)
    except UsageError:
        # The same answer whether the command is another's or nobody's.
        raise Problem(
            404,
            "no_such_command",
            "This appliance has no such command.",
            "Fetch the commands again: GET /agent/sync.",
        ) from None
    status = connection.execute(
        sa.text("SELECT status FROM appliance_commands WHERE id = :id"), {"id": command_id}
    ).scalar_one()
    return {"id": str(command_id), "status": status, "changed": changed}


async def report_state(request: Request) -> Response:
    """Record what the appliance is and runs; the time of it is the server's."""
    caller = await admit(request)
    report = await small_json(request, StateReport)
    require_own(
        caller,
        [] if report.site_id is None else [report.site_id],
        [] if report.appliance_id is None else [report.appliance_id],
    )
    return json_response(
        await worker_of(request).connections.write(caller, lambda connection: _recorded(connection, caller, report))
    )


def _recorded(connection: sa.Connection, caller: Caller, report: StateReport) -> dict[str, Any]:
    capabilities = None if report.capabilities is None else sorted({form.rstrip(":") for form in report.capabilities})
    recorded_at = connection.execute(
        sa.text(
            """
            UPDATE appliances SET agent_version = :version, capabilities = CAST(:capabilities AS jsonb),
              reported_manifest_hash = :hash, state_reported_at = now(), last_checkin = greatest(last_checkin, now()),
              status = CASE WHEN status = 'offline' THEN 'online' ELSE status END
            WHERE appliance_id = :appliance AND status <> 'retired'
            RETURNING state_reported_at
            """
        ).bindparams(sa.bindparam("capabilities", type_=sa.JSON(none_as_null=True))),
        {
            "version": report.agent_version,
            "capabilities": capabilities,
            "hash": report.manifest_hash,
            "appliance": caller.appliance_id,
        },
    ).scalar_one_or_none()
    desired = connection.execute(
        sa.text(
            "SELECT c.manifest_hash FROM appliance_manifests m JOIN manifest_contents c USING (content_hash) "
            "WHERE m.appliance_id = :appliance"
        ),
        {"appliance": caller.appliance_id},
    ).scalar_one_or_none()
    if recorded_at is None:
        raise Problem(403, "retired_appliance", "The appliance is not in service.", "Ask your operator.")
    return {
        "appliance_id": caller.appliance_id,
        "recorded_at": recorded_at.isoformat(),
        "desired_manifest_hash": desired,
        "in_sync": desired is not None and desired == report.manifest_hash,
    }
