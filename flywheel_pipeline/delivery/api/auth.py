"""Who calls: the bearer token of a request, and whether the site and appliance it names are the token's own.

Belongs here: 401 and 403. Does not belong here: tokens at rest (`delivery.tokens`). Nothing but the header
`Authorization` says who a caller is: no cookie, no query parameter, no other header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, LiteralString

import psycopg
from starlette.requests import Request

from flywheel_pipeline.database.roles import AGENT_API
from flywheel_pipeline.delivery.api.connections import speaking_for
from flywheel_pipeline.delivery.api.problems import Problem
from flywheel_pipeline.delivery.tokens import Caller, TokenRefused, authenticate, authenticate_and_ask, check_in

_LONGEST = 512


def bearer_token(request: Request) -> str:
    """The token of the request. Raises Problem (401) when there is none, more than one, or one of another scheme."""
    values = request.headers.getlist("authorization")
    if not values:
        raise unauthorized("missing_token", "The request has no token.")
    scheme, _, token = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token.strip() or len(token) > _LONGEST:
        raise unauthorized("invalid_token", "The header Authorization must hold one bearer token.")
    return token.strip()


def caller_of(connection: psycopg.Connection[Any], token: str) -> Caller:
    """Authenticate, and record the sign of life where the last one is a minute old.

    Raises:
        Problem: 401 for a token that does not hold; 403 where its appliance is out of service or moved.
    """
    try:
        caller = authenticate(connection, token)
    except TokenRefused as refused:
        raise _refusal(refused) from None
    _check_in_if_due(connection, caller)
    return caller


def caller_and_answer(connection: psycopg.Connection[Any], token: str, question: LiteralString) -> tuple[Caller, Any]:
    """`caller_of`, with the first row of a question that is asked as the caller, in one round trip.

    Raises:
        Problem: as `caller_of`.
    """
    try:
        caller, answer = authenticate_and_ask(connection, token, AGENT_API, question)
    except TokenRefused as refused:
        raise _refusal(refused) from None
    _check_in_if_due(connection, caller)
    return caller, answer


def _check_in_if_due(connection: psycopg.Connection[Any], caller: Caller) -> None:
    if caller.checkin_due:
        with speaking_for(connection, caller):
            check_in(connection, caller.appliance_id)


def _refusal(refused: TokenRefused) -> Problem:
    if refused.code in ("retired_appliance", "moved_appliance"):
        return Problem(403, refused.code, refused.reason, "Ask your operator: `flywheel tokens list`.")
    return unauthorized(refused.code, refused.reason)


def unauthorized(code: str, reason: str) -> Problem:
    """401, with the scheme to use."""
    error = "" if code == "missing_token" else ', error="invalid_token"'
    return Problem(
        401,
        code,
        reason,
        "Send the header `Authorization: Bearer <token>`; an operator issues one with `flywheel tokens issue`.",
        headers={"WWW-Authenticate": f'Bearer realm="flywheel"{error}'},
    )


def require_own(caller: Caller, sites: Sequence[str], appliances: Sequence[str]) -> None:
    """Refuse a request that names another site or appliance than the token's; compared byte for byte.

    A name that is given twice must be right twice: which of two values a proxy reads is anybody's guess.

    Raises:
        Problem: 403.
    """
    if any(site not in caller.sites for site in sites):
        raise Problem(
            403,
            "foreign_site",
            "The token is for another site.",
            "Leave site_id out, or send the site that the token was issued for.",
        )
    if any(appliance != caller.appliance_id for appliance in appliances):
        raise Problem(
            403,
            "foreign_appliance",
            "The token is for another appliance.",
            "Leave appliance_id out, or send the appliance that the token was issued for.",
        )
