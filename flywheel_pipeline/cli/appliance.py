"""`flywheel simulate appliance`: reference agents against a running agent API."""

from __future__ import annotations

import json as json_module
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from flywheel_pipeline.cli.terminal import err, out, print_json
from flywheel_pipeline.errors import UsageError


def register(simulate: typer.Typer) -> None:
    """Add the command to `flywheel simulate`."""
    simulate.command("appliance")(appliance)


def appliance(
    url: str = typer.Option("http://127.0.0.1:8000", "--url", help="Where the agent API listens."),
    token: str | None = typer.Option(
        None, "--token", envvar="FLYWHEEL_AGENT_TOKEN", help="The appliance's bearer token, better in the variable."
    ),
    appliance_id: str | None = typer.Option(None, "--appliance-id", help="<site_id>-<MAC>."),
    site_id: str | None = typer.Option(None, "--site-id", help="Default: the appliance id up to its last hyphen."),
    agent_version: str = typer.Option(
        "1.0.74", "--agent-version", help="Release; an old one refuses newer action forms."
    ),
    fleet: Path | None = typer.Option(
        None,
        "--fleet",
        help="NDJSON, a line per appliance: appliance_id, token, and site_id, agent_version if they differ.",
    ),
    hours: float = typer.Option(24.0, "--hours", min=0.25, help="Simulated time; it ends now."),
    seed: int = typer.Option(1, "--seed", help="What hosts and failures are drawn from."),
    lost: float = typer.Option(
        0.0, "--lost", min=0.0, max=0.9, help="Share of requests, and of answers, lost on the way."
    ),
    offline_hours: float = typer.Option(0.0, "--offline-hours", min=0.0, help="Hours without network in the middle."),
    json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Run reference agents: they fetch rules, heal simulated hosts, report, acknowledge, and say what they run."""
    import random
    from datetime import timedelta

    from flywheel_pipeline.simulation.appliance import (
        Agent,
        HttpTransport,
        LossyTransport,
        Profile,
        one_day_until_now,
        run_agents,
    )

    known = _appliances(fleet, token, appliance_id, site_id, agent_version)
    start, end = one_day_until_now(hours)
    middle = start + (end - start) / 2
    away = ((middle, middle + timedelta(hours=offline_hours)),) if offline_hours else ()
    transport = HttpTransport(url)
    agents = []
    for row in known:
        profile = Profile(
            row["appliance_id"], row["site_id"], row["agent_version"], reports_capabilities=False, offline=away
        )
        rng = random.Random(f"{seed}/{row['appliance_id']}/network")  # noqa: S311 - simulated chance
        agents.append(
            Agent(profile, row["token"], LossyTransport(transport, rng, requests=lost, answers=lost), seed=seed)
        )
    try:
        counts: Counter[str] = run_agents(agents, start, end)
    finally:
        transport.close()
    state = [
        {
            "appliance_id": agent.profile.appliance_id,
            "agent_version": agent.profile.agent_version,
            "rules": len(agent.rules),
            "manifest_hash": agent.rule_set_hash,
            "waiting": agent.waiting,
        }
        for agent in agents
    ]
    if json:
        print_json({"counts": dict(sorted(counts.items())), "appliances": state})
    else:
        out.print(f"{len(agents)} appliance(s), {hours:g} simulated hours until {end.isoformat()}")
        for name, count in sorted(counts.items()):
            out.print(f"  {name.replace('_', ' '):28} {count:>8,}")
    if any(agent.rule_set_hash is None for agent in agents):
        err.print("Some appliances never got their rules; run `flywheel run` so that manifests are built.")
        raise typer.Exit(1)


def _appliances(
    fleet: Path | None, token: str | None, appliance_id: str | None, site_id: str | None, agent_version: str
) -> list[dict[str, Any]]:
    """The appliances to run, each with appliance_id, site_id, agent_version and token."""
    if fleet is not None:
        try:
            rows = [json_module.loads(line) for line in fleet.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError, json_module.JSONDecodeError) as error:
            raise UsageError(f"{fleet} cannot be read: {error}.", hint="Each line is one JSON object.") from error
    else:
        rows = [{"appliance_id": appliance_id, "token": token, "site_id": site_id}]
    found = []
    for row in rows:
        if not isinstance(row, dict) or not row.get("appliance_id") or not row.get("token"):
            raise UsageError(
                "A reference appliance needs its id and its token.",
                hint="Give --appliance-id and FLYWHEEL_AGENT_TOKEN, or --fleet FILE; `flywheel tokens issue` makes a token.",
            )
        found.append(
            {
                "appliance_id": row["appliance_id"],
                "token": row["token"],
                "site_id": row.get("site_id") or str(row["appliance_id"]).rpartition("-")[0],
                "agent_version": row.get("agent_version") or agent_version,
            }
        )
    return found
