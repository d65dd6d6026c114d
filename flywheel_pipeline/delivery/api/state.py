"""What one worker of the API holds, and the few steps that every handler begins with.

Belongs here: connections, limits, and the order address -> token -> rate -> site; what is refused counts as well. Does
not belong here: any endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, LiteralString, TypeVar, cast

import psycopg
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from flywheel_pipeline.delivery.api.auth import bearer_token, caller_and_answer, caller_of, require_own
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


async def admit(request: Request) -> Caller:
    """Authenticate the caller, and hold the names in the query against it.

    Raises:
        Problem: 401, 403, 429, or 503.
    """
    caller, _ = await _admit(request, lambda connection, token: (caller_of(connection, token), None))
    return caller


async def admit_asking(
    request: Request,
    question: LiteralString,
    then: Callable[[psycopg.Connection[Any], Caller, Any], Result],
) -> tuple[Caller, Result]:
    """`admit`, and the answer to a question of the caller's in the same round trip (`tokens.authenticate_and_ask`).

    Args:
        request: the request.
        question: the query.
        then: makes the result of the connection, the caller, and the first row of the answer.

    Raises:
        Problem: as `admit`.
    """
    return await _admit(request, lambda connection, token: caller_and_answer(connection, token, question), then)


async def _admit(
    request: Request,
    who: Callable[[psycopg.Connection[Any], str], tuple[Caller, Any]],
    then: Callable[[psycopg.Connection[Any], Caller, Any], Any] = lambda _connection, _caller, _answer: None,
) -> tuple[Caller, Any]:
    token = bearer_token(request)
    query = request.query_params
    sites, appliances = query.getlist("site_id"), query.getlist("appliance_id")

    def work(connection: psycopg.Connection[Any]) -> tuple[Caller, Any]:
        caller, answer = who(connection, token)
        try:
            require_own(caller, sites, appliances)
        except Problem as foreign:
            return caller, foreign  # it is told so once it is counted
        return caller, then(connection, caller, answer)

    worker = worker_of(request)
    address = request.client.host if request.client else ""
    worker.rates.may_ask(address, token)
    try:
        caller, result = await worker.connections.read(work)
    except Problem as problem:
        if problem.status in (401, 403):
            worker.rates.refused(address, token)
        raise
    worker.rates.held(token)
    worker.rates.request(caller.appliance_id)
    if isinstance(result, Problem):
        raise result
    return caller, result


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
