"""Commands of the agent API: serve, and the tokens of appliances."""

from __future__ import annotations

import datetime as dt
from dataclasses import asdict
from typing import Any

import typer

from flywheel_pipeline.cli.terminal import err, open_database, out, print_json, print_table

ACTOR = typer.Option(..., "--actor", help="Who does this, by name.")
REASON = typer.Option(..., "--reason", help="Why; auditors read it.")
DAYS = typer.Option(None, "--expires-days", min=1, max=3650, help="Days until it expires; default: until revoked.")
JSON = typer.Option(False, "--json", help="Print one JSON document.")
tokens = typer.Typer(help="Bearer tokens of appliances: one is good for its own site alone.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("serve")(serve)
    app.add_typer(tokens, name="tokens")


def serve(
    host: str = typer.Option("", "--host", help="Address to listen on; default 127.0.0.1 (FLYWHEEL_API_HOST)."),
    port: int | None = typer.Option(None, "--port", min=1, max=65535, help="Port; default 8000 (FLYWHEEL_API_PORT)."),
    workers: int | None = typer.Option(
        None, "--workers", min=1, max=64, help="Processes; default 2 (FLYWHEEL_API_WORKERS)."
    ),
) -> None:
    """Serve the agent API: executions in, rules and commands out. TLS is the business of a proxy before it."""
    from flywheel_pipeline.database.settings import get_settings
    from flywheel_pipeline.delivery.api import server

    settings = get_settings()
    open_database().dispose()
    host, port = host or settings.api_host, port or settings.api_port
    err.print(f"Agent API on http://{host}:{port}; Ctrl-C stops it.", markup=False, soft_wrap=True)
    server.serve(settings, host=host, port=port, workers=workers or settings.api_workers)


def _expiry(days: int | None) -> dt.timedelta | None:
    return None if days is None else dt.timedelta(days=days)


def _print_token(issued: Any, json: bool) -> None:
    if json:
        print_json(asdict(issued))
        return
    err.print("The token is shown this once; only its hash is kept.", style="dim")
    out.file.write(issued.token + "\n")
    until = "until it is revoked" if issued.expires_at is None else f"until {issued.expires_at:%Y-%m-%d %H:%M} UTC"
    err.print(
        f"Token {issued.token_id} of appliance {issued.appliance_id} for site {issued.site_id}, {until}."
        + (f" {issued.revoked} earlier ended." if issued.revoked else ""),
        markup=False,
        soft_wrap=True,
    )


@tokens.command("issue")
def issue(
    appliance: str = typer.Argument(..., help="Id of the appliance."),
    actor: str = ACTOR,
    reason: str = REASON,
    expires_days: int | None = DAYS,
    site: str = typer.Option("", "--site", help="Its site; needed to register an appliance that is not known yet."),
    json: bool = JSON,
) -> None:
    """Issue a token for an appliance; standard output gets the token alone."""
    from flywheel_pipeline.delivery.tokens import issue as run

    with open_database().begin() as connection:
        issued = run(
            connection, appliance, actor=actor, reason=reason, expires_in=_expiry(expires_days), site_id=site or None
        )
    _print_token(issued, json)


@tokens.command("rotate")
def rotate(
    appliance: str = typer.Argument(..., help="Id of the appliance."),
    actor: str = ACTOR,
    reason: str = REASON,
    expires_days: int | None = DAYS,
    grace_minutes: int = typer.Option(0, "--grace-minutes", min=0, help="How long the earlier ones still hold."),
    json: bool = JSON,
) -> None:
    """Issue a new token and end the appliance's earlier ones, at once or after a grace."""
    from flywheel_pipeline.delivery.tokens import rotate as run

    with open_database().begin() as connection:
        issued = run(
            connection,
            appliance,
            actor=actor,
            reason=reason,
            expires_in=_expiry(expires_days),
            grace=dt.timedelta(minutes=grace_minutes),
        )
    _print_token(issued, json)


@tokens.command("revoke")
def revoke(
    appliance: str = typer.Argument(..., help="Id of the appliance."),
    token: int | None = typer.Option(None, "--token", help="Number of one token; default: all of the appliance."),
    actor: str = ACTOR,
    reason: str = REASON,
    json: bool = JSON,
) -> None:
    """Revoke an appliance's tokens; the next request with one is refused."""
    from flywheel_pipeline.delivery.tokens import revoke as run

    with open_database().begin() as connection:
        revoked = run(connection, appliance, actor=actor, reason=reason, token_id=token)
    if json:
        print_json({"appliance_id": appliance, "revoked": revoked})
    else:
        out.print(f"Revoked {len(revoked)} tokens of {appliance}.", markup=False)


@tokens.command("list")
def list_(
    appliance: str = typer.Argument("", help="One appliance; default: all."),
    all_: bool = typer.Option(False, "--all", help="The expired and revoked ones too."),
    json: bool = JSON,
) -> None:
    """List tokens: of whom, since when, by whom, until when. The tokens themselves are kept nowhere."""
    from flywheel_pipeline.delivery.tokens import list_tokens

    with open_database().connect() as connection:
        rows = [asdict(row) for row in list_tokens(connection, appliance or None, ended=all_)]
    if json:
        print_json(rows)
        return
    for row in rows:
        row["issued"] = f"{row['issued_at']:%Y-%m-%d %H:%M}"
        row["until"] = "revoked" if row["expires_at"] is None else f"{row['expires_at']:%Y-%m-%d %H:%M}"
    print_table(
        f"{len(rows)} tokens",
        rows,
        {
            "token_id": "token",
            "appliance_id": "appliance",
            "site_id": "site",
            "state": "state",
            "issued": "issued",
            "until": "until",
            "issued_by": "by",
            "reason": "because",
        },
    )
