"""Tokens of appliances: issued, rotated and revoked by a named person, and looked up by their hash.

Belongs here: the life of a token and the question whose it is. Does not belong here: HTTP (`api`), and what a caller
may do (`telemetry.reporters`). The token itself is shown once and never stored: `appliance_tokens` holds its sha256.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString

import psycopg
import sqlalchemy as sa
from psycopg.rows import namedtuple_row

from flywheel_pipeline.errors import UsageError

#: What a token begins with, so that one in a log or a repository is recognised by people and scanners.
PREFIX: Final = "fwa_"
_RANDOM_BYTES: Final = 32
_FORM: Final = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token. `token` is the secret, at hand here and nowhere else; `expires_at` None: until revoked."""

    token_id: int
    appliance_id: str
    site_id: str
    token: str
    expires_at: datetime | None
    revoked: int = 0


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token as it is listed: everything but the token and its hash."""

    token_id: int
    appliance_id: str
    site_id: str
    state: str
    issued_at: datetime
    issued_by: str
    reason: str
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    revoked_reason: str | None


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated appliance, with the names and the tier of its site; `checkin_due`: its last sign of life is a minute old."""

    token_id: int
    appliance_id: str
    site_id: str
    sites: frozenset[str]
    checkin_due: bool
    healing_tier: str | None = None


class TokenRefused(Exception):
    """No appliance stands behind this token now. `code` is stable; `reason` says which, and holds no secret."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def digest(token: str) -> str:
    """sha256 of the token as 64 hex digits. The token is 256 random bits: a slow hash would add nothing."""
    return hashlib.sha256(token.encode()).hexdigest()


def issue(
    connection: sa.Connection,
    appliance_id: str,
    *,
    actor: str,
    reason: str,
    expires_in: timedelta | None = None,
    site_id: str | None = None,
) -> IssuedToken:
    """Issue a token for an appliance, valid for its site alone; earlier tokens stay valid.

    Args:
        connection: a connection in a transaction; the caller commits.
        appliance_id: the appliance; one that is not registered yet is registered at `site_id`.
        actor: who does it, by name.
        reason: why.
        expires_in: how long it holds; None: until revoked.
        site_id: the appliance's site; needed for one that is not registered, must agree for one that is.

    Raises:
        UsageError: no such appliance and no site given, a retired appliance, another site, nobody or no reason.
    """
    _signed(actor, reason)
    if expires_in is not None and expires_in <= timedelta(0):
        raise UsageError("The token would have expired already.", hint="Give at least one day, or no end.")
    home = _home(connection, appliance_id, site_id)
    token = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    row = connection.execute(
        sa.text(
            """
            INSERT INTO appliance_tokens (appliance_id, site_id, token_hash, issued_by, reason, expires_at)
            VALUES (:appliance, :site, :hash, :actor, :reason, now() + CAST(:expires_in AS interval))
            RETURNING token_id, expires_at
            """
        ),
        {
            "appliance": appliance_id,
            "site": home,
            "hash": digest(token),
            "actor": actor,
            "reason": reason,
            "expires_in": expires_in,
        },
    ).one()
    return IssuedToken(row.token_id, appliance_id, home, token, row.expires_at)


def rotate(
    connection: sa.Connection,
    appliance_id: str,
    *,
    actor: str,
    reason: str,
    expires_in: timedelta | None = None,
    grace: timedelta = timedelta(0),
) -> IssuedToken:
    """Issue a new token and end the appliance's earlier ones: at once, or after `grace`, in which both hold.

    Raises:
        UsageError: as `issue`; or the appliance has no token that holds, so that there is nothing to rotate.
    """
    holding = _holding(connection, appliance_id)
    if not holding:
        raise UsageError(
            f"Appliance {appliance_id} has no token that holds.", hint="Issue one: `flywheel tokens issue`."
        )
    fresh = issue(connection, appliance_id, actor=actor, reason=reason, expires_in=expires_in)
    if grace > timedelta(0):
        connection.execute(
            sa.text(
                "UPDATE appliance_tokens SET expires_at = least(expires_at, now() + CAST(:grace AS interval)) "
                "WHERE token_id = ANY (:ids)"
            ),
            {"grace": grace, "ids": holding},
        )
    else:
        _revoke(connection, holding, actor, f"rotated: {reason}")
    return IssuedToken(
        fresh.token_id, fresh.appliance_id, fresh.site_id, fresh.token, fresh.expires_at, revoked=len(holding)
    )


def revoke(
    connection: sa.Connection, appliance_id: str, *, actor: str, reason: str, token_id: int | None = None
) -> list[int]:
    """Revoke one token of an appliance, or all; returns the ids of those that held until now.

    It works with the next request: tokens are looked up each time and cached nowhere.

    Raises:
        UsageError: nobody or no reason; no token of this appliance (or of this id) holds.
    """
    _signed(actor, reason)
    holding = _holding(connection, appliance_id)
    chosen = holding if token_id is None else [number for number in holding if number == token_id]
    if not chosen:
        named = "no token" if token_id is None else f"no token {token_id}"
        raise UsageError(
            f"Appliance {appliance_id} has {named} that holds.", hint="`flywheel tokens list --all` shows them all."
        )
    _revoke(connection, chosen, actor, reason)
    return chosen


def list_tokens(connection: sa.Connection, appliance_id: str | None = None, *, ended: bool = False) -> list[TokenRow]:
    """Tokens by appliance and age, without their hashes; with `ended` also the expired and revoked ones."""
    rows = connection.execute(
        sa.text(
            """
            SELECT token_id, appliance_id, site_id, state, issued_at, issued_by, reason, expires_at, revoked_at,
                   revoked_by, revoked_reason
            FROM (SELECT *, CASE WHEN revoked_at IS NOT NULL THEN 'revoked' WHEN expires_at <= now() THEN 'expired'
                            ELSE 'holds' END AS state FROM appliance_tokens) AS t
            WHERE (CAST(:appliance AS text) IS NULL OR appliance_id = :appliance) AND (:ended OR state = 'holds')
            ORDER BY appliance_id, token_id
            """
        ),
        {"appliance": appliance_id, "ended": ended},
    )
    return [TokenRow(**row) for row in rows.mappings()]


# The login of the agent API may call this and not read the tokens.
_LOOK_UP: Final = """
SELECT token_id, appliance_id, token_hash, revoked, expired, status, site_id, healing_tier, sites, checkin_due
FROM flywheel_token_holder(%s)
"""
# The same, and where the token holds the transaction speaks for its appliance from then on. What the look-up says is
# computed before the role is put on.
_LOOK_UP_AND_SPEAK: Final = f"""
WITH found AS MATERIALIZED ({_LOOK_UP})
SELECT found.*,
  CASE WHEN NOT revoked AND NOT expired AND status <> 'retired' AND site_id = ANY (sites) THEN
    set_config('flywheel.site_id', site_id, true) || set_config('flywheel.appliance_id', appliance_id, true)
    || set_config('role', coalesce((SELECT rolname::text FROM pg_roles WHERE rolname = %s), 'none'), true)
  END AS speaks
