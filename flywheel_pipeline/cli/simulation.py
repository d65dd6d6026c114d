"""Commands of the fleet simulator: simulate scenarios, fleet, score, run."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import typer
from rich.markup import escape

from flywheel_pipeline.cli.terminal import err, open_database, out, percent, print_json, print_table, progress
from flywheel_pipeline.errors import UsageError

if TYPE_CHECKING:
    from flywheel_pipeline.simulation.fleet.scenario import Scenario
    from flywheel_pipeline.simulation.fleet.stream import FleetStream

JSON = typer.Option(False, "--json", help="Print one JSON document.")
SCENARIO = typer.Option(..., "--scenario", "-s", help="A scenario's name, or a YAML file.")
SEED = typer.Option(1, "--seed", min=0, help="The same scenario and seed give the same bytes.")


def register(app: typer.Typer) -> None:
    """Add these commands to `flywheel simulate`."""
    app.command("scenarios")(scenarios)
    app.command("fleet")(fleet)
    app.command("score")(score)
    app.command("run")(run)


def scenarios(
    keys: bool = typer.Option(False, "--keys", help="List what a scenario file may say; ? marks what may be left out."),
    json: bool = JSON,
) -> None:
    """List the scenarios of the library and what each plants."""
    from flywheel_pipeline.simulation.fleet.scenario import keys_of_scenarios, load_scenario, scenario_names

    if keys:
        if json:
            print_json(dict(keys_of_scenarios()))
            return
        for part, names in keys_of_scenarios():
            out.print(f"[bold]{part}[/]  {escape(names)}")
        return
    found = [load_scenario(name) for name in scenario_names()]
    if json:
        print_json(
            [
                {
                    "name": s.name,
                    "title": s.title,
                    "plants": s.plants,
                    "days": s.days,
                    "sites": s.fleet.sites,
                    "hosts": s.hosts,
                }
                for s in found
            ]
        )
        return
    for scenario in found:
        out.print(f"[bold]{scenario.name}[/]  {escape(scenario.title)}")
        out.print(
            f"  {escape(scenario.plants)} [dim]{scenario.fleet.sites} sites, {scenario.hosts} hosts, {scenario.days} days.[/]"
        )


def _speed(text: str) -> float:
    text = text.strip().lower()
    if text in ("real", "1x"):
        return 1.0
    try:
        speed = float(text.removesuffix("x"))
    except ValueError:
        speed = -1.0
    if not 0 <= speed < float("inf"):
        raise UsageError(
            f"--speed {text} is no speed.", hint="0 is as fast as possible, REAL real time, 60x a minute a second."
        )
    return speed


def _adjusted(name: str, start: str | None, campaign: str | None) -> Scenario:
    """Read a scenario and change its start and campaign as the command line asks."""
    from flywheel_pipeline.simulation.fleet.scenario import Scenario, load_scenario

    scenario = load_scenario(name)
    changed: dict[str, Any] = {}
    if start is not None:
        if start == "recent":
            changed["start"] = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=scenario.days + scenario.settle_days)
        else:
            try:
                changed["start"] = dt.date.fromisoformat(start)
            except ValueError as error:
                raise UsageError(f"--start {start} is no day.", hint="A day such as 2026-01-05, or recent.") from error
    if campaign is not None:
        if not campaign.strip():
            raise UsageError("--campaign needs an id.")
        if scenario.transport.bad_payloads:
            raise UsageError(
                f"{scenario.name} sends malformed payloads: as a campaign they would stand among the production's rejects.",
                hint="Use a scenario without bad_payloads.",
            )
        changed["campaign"] = campaign
    return Scenario.model_validate({**dict(scenario), **changed}) if changed else scenario


def _directory(out_directory: Path | None, scenario: Scenario, seed: int) -> Path:
    from flywheel_pipeline.database.settings import get_settings

    return out_directory or get_settings().home / "simulations" / f"{scenario.name}-{seed}"


def fleet(
    scenario: str = SCENARIO,
    seed: int = SEED,
    out_directory: Path | None = typer.Option(
        None, "--out", help="Where the files go; default FLYWHEEL_HOME/simulations/<scenario>-<seed>."
    ),
    database: bool = typer.Option(
        False, "--database", help="Bring it into the database in use, through the intake, as well."
    ),
    url: str | None = typer.Option(
        None, "--url", help="Post it to an agent API as well, each appliance with its own token."
    ),
    token_file: Path | None = typer.Option(None, "--token-file", help='JSON: {"<appliance id>": "<token>", …}.'),
    speed: str = typer.Option(
        "0", "--speed", help="0: as fast as possible; REAL: real time; 60x: a minute in a second."
    ),
    start: str | None = typer.Option(
        None, "--start", help="First day, YYYY-MM-DD; recent: so that all of it lies behind us."
    ),
    campaign: str | None = typer.Option(
        None, "--campaign", help="Mark each row with this chaos campaign id: it counts nowhere, even in production."
    ),
    json: bool = JSON,
) -> None:
    """Simulate a fleet into files, and into the database or over HTTP; the planted truth is written beside it."""
    from flywheel_pipeline.simulation.fleet.sinks import Files, paced
    from flywheel_pipeline.simulation.fleet.stream import FleetStream

    if database and url is not None:
        raise UsageError("--database and --url are two ways into one pipeline.", hint="Choose one.")
    if (url is None) != (token_file is None):
        raise UsageError("--url and --token-file go together.")
    pace = _speed(speed)
    chosen = _adjusted(scenario, start, campaign)
    stream = FleetStream(chosen, seed)
    directory = _directory(out_directory, chosen, seed)
    took: dict[str, Any] = {}
    with progress(f"simulating {chosen.name}") as bar, _ways_out(stream, database, url, token_file, took) as take:
        files = Files(directory, stream)

        def tell(count: int, fraction: float) -> None:
            bar.update(bar.task_ids[0], description=f"simulating {chosen.name}: {count:,} posts, {fraction:.0%}")

        coming = paced(stream, stream.rest(), speed=pace, progress=tell)

        def written() -> Iterator[Any]:
            for delivery in coming:
                files.write(delivery)
                yield delivery

        try:
            took |= take(written())
        finally:
            files.close()
    counts = stream.truth.document()["counts"]
    if json:
        print_json({"directory": str(directory), "counts": counts, **took})
        return
    out.print(
        f"{counts['deliveries']:,} posts of {counts['executions']:,} executions: {counts['duplicates'] + counts['replays']:,} repeated, "
        f"{counts['corrections']:,} corrected, {counts['late']:,} late, {sum(counts['invalid'].values()):,} malformed."
    )
    for what, found in took.items():
        out.print(f"{what}: {escape(str(found))}", soft_wrap=True)
    out.print(f"Files       {directory}", markup=False, soft_wrap=True)
    out.print(
        "Next        " + _next_step(directory, database=database, url=url, campaign=chosen.campaign),
        markup=False,
        soft_wrap=True,
    )


def _next_step(directory: Path, *, database: bool, url: str | None, campaign: str | None) -> str:
    if url is not None or (database and campaign is not None):
        return f"flywheel run, then flywheel simulate score {directory}"
    if database:
        return f"flywheel run (once per stage), then flywheel simulate score {directory}"
    return f"flywheel import {directory / 'posts.ndjson'}"


@contextmanager
def _ways_out(
    stream: FleetStream, database: bool, url: str | None, token_file: Path | None, took: dict[str, Any]
) -> Iterator[Callable[[Iterator[Any]], dict[str, Any]]]:
    """Prepare where deliveries go, before the first one is made; yield what takes them and says what became of them."""
    if database:
        yield _database_way(stream)
    elif url is not None and token_file is not None:
        from flywheel_pipeline.simulation.fleet.http import Appliances, read_tokens

        with Appliances(url, read_tokens(token_file)) as appliances:
            appliances.require_tokens(row["appliance_id"] for row in stream.fleet_rows(stream.begin_ms)["appliances"])

            def post(deliveries: Iterator[Any]) -> dict[str, Any]:
                for delivery in deliveries:
                    appliances.post(delivery)
                return {
                    "answers": dict(sorted(appliances.answers.items())),
                    "outcomes": dict(appliances.outcomes.most_common()),
                    "retries": appliances.retries,
                }

            yield post
    else:
        yield lambda deliveries: {} if sum(1 for _ in deliveries) >= 0 else took


def _database_way(stream: FleetStream) -> Callable[[Iterator[Any]], dict[str, Any]]:
    from flywheel_pipeline.simulation.fleet import database as simulated

    engine = open_database()
    campaign = stream.scenario.campaign
    with engine.connect() as connection:
        own = simulated.require_simulation_database(connection, campaign)
    end = dt.datetime.fromtimestamp(stream.end_ms / 1000, dt.UTC) + dt.timedelta(days=stream.scenario.settle_days)
    if own and campaign is None:
        simulated.put_fleet(engine, stream, as_of=end)

    def take(deliveries: Iterator[Any]) -> dict[str, Any]:
        source = f"simulation-{stream.scenario.name}-{stream.seed}"
        # A campaign arrives now; a fleet of its own lives in its own time, which the policy's clock follows.
        landed = simulated.deliver(engine, deliveries, source=source, received_at=None if campaign else end)
        if own and campaign is None:
            simulated.update_fleet(engine, stream, stream.end_ms)
        return {
            "intake": {
                "read": landed.read,
                "inserted": landed.inserted,
                "corrected": landed.corrected,
                "unchanged": landed.unchanged,
                "rejected": landed.rejected,
            }
        }

    return take


def score(
    directory: Path = typer.Argument(..., help="Where `flywheel simulate fleet` put the planted truth."),
    picture: Path | None = typer.Option(None, "--plot", help="Write a picture of it, a PNG."),
    json: bool = JSON,
) -> None:
    """Hold what the pipeline found in the database in use against the planted truth. Exit 1 if a figure is off."""
    from flywheel_pipeline.simulation.fleet import score as scoring
    from flywheel_pipeline.simulation.fleet.sinks import read_truth

    truth = read_truth(directory)
    engine = open_database()
    with engine.connect() as connection:
        waiting = connection.execute(sa.text("SELECT count(*) FROM touched_cells")).scalar_one()
    if waiting:
        raise UsageError(
            f"{waiting:,} touched site-days wait: the pipeline has not run over all of it yet.",
            hint="Run `flywheel run` first.",
        )
    _finish(scoring.score(engine, truth), truth, picture, json=json)


def run(
    scenario: str = SCENARIO,
    seed: int = SEED,
    out_directory: Path | None = typer.Option(None, "--out", help="Keep posts, fleet, truth and result.json here."),
    database: bool = typer.Option(
        False, "--database", help="Use the database in use, which must be empty, instead of a temporary one."
    ),
    graph: bool = typer.Option(
        False, "--graph", help="Run the Dagster job itself for each day (some seconds a day) instead of its functions."
    ),
    picture: Path | None = typer.Option(None, "--plot", help="Write a picture of the score, a PNG."),
    json: bool = JSON,
) -> None:
    """Simulate a fleet in a fresh temporary database, a pipeline pass after each day, and score it. Exit 1 if a figure is off."""
    from flywheel_pipeline.simulation.fleet import lab
    from flywheel_pipeline.simulation.fleet import score as scoring
    from flywheel_pipeline.simulation.fleet.sinks import RESULT, Files, write_json
    from flywheel_pipeline.simulation.fleet.stream import FleetStream

    chosen = _adjusted(scenario, None, None)
    stream = FleetStream(chosen, seed)
    files = Files(out_directory, stream) if out_directory is not None else None
    with progress(f"simulating {chosen.name}") as bar, _laboratory(database, graph) as engine:

        def told(day: int, days: int, what: str) -> None:
            bar.update(bar.task_ids[0], description=f"simulating {chosen.name}: day {day + 1} of {days}, {what}")

        try:
            history = lab.run_scenario(
                engine, stream, whole_graph=graph, told=told, also=None if files is None else files.write
            )
        finally:
            if files is not None:
                files.close()
        truth = stream.truth.document()
        scored = scoring.score(engine, truth, history=history.as_dict())
    scored["days"] = history.as_dict()
    if out_directory is not None:
        write_json(out_directory / RESULT, scored)
    _finish(scored, truth, picture, json=json)


@contextmanager
def _laboratory(in_use: bool, graph: bool) -> Iterator[sa.Engine]:
    """Yield an upgraded database: the one in use, or one that is gone afterwards."""
    import os

    from flywheel_pipeline.database.embedded import EmbeddedServer
    from flywheel_pipeline.database.engine import open_engine
    from flywheel_pipeline.database.migrate import upgrade

    if in_use:
        yield open_database()
        return
    home = Path(tempfile.mkdtemp(prefix="flywheel-lab-"))
    kept = {name: os.environ.get(name) for name in ("FLYWHEEL_HOME", "FLYWHEEL_DATABASE_URL")}
    server = EmbeddedServer(home, options={"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"})
    try:
        engine = open_engine(server.ensure_running())
        upgrade(engine)
        if graph:
            # The job opens the database in use: for this process that is the laboratory's.
            os.environ["FLYWHEEL_HOME"] = str(home)
            os.environ.pop("FLYWHEEL_DATABASE_URL", None)
        yield engine
        engine.dispose()
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        server.remove()
        shutil.rmtree(home, ignore_errors=True)


def _finish(scored: dict[str, Any], truth: dict[str, Any], picture: Path | None, *, json: bool) -> None:
    if picture is not None:
        from flywheel_pipeline.simulation.fleet.drawing import plot

        picture.write_bytes(plot(scored, truth["days"] + truth["settle_days"]))
    if json:
        print_json(scored)
    else:
        _print_score(scored, truth)
        if picture is not None:
            err.print(f"Picture: {picture}", markup=False, soft_wrap=True)
    if not scored["ok"]:
        raise typer.Exit(1)


def _print_score(scored: dict[str, Any], truth: dict[str, Any]) -> None:
    counts, promotion = truth["counts"], scored["promotion"]
    out.print(
        f"[bold]{scored['scenario']}[/], seed {scored['seed']}, policy {scored['policy']}: {counts['executions']:,} executions, "
        f"{counts['deliveries']:,} posts in {truth['days']} days",
        soft_wrap=True,
    )
    print_table(
        "Patterns",
        [
            {
                "pattern": p["pattern_key"].rpartition("~")[0].replace("~", " "),
                "true": percent(p["true_rate"]),
                "seen": percent(p["observed_rate"]),
                "state": p["state"],
                "expected": p["expect"],
                "crossed": p["crossed_day"],
                "delay": p["delay_days"],
                "executions": p["delay_executions"],
                "": "" if p["ok"] else "✗",
            }
            for p in scored["patterns"]
        ],
        {
            "pattern": "pattern",
            "true": "true rate",
            "seen": "seen",
            "state": "state",
            "expected": "expected",
            "crossed": "evidence on day",
            "delay": "delay, days",
            "executions": "executions",
            "": "",
        },
    )
    standing = [r for r in scored["rules"] if r["expect"] != "any" or r["bad_from_day"] is not None]
    if standing:
        print_table(
            "Rules in service",
            [{**r, "scope": _scope_words(r.get("scope"))} for r in standing],
            {
                "rule_id": "rule",
                "state": "state",
                "expect": "expected",
                "bad_from_day": "bad from day",
                "quarantined_day": "quarantined on day",
                "quarantine_delay_executions": "after executions",
                "scope": "scope",
            },
        )
    false = promotion["false_promotions"]
    out.print(
        f"Precision {percent(promotion['precision'])}, recall {percent(promotion['recall'])} of {promotion['good']} good patterns; "
        f"false promotions: canary {false['canary']}, ring {false['ring']}, fleet {false['fleet']}",
        soft_wrap=True,
    )
    for figure in scored["figures"]:
        mark = "[green]✓[/]" if figure["ok"] else "[bold red]✗[/]"
        wrong = (
            ""
            if figure["ok"]
            else f"   [red]expected {escape(str(figure['expected']))}, found {escape(str(figure['found']))}[/]"
        )
        out.print(f"  {mark} {escape(figure['figure'])}{wrong}", soft_wrap=True)
    right = sum(figure["ok"] for figure in scored["figures"])
    out.print(f"{right} of {len(scored['figures'])} figures right.")


def _scope_words(scope: dict[str, Any] | None) -> str | None:
    if scope is None:
        return None
    return (
        f"{scope['still_served_at_bad']} of {scope['bad_sites']} bad sites still served, "
        f"{scope['withdrawn_from_good']} good ones withdrawn"
    )
