"""Alerts on the command line: what is open, who looks after it, and whether the channels work."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import typer

from flywheel_pipeline.cli.acts import ACTOR, JSON, REASON
from flywheel_pipeline.cli.terminal import err, open_database, out, print_json, print_table

app = typer.Typer(help="What is wrong now, who looks after it, and who is told.", no_args_is_help=True)


@app.command("list")
def list_(
    state: str = typer.Option("open", "--state", help="open, recovered, or all that were ever raised."),
    json: bool = JSON,
) -> None:
    """List alerts, the worst first. Exit 0 whether there are any or not."""
    from flywheel_pipeline.errors import UsageError
    from flywheel_pipeline.health.alerting.record import list_alerts
    from flywheel_pipeline.health.alerting.text import neutral

    if state not in {"open", "recovered", "all"}:
        raise UsageError(f"There is no state {state}.", hint="Say --state open, recovered or all.")
    with open_database().connect() as connection:
        found = list_alerts(connection, None if state == "all" else state)
    if json:
        print_json(found)
        return
    if not found:
        out.print("No alert is open." if state == "open" else "No alert.")
        return
    for row in found:
        verb = row["state"] if row["state"] != "open" else "not evaluated" if row["observed"] == "error" else "open"
        since = f"{row['first_at']:%Y-%m-%d %H:%M} UTC" if row["first_at"] else "-"
        out.print(
            f"{row['severity']:8} {verb:13} since {since}  {neutral(row['alert_key'])}", markup=False, soft_wrap=True
        )
        out.print(f"         {neutral(row['sentence'])}", markup=False, soft_wrap=True)
        if row["acknowledged_by"] and row["state"] == "open":
            reason = neutral(f"{row['acknowledged_by']}: {row['acknowledged_reason']}")
            out.print(f"         acknowledged by {reason}", markup=False, soft_wrap=True)


@app.command("ack")
def ack(
    key: str = typer.Argument(..., help="An open alert, as `flywheel alerts list` names it."),
    actor: str = ACTOR,
    reason: str = REASON,
    json: bool = JSON,
) -> None:
    """Say that you look after an open alert: it does not escalate any more; its recovery is still told."""
    from flywheel_pipeline.health.alerting.outbox import utc_now
    from flywheel_pipeline.health.alerting.record import acknowledge

    with open_database().begin() as connection:
        done = acknowledge(connection, key, actor=actor, reason=reason, now=utc_now())
    if json:
        print_json(done)
    else:
        out.print(f"✓ {key}: acknowledged by {actor}.", markup=False, soft_wrap=True)


@app.command("test")
def send_test(
    channel: list[str] = typer.Option([], "--channel", help="Alias of a channel; may be repeated. Default: all."),
    json: bool = JSON,
) -> None:
    """Send a test message to the channels now, beside the outbox. Exit 1 if one does not take it."""
    from flywheel_pipeline.health.alerting.channels import get_alerting, require_channels
    from flywheel_pipeline.health.alerting.outbox import send
    from flywheel_pipeline.health.alerting.text import Message

    alerting = get_alerting()
    results: list[dict[str, Any]] = []
    for chosen in require_channels(alerting, channel):
        body = f"A test of the channel {chosen.alias}. Alerts arrive here.\nUI: {alerting.ui_url}"
        error = send(chosen, Message("[Flywheel] test", body, "info"))
        results.append({"channel": chosen.alias, "delivered": error is None, "error": error})
    if json:
        print_json(results)
    else:
        for result in results:
            mark, words = ("✓", "delivered") if result["delivered"] else ("✗", result["error"])
            out.print(f"{mark} {result['channel']}: {words}", markup=False, soft_wrap=True)
    if not all(result["delivered"] for result in results):
        raise typer.Exit(1)


@app.command("channels")
def channels(json: bool = JSON) -> None:
    """List the channels by alias, with what each hears and what waits for it; URLs are never shown."""
    import sqlalchemy as sa

    from flywheel_pipeline.health.alerting.channels import get_alerting

    alerting = get_alerting()
    with open_database().connect() as connection:
        waiting = {
            row.channel: row.waiting
            for row in connection.execute(
                sa.text("SELECT channel, count(*) AS waiting FROM notifications WHERE sent_at IS NULL GROUP BY channel")
            )
        }
    rows = [
        {
            "channel": c.alias,
            "hears": "what was not acknowledged in time" if c.rule.escalation else f"{c.rule.min_severity} and above",
            "waiting": waiting.pop(c.alias, 0),
        }
        for c in alerting.channels
    ]
    rows += [
        {"channel": alias, "hears": "not configured any more", "waiting": n} for alias, n in sorted(waiting.items())
    ]
    if json:
        print_json(rows)
    elif rows:
        print_table("Alert channels", rows, {"channel": "channel", "hears": "hears", "waiting": "waiting"})
    else:
        out.print("No alert channel is configured: set FLYWHEEL_ALERT_URLS to Apprise URLs, each as URL or alias=URL.")


@app.command("send")
def send_(json: bool = JSON) -> None:
    """Send once what waits in the outbox and is due. Exit 1 if a channel does not take it."""
    from flywheel_pipeline.health.alerting.channels import get_alerting, require_channels
    from flywheel_pipeline.health.alerting.outbox import drain

    alerting = get_alerting()
    require_channels(alerting)
    done = drain(open_database(), alerting)
    if json:
        print_json(asdict(done))
    else:
        out.print(f"{done.sent} sent in {done.messages} messages, {done.failed} failed, {done.waiting} waiting.")
        for alias, error in done.errors.items():
            out.print(f"✗ {alias}: {error}", markup=False, soft_wrap=True)
    if done.failed:
        raise typer.Exit(1)


@app.command("watch")
def watch(
    interval: float = typer.Option(10.0, "--interval", min=1.0, help="Seconds between two looks."),
    once: bool = typer.Option(False, "--once", help="Look once and end."),
) -> None:
    """Watch from outside the daemon, on this or another machine: all that alerts, a dead daemon included. Ctrl-C ends it."""
    import sqlalchemy as sa
    from dagster_postgres.utils import DagsterPostgresException

    from flywheel_pipeline.build import build_defs
    from flywheel_pipeline.health.alerting.channels import get_alerting, require_channels
    from flywheel_pipeline.health.alerting.watch import everything, look
    from flywheel_pipeline.run import dagster_instance

    alerting = get_alerting()
    require_channels(alerting)
    engine = open_database()
    repository = build_defs().get_repository_def()
    with dagster_instance(engine.url) as instance:
        observe = everything(instance, repository, alerting)
        try:
            while True:
                try:
                    done = look(engine, observe, alerting)
                    if (
                        once
                        or done.recorded is None
                        or done.recorded.transitions
                        or done.drained.sent
                        or done.drained.failed
                    ):
                        out.print(done.sentence, markup=False, soft_wrap=True)
                except (sa.exc.OperationalError, sa.exc.InterfaceError, DagsterPostgresException) as error:
                    if once:
                        raise
                    err.print(
                        f"The database does not answer ({type(error).__name__}); looking again in {interval:g} s."
                    )
                if once:
                    return
                time.sleep(interval)
        except KeyboardInterrupt:
            err.print("Stopping.")
