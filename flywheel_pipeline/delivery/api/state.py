"""What one worker of the API holds, and the few steps that every handler begins with.

Belongs here: connections, limits, and the order token -> rate -> site. Does not belong here: any endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import psycopg
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from flywheel_pipeline.delivery.api.auth import bearer_token, caller_of, require_own
from flywheel_pipeline.delivery.api.bodies import JSON, UnreadableBody, inflate, media_type, read_body, require_encoding
from flywheel_pipeline.delivery.api.connections import Connections
from flywheel_pipeline.delivery.api.limits import Gate, Limits, Rates
from flywheel_pipeline.delivery.api.problems import Problem
from flywheel_pipeline.delivery.tokens import Caller

Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(slots=True)
class Worker:
    """One worker: its connections, its limits, and the counters that hold them."""

    connections: Connections
    limits: Limits
    rates: Rates = field(init=False)
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.rates = Rates(self.limits)
        self.gate = Gate(self.limits.in_flight, self.limits.in_flight_per_appliance)


def worker_of(request: Request) -> Worker:
    """The worker that handles this request."""
    return cast(Worker, request.app.state.worker)


async def admit(request: Request, more: Callable[[psycopg.Connection[Any], Caller], Result]) -> tuple[Caller, Result]:
    """Authenticate the caller, hold the names in the query against it, and read `more` on the same connection.

    Raises:
        Problem: 401, 403, 429, or 503.
    """
    token = bearer_token(request)
    query = request.query_params
    sites, appliances = query.getlist("site_id"), query.getlist("appliance_id")

    def work(connection: psycopg.Connection[Any]) -> tuple[Caller, Result]:
        caller = caller_of(connection, token)
        require_own(caller, sites, appliances)
        return caller, more(connection, caller)

    worker = worker_of(request)
    caller, result = await worker.connections.read(work)
    worker.rates.request(caller.appliance_id)
    return caller, result


async def admit_alone(request: Request) -> Caller:
    """`admit` with nothing more to read."""
    caller, _ = await admit(request, lambda _connection, _caller: None)
    return caller


async def small_json(request: Request, model: type[Model], *, empty: bytes | None = None) -> Model:
    """The body of a request without rows, held against a model; `empty` stands for a body that is not there.

    Raises:
        Problem: 408, 413, 415; 422 naming the first three fields that are wrong.
    """
    limits = worker_of(request).limits
    gzipped = require_encoding(request)
    body = await read_body(request, limits.small_body_bytes, limits.body_seconds)
    if gzipped:
        try:
            body = inflate(body, limits.small_body_bytes)
        except UnreadableBody as error:
            raise Problem(422, error.code, str(error), "Send the body as it is.") from None
    if not body and empty is not None:
        body = empty
    else:
        media_type(request, (JSON,))
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        named = [".".join(map(str, p["loc"])) for p in problems]
        told = [f"{name[:80] or 'body'}: {p['msg']}" for name, p in zip(named, problems, strict=True)]
        raise Problem(
            422,
            "invalid_body",
            "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else ""),
            "Correct the body; /openapi.json describes it.",
        ) from None
