"""Commands of the whole: run, up, status, simulate."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import typer
from rich.markup import escape

from flywheel_pipeline.cli import simulation
from flywheel_pipeline.cli.terminal import err, open_database, out, percent, print_json, print_table, progress

JSON = typer.Option(False, "--json", help="Print one JSON document.")
simulate = typer.Typer(help="Days and fleets with known truth, through the ordinary intake.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("run")(run)
    app.command("up")(up)
    app.command("status")(status)
    simulation.register(simulate)
    app.add_typer(simulate, name="simulate")


def _run(engine: sa.Engine, *, full: bool, what: str, nightly: bool = False) -> Any:
    from flywheel_pipeline.run import dagster_instance, run_pipeline

    with progress(what) as bar, dagster_instance(engine.url) as instance:
        return run_pipeline(
            instance,
            full_recount=full,
            nightly=nightly,
            progress=lambda step: bar.update(bar.task_ids[0], description=f"{what}: {step}"),
        )


def _print_outcome(outcome: Any) -> None:
    for check in outcome.checks:
        mark = "[green]✓[/]" if check.passed else "[yellow]![/]" if check.severity == "WARN" else "[red]✗[/]"
        out.print(f"  {mark} {check.name:34} {escape(check.sentence)}", soft_wrap=True)
    for step, message in outcome.failures:
        out.print(f"  [red]✗ {step}[/]: {escape(message)}", soft_wrap=True)


def run(
    full: bool = typer.Option(
        False, "--full", help="Recount every counter and run the expectation suite, as at night."
    ),
    json: bool = JSON,
) -> None:
    """Run the whole graph once, in this process: refresh, check, decide, apply, deliver. Exit 1 if a gate failed."""
    engine = open_database()
    outcome = _run(engine, full=full, nightly=full, what="running")
    if json:
        print_json(asdict(outcome))
    else:
        _print_outcome(outcome)
        verdict = "done" if outcome.success else "[red]failed[/]: nothing was promoted past a failed gate"
        out.print(f"Run {outcome.run_id} {verdict}, {outcome.duration_seconds:.1f} s.", soft_wrap=True)
    if not outcome.success:
        raise typer.Exit(1)


def up(
    host: str = typer.Option("", "--host", help="Address to listen on; default 127.0.0.1 (FLYWHEEL_UI_HOST)."),
    port: int | None = typer.Option(
        None, "--port", min=1, max=65535, help="Port of the UI; default 3000 (FLYWHEEL_UI_PORT)."
    ),
) -> None:
    """Start database, Dagster UI, daemon and agent API; sensors and schedules are on. Ctrl-C stops all it started."""
    from flywheel_pipeline.database.embedded import EmbeddedServer
    from flywheel_pipeline.database.engine import open_engine, resolve_url, shown_url
    from flywheel_pipeline.database.migrate import upgrade
    from flywheel_pipeline.database.settings import get_settings
    from flywheel_pipeline.health.alerting.channels import get_alerting
    from flywheel_pipeline.health.alerting.watch import DaemonWatch
    from flywheel_pipeline.run import dagster_instance
    from flywheel_pipeline.serve import API_PORT_HINT, require_free_port, start

    settings = get_settings()
    alerting = get_alerting(settings)
    host, port = host or settings.ui_host, port or settings.ui_port
    require_free_port(host, port)
    require_free_port(settings.api_host, settings.api_port, hint=API_PORT_HINT)
    begun = time.monotonic()
    server = EmbeddedServer(settings.home) if settings.database_url is None else None
    ours = server is not None and not server.is_running()
    with progress("starting"):
        url = resolve_url(settings)
        changes = upgrade(open_database(upgraded=False)).changes
        services = start(settings, url, host=host, port=port, api=(settings.api_host, settings.api_port))
    if changes:
        out.print(f"Schema: {len(changes)} changes.")
    out.print(f"Dagster UI  {services.url}   (ready after {time.monotonic() - begun:.0f} s)")
    out.print(f"Agent API   {services.api_url}", markup=False, soft_wrap=True)
    out.print(f"Database    {shown_url(url)}", markup=False, soft_wrap=True)
    out.print(f"Logs        {services.logs}", markup=False, soft_wrap=True)
    out.print("Ctrl-C stops all of it.")
    failed = False
    import signal

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with dagster_instance(url, settings) as instance:
            watch = DaemonWatch(open_engine(url), instance, alerting)
            told = None
            while not (dead := services.dead()):
                time.sleep(0.5)
                watch.tick()
                if watch.problem != told and (told := watch.problem):
                    err.print(told, markup=False, soft_wrap=True)
            failed = True
            err.print(f"[bold red]Error:[/] the {dead[0]} ended; its log: {services.logs / (dead[0] + '.log')}")
            if "daemon" in dead:
                watch.ended("The daemon's process ended by itself.")
    except KeyboardInterrupt:
        err.print("Stopping.")
    finally:
        services.stop()
        if ours and server is not None:
            server.stop()
    if failed:
        raise typer.Exit(1)


def _status(engine: sa.Engine) -> dict[str, Any]:
    from flywheel_pipeline.run import dagster_instance, latest_checks, runs_are_readable
    from flywheel_pipeline.status import read_status

    with engine.connect() as connection:
        found = read_status(connection)
        readable = runs_are_readable(connection)
    found["checks"] = None
    if readable:
        with dagster_instance(engine.url) as instance:
            found["checks"] = latest_checks(instance)
    else:
        err.print(
            "The runs, and with them the checks, are not readable by this login: `flywheel db upgrade`, by the owner, "
            "makes and opens Dagster's tables.",
            soft_wrap=True,
        )
    return found


def status(json: bool = JSON) -> None:
    """Show where everything stands: telemetry, patterns, rules, checks, what is held and why."""
    found = _status(open_database())
    if json:
        print_json(found)
        return
    t, p, r = found["telemetry"], found["patterns"], found["rules"]
    out.print(
        f"Telemetry   {t['rows']:,} rows: {t['l1']:,} L1, {t['not_l1']:,} other; {t['successful']:,} reported successful"
    )
    out.print(
        f"            {t['unresolved']:,} unresolved, {t['open_rejects']:,} rejects open, {t['waiting_cells']:,} site-days wait"
    )
    out.print(
        f"Patterns    {p['total']}: {p['promoted']} promoted, {p['pending']} pending, {p['approved']} approved, {p['rejected']} rejected"
    )
    out.print(
        f"Rules       {r['promoted']} promoted: {r['enabled']} enabled, {r['quarantined']} quarantined; {r['builtin']} built-in"
    )
    policy = found["policy"]
    out.print(f"Policy      {policy['name']}" + (f", clock of {policy['as_of']}" if policy["as_of"] else ""))
    _print_rules(found)
    _print_reasons(found)
    if found["checks"] is None:
        return
    failing = [c for c in found["checks"] if c["passed"] is False]
    never = [c for c in found["checks"] if c["passed"] is None]
    passed = sum(c["passed"] is True for c in found["checks"])
    out.print(f"\n[bold]Checks[/]  {passed} passed, {len(failing)} failing, {len(never)} never ran")
    for check in failing:
        out.print(f"  ! {check['name']}: {check['sentence']}", markup=False, soft_wrap=True)


def _print_rules(found: dict[str, Any]) -> None:
    rows = [{**row, "rate": percent(row["success_rate"])} for row in found["top_rules"]]
    if rows:
        out.print()
        print_table(
            "Promoted rules by matches",
            rows,
            {"rule_id": "rule", "matches": "matches", "successes": "successes", "failures": "failures", "rate": "rate"},
        )


def _print_reasons(found: dict[str, Any]) -> None:
    if found["quarantined"]:
        out.print()
        print_table("Quarantined", found["quarantined"], {"rule_id": "rule", "reason": "reason"})
    if found["held"]:
        out.print()
        print_table("Held patterns", found["held"], {"pattern": "pattern", "reason": "reason"})


@simulate.command("replay-2026-02-15")
def replay_day(
    json: bool = JSON,
    directory: Path | None = typer.Option(
        None, "--directory", help="Where the NDJSON files go; default FLYWHEEL_HOME/replay."
    ),
    unless_played: bool = typer.Option(
        False, "--unless-played", help="Do nothing where the day was played before, whatever came after it."
    ),
) -> None:
    """Play the day of 2026-02-15 through the whole graph and hold it against the golden table. Exit 1 if a figure is off."""
    from flywheel_pipeline.database.migrate import upgrade
    from flywheel_pipeline.database.settings import get_settings
    from flywheel_pipeline.simulation.replay import GOLDEN, build_replay
    from flywheel_pipeline.simulation.stage import compare, is_played, stage_evening, stage_morning

    engine = open_database(upgraded=False)
    with progress("upgrading the schema"):
        changes = list(upgrade(engine).changes)
    if unless_played:
        with engine.connect() as connection:
            if is_played(connection):
                out.print("The day of 2026-02-15 was played before.")
                return
    with progress("building the replay"):
        replay = build_replay()
        target = directory or get_settings().home / "replay"
    parts: list[Any] = []
    outcomes: list[Any] = []
    before = _fingerprint(engine)
    for name, stage in (("morning", stage_morning), ("evening", stage_evening)):
        with progress(f"staging the {name}"):
            part = stage(engine, replay, target)
        parts.append(part)
        if not json:
            r = part.intake
            err.print(
                f"{name}: {r.read:,} posts read, {r.inserted:,} new, {r.corrected:,} corrections, "
                f"{r.unchanged:,} known, {r.rejected:,} rejected"
            )
        outcomes.append(_run(engine, full=True, what=f"running the {name}"))
    found = _status(engine)
    figures = compare(found, GOLDEN)
    unchanged = before is not None and before == _fingerprint(engine)
    good = all(line["ok"] for line in figures) and all(outcome.success for outcome in outcomes)
    if json:
        print_json(
            {
                "ok": good,
                "changed": not unchanged,
                "figures": figures,
                "runs": [asdict(outcome) for outcome in outcomes],
                "schema_changes": changes,
                "status": found,
            }
        )
    else:
        out.print("[bold]2026-02-15, evening[/]")
        for line in figures:
            mark = "[green]✓[/]" if line["ok"] else "[bold red]✗[/]"
            wrong = "" if line["ok"] else f"   [red]expected {line['expected']:,}[/]"
            value = "-" if line["found"] is None else f"{line['found']:,}"
            out.print(f"  {mark} {line['figure']:40} {value:>8}{wrong}")
        _print_rules(found)
        _print_reasons(found)
        out.print("\n[bold]Checks of the last run[/]")
        _print_outcome(outcomes[-1])
        out.print()
        right = sum(line["ok"] for line in figures)
        seconds = sum(outcome.duration_seconds for outcome in outcomes)
        out.print(f"{right} of {len(figures)} figures right; {len(outcomes)} runs of the graph in {seconds:.1f} s.")
        if unchanged:
            out.print("Nothing changed: the day had been played before.")
    if not good:
        raise typer.Exit(1)


_STATE_TABLES = (
    "execution_telemetry",
    "telemetry_rejects",
    "patterns",
    "l1_rules",
    "rule_events",
    "rule_manifests",
    "appliance_commands",
    "episodes",
    "rule_daily_stats",
    "rule_site_stats",
    "pattern_daily_stats",
    "pattern_site_stats",
)


def _fingerprint(engine: sa.Engine) -> dict[str, tuple[int, str]] | None:
    """Return row count and content hash of every table that holds state, without times of bookkeeping."""
    found = {}
    with engine.connect() as connection:
        for table in _STATE_TABLES:
            found[table] = tuple(
                connection.execute(
                    sa.text(
                        "SELECT count(*), coalesce(sum(hashtextextended((to_jsonb(t) - 'updated_at' - 'built_at' - 'batch_id' "  # noqa: S608
                        f"- 'times_seen')::text, 0)), 0)::text FROM {table} AS t"
                    )
                ).one()
            )
    return found if found["execution_telemetry"][0] else None