FROM found
"""  # noqa: S608


def authenticate(connection: psycopg.Connection[Any], token: str) -> Caller:
    """Say which appliance a token stands for, by one indexed query; nothing is remembered between calls.

    Raises:
        TokenRefused: unknown, revoked or expired; or its appliance is gone, retired or at another site by now.
    """
    hashed = _digest_of(token)
    with connection.cursor(row_factory=namedtuple_row) as cursor:
        return _caller(cursor.execute(_LOOK_UP, (hashed,)).fetchone(), hashed)


def authenticate_and_ask(
    connection: psycopg.Connection[Any], token: str, role: str, question: LiteralString
) -> tuple[Caller, Any]:
    """`authenticate`, and one question of the caller's in the same round trip and transaction.

    Args:
        connection: in autocommit; the transaction ends with this call.
        token: the token.
        role: what the question runs as, held to the appliance by row security; without that role, as the connection's own.
        question: a query without parameters. It knows the appliance by `flywheel_session_appliance()`, which is null where
            the token does not hold.

    Returns:
        The caller, and the first row of the answer as a named tuple; None: there is none.

    Raises:
        TokenRefused: as `authenticate`.
    """
    hashed = _digest_of(token)
    # Until the pipeline is synchronised, its statements are one transaction.
    with connection.pipeline():
        found = connection.cursor(row_factory=namedtuple_row).execute(_LOOK_UP_AND_SPEAK, (hashed, role))
        answer = connection.cursor(row_factory=namedtuple_row).execute(question)
        row, answered = found.fetchone(), answer.fetchone()
    return _caller(row, hashed), answered


def _digest_of(token: str) -> str:
    if _FORM.fullmatch(token) is None:
        raise TokenRefused("invalid_token", "The token is not one of ours.")
    return digest(token)


def _caller(row: Any, hashed: str) -> Caller:
    if row is None or not hmac.compare_digest(row.token_hash, hashed):
        raise TokenRefused("invalid_token", "The token is not one of ours.")
    if row.revoked:
        raise TokenRefused("revoked_token", "The token was revoked.")
    if row.expired:
        raise TokenRefused("expired_token", "The token has expired.")
    if row.status is None or row.status == "retired":
        raise TokenRefused("retired_appliance", "The appliance of this token is not in service.")
    sites = frozenset(row.sites)
    if row.site_id not in sites:
        raise TokenRefused("moved_appliance", "The appliance of this token is registered at another site now.")
    return Caller(row.token_id, row.appliance_id, row.site_id, sites, row.checkin_due, row.healing_tier)


def check_in(connection: psycopg.Connection[Any], appliance_id: str) -> None:
    """Record a sign of life by our clock, in a transaction that speaks for the appliance; one that was offline is online again."""
    connection.execute(
        """
        UPDATE appliances SET last_checkin = greatest(last_checkin, clock_timestamp()),
          status = CASE WHEN status = 'offline' THEN 'online' ELSE status END
        WHERE appliance_id = %s AND status <> 'retired'
        """,
        (appliance_id,),
    )


def _signed(actor: str, reason: str) -> None:
    for name, text in (("actor", actor), ("reason", reason)):
        if not text.strip():
            raise UsageError(f"The {name} must not be blank.", hint="Auditors read who did it and why.")


def _home(connection: sa.Connection, appliance_id: str, site_id: str | None) -> str:
    found = connection.execute(
        sa.text(
            "SELECT status, site_id, flywheel_site_names(site_id) AS names FROM appliances "
            "WHERE appliance_id = :appliance FOR UPDATE"
        ),
        {"appliance": appliance_id},
    ).first()
    if found is None:
        if site_id is None:
            raise UsageError(
                f"No appliance is called {appliance_id}.",
                hint="Correct the id, or register it together with its first token: --site SITE.",
            )
        for name, text in (("appliance", appliance_id), ("site", site_id)):
            if not text.strip() or not text.isprintable() or text != text.strip() or len(text) > 255:
                raise UsageError(f"{text!r} is no name for {name}: printable text of 1 to 255 characters.")
        connection.execute(
            sa.text("INSERT INTO sites (site_id) VALUES (:site) ON CONFLICT DO NOTHING"), {"site": site_id}
        )
        connection.execute(
            sa.text("INSERT INTO appliances (appliance_id, site_id, status) VALUES (:appliance, :site, 'offline')"),
            {"appliance": appliance_id, "site": site_id},
        )
        return site_id
    if found.status == "retired":
        raise UsageError(f"Appliance {appliance_id} is retired.", hint="A retired appliance gets no token.")
    if site_id is not None and site_id not in found.names:
        raise UsageError(
            f"Appliance {appliance_id} is registered at site {found.site_id}, not at {site_id}.",
            hint="A token is for one site; leave --site out.",
        )
    return str(found.site_id)


def _holding(connection: sa.Connection, appliance_id: str) -> list[int]:
    return list(
        connection.execute(
            sa.text(
                "SELECT token_id FROM appliance_tokens WHERE appliance_id = :appliance AND revoked_at IS NULL "
                "AND (expires_at IS NULL OR expires_at > now()) ORDER BY token_id FOR UPDATE"
            ),
            {"appliance": appliance_id},
        ).scalars()
    )


def _revoke(connection: sa.Connection, token_ids: list[int], actor: str, reason: str) -> None:
    connection.execute(
        sa.text(
            "UPDATE appliance_tokens SET revoked_at = now(), revoked_by = :actor, revoked_reason = :reason "
            "WHERE token_id = ANY (:ids) AND revoked_at IS NULL"
        ),
        {"ids": token_ids, "actor": actor, "reason": reason},
    )
