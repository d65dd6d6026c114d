"""The application: routes, their OpenAPI description, and what is wrapped around them.

Belongs here: the one list of endpoints. Does not belong here: what they do. There is no docs page: it would load scripts
from another host; /openapi.json is the document, and any viewer shows it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flywheel_pipeline import __version__
from flywheel_pipeline.delivery.api.commands import Acknowledgement, StateReport, acknowledge, report_state
from flywheel_pipeline.delivery.api.connections import Connections
from flywheel_pipeline.delivery.api.executions import post_executions
from flywheel_pipeline.delivery.api.headers import SecurityHeaders
from flywheel_pipeline.delivery.api.limits import Limits
from flywheel_pipeline.delivery.api.metrics import Observation, Observed, health, metrics
from flywheel_pipeline.delivery.api.problems import Problem, json_response
from flywheel_pipeline.delivery.api.state import Worker
from flywheel_pipeline.delivery.api.sync import sync
from flywheel_pipeline.telemetry.contract import ExecutionPost

_log = logging.getLogger("flywheel.api")


class ProblemBody(BaseModel):
    """Why a request was refused."""

    code: str
    reason: str
    hint: str


_SCHEMAS: Final[dict[str, type[BaseModel]]] = {
    "ExecutionPost": ExecutionPost,
    "Acknowledgement": Acknowledgement,
    "StateReport": StateReport,
    "Problem": ProblemBody,
}
_UUID: Final = {"type": "string", "format": "uuid"}
_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_STAMP: Final = {"type": "string", "format": "date-time"}
_ROW: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["position", "outcome", "execution_id"],
    "properties": {
        "position": _COUNT,
        "outcome": {"enum": ["inserted", "corrected", "unchanged", "rejected"]},
        "execution_id": {"type": ["string", "null"]},
        "reason_code": _TEXT,
        "reason": _TEXT,
        "reject_id": {"type": "integer"},
    },
}
_BATCH: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["received", "inserted", "corrected", "unchanged", "rejected", "results"],
    "properties": {
        **dict.fromkeys(("received", "inserted", "corrected", "unchanged", "rejected"), _COUNT),
        "results": {"type": "array", "items": {"$ref": "#/components/schemas/ExecutionResult"}},
    },
}
_MANIFEST: Final[dict[str, Any]] = {
    "type": "object",
    "required": [
        "rules",
        "healing_tier",
        "version",
        "count",
        "manifest_hash",
        "rule_versions",
        "tombstones",
        "commands",
    ],
    "properties": {
        "rules": {"type": "array", "items": {"type": "object"}},
        "healing_tier": {"type": ["string", "null"]},
        "version": _TEXT,
        "count": _COUNT,
        "manifest_hash": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "rule_versions": {"type": "object", "additionalProperties": {"type": "integer"}},
        "tombstones": {"type": "array", "items": {"type": "object"}},
        "commands": {"type": "array", "items": {"$ref": "#/components/schemas/Command"}},
    },
}
_COMMAND: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["id", "command_type", "params"],
    "properties": {
        "id": _UUID,
        "command_type": _TEXT,
        "params": {"type": "object"},
        "created_at": _STAMP,
        "expires_at": {"type": ["string", "null"], "format": "date-time"},
    },
}
_REASONS: Final = {
    400: "The request is no HTTP, or its sender went away.",
    401: "No token, or one that does not hold.",
    403: "The token is for another site or appliance, or its appliance is out of service.",
    404: "This appliance has no such command.",
    408: "The body took too long.",
    413: "The body, what it inflates to, or the number of its rows is above the limit.",
    415: "The media type or encoding is none of those listed.",
    422: "The body cannot be taken: code, reason and hint say why; a batch whose rows were all refused lists each.",
    429: "Too much at once: Retry-After says when.",
    500: "A failure of the server; its log says why.",
    503: "The database cannot be used, or the manifest is not built yet: Retry-After says when.",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _REASONS[status], "content": schema} for status in statuses}


def _answers(schema: dict[str, Any], description: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {"application/json": {"schema": schema}}}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_OWN: Final = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "schema": _TEXT,
        "description": f"The {what} of the token, or nothing.",
    }
    for name, what in (("site_id", "site"), ("appliance_id", "appliance"))
]
_BEARER: Final[list[dict[str, list[str]]]] = [{"bearer": []}]


def create_app(engine: sa.Engine, limits: Limits | None = None, *, metrics_token: str | None = None) -> FastAPI:
    """The agent API on a database.

    Args:
        engine: the database, upgraded to this release; disposed of when the application ends.
        limits: what one worker takes.
        metrics_token: who may read /metrics from other machines; None: nobody.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.worker.connections.close()

    app = FastAPI(
        title="Flywheel agent API",
        version=__version__,
        description="How appliances report executions, fetch rules and commands, and say what they run.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.worker = Worker(Connections(engine), limits or Limits())
    app.state.observed = Observed(metrics_token)
    _add_routes(app)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Observation)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_document(app))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> None:
    post, batch = _reference("ExecutionPost"), {"type": "array", "items": _reference("ExecutionPost")}
    app.add_api_route(
        "/api/agent/executions",
        post_executions,
        methods=["POST"],
        operation_id="post_executions",
        responses={
            **_answers(_reference("BatchResult"), "Taken, or taken in part: each row with what became of it."),
            **_refusals(400, 401, 403, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra={
            "security": _BEARER,
            "parameters": _OWN,
            "requestBody": {
                "required": True,
                "description": "One post, a JSON array of posts, or NDJSON; Content-Encoding may be gzip.",
                "content": {
                    "application/json": {"schema": {"anyOf": [post, batch]}},
                    "application/x-ndjson": {"schema": {"type": "string"}},
                },
            },
        },
    )
    app.add_api_route(
        "/agent/sync",
        sync,
        methods=["GET"],
        operation_id="sync",
        responses={
            **_answers(_reference("Manifest"), "What the appliance should run, and its open commands."),
            304: {"description": "The caller has this answer already."},
            **_refusals(401, 403, 429, 500, 503),
        },
        openapi_extra={
            "security": _BEARER,
            "parameters": [
                *_OWN,
                {
                    "name": "If-None-Match",
                    "in": "header",
                    "required": False,
                    "schema": _TEXT,
                    "description": "The ETag of the answer before.",
                },
            ],
        },
    )
    app.add_api_route(
        "/api/agent/commands/{command_id}/ack",
        acknowledge,
        methods=["POST"],
        operation_id="acknowledge",
        responses={
            **_answers(
                {
                    "type": "object",
                    "required": ["id", "status", "changed"],
                    "properties": {"id": _UUID, "status": _TEXT, "changed": {"type": "boolean"}},
                },
                "Recorded, now or before.",
            ),
            **_refusals(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra={
            "security": _BEARER,
            "parameters": [{"name": "command_id", "in": "path", "required": True, "schema": _UUID}, *_OWN],
            "requestBody": {
                "required": False,
                "content": {"application/json": {"schema": _reference("Acknowledgement")}},
            },
        },
    )
    app.add_api_route(
        "/api/agent/state",
        report_state,
        methods=["POST"],
        operation_id="report_state",
        responses={
            **_answers(
                {
                    "type": "object",
                    "required": ["appliance_id", "recorded_at", "desired_manifest_hash", "in_sync"],
                    "properties": {
                        "appliance_id": _TEXT,
                        "recorded_at": _STAMP,
                        "desired_manifest_hash": {"type": ["string", "null"]},
                        "in_sync": {"type": "boolean"},
                    },
                },
                "Recorded.",
            ),
            **_refusals(400, 401, 403, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra={
            "security": _BEARER,
            "parameters": _OWN,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _reference("StateReport")}}},
        },
    )
    app.add_api_route(
        "/healthz",
        health,
        methods=["GET"],
        operation_id="health",
        responses={
            **_answers({"type": "object", "required": ["status"], "properties": {"status": _TEXT}}, "Ready."),
            **_refusals(500, 503),
        },
    )
    app.add_api_route(
        "/metrics",
        metrics,
        methods=["GET"],
        operation_id="metrics",
        responses={
            200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": _TEXT}}},
            **_refusals(401, 403, 500, 503),
        },
        openapi_extra={"security": [{}, {"bearer": []}]},
    )


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, Any] = {
        "ExecutionResult": _ROW,
        "BatchResult": _BATCH,
        "Manifest": _MANIFEST,
        "Command": _COMMAND,
    }
    for name, model in _SCHEMAS.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[name] = schema
    document["components"] = {
        "schemas": schemas,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer", "description": "`flywheel tokens issue APPLIANCE`"}
        },
    }
    return document


async def _problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)  # noqa: S101 - registered for it
    return error.response()


async def _http_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    codes = {404: "no_such_path", 405: "method_not_allowed"}
    return json_response(
        {
            "code": codes.get(error.status_code, "refused"),
            "reason": str(error.detail),
            "hint": "/openapi.json lists the paths and their methods.",
        },
        error.status_code,
        error.headers,
    )
