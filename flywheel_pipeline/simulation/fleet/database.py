"""A simulated fleet in a database: through the intake, and only where it cannot be taken for production.

Belongs here: the refusal, the fleet tables, the standing rules, and posts by the ordinary import. Does not belong here:
decisions; `lab` steps the pipeline.

A database is one of simulations if each site that it knows of is called `sim-…`. Into any other one only a campaign may
go: its rows carry a chaos_campaign_id, so they count nowhere, and it adds no site, no appliance, no rule.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from flywheel_pipeline.aggregates.batches import activate_policy
from flywheel_pipeline.candidates.patterns import import_patterns
from flywheel_pipeline.database import tables
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.promotion.ledger import import_rules
from flywheel_pipeline.simulation.fleet.scenario import SITE_PREFIX
from flywheel_pipeline.simulation.fleet.sinks import aliases
from flywheel_pipeline.simulation.fleet.stream import Delivery, FleetStream, ServedRule
from flywheel_pipeline.telemetry.aliases import add_site_alias
from flywheel_pipeline.telemetry.intake import IntakeReport, import_file

ACTOR: Final = "fleet-simulator"
_PIECE: Final = 50_000


@dataclass
class Landed:
    """What the intake made of everything so far: read = inserted + corrected + unchanged + rejected."""

    read: int = 0
    inserted: int = 0
    corrected: int = 0
    unchanged: int = 0
    rejected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, report: IntakeReport) -> None:
        """Add one import."""
        self.read += report.read
        self.inserted += report.inserted
        self.corrected += report.corrected
        self.unchanged += report.unchanged
        self.rejected += report.rejected
        for code, count in report.reasons.items():
            self.reasons[code] = self.reasons.get(code, 0) + count


def foreign_site(connection: sa.Connection) -> str | None:
    """Return a site of this database that no simulation made, or None: it is empty, or holds simulations only."""
    for table in ("sites", "appliances", "execution_telemetry"):
        found = connection.execute(
            sa.text(f"SELECT site_id FROM {table} WHERE left(site_id, :n) <> :prefix LIMIT 1"),  # noqa: S608 (constants)
            {"n": len(SITE_PREFIX), "prefix": SITE_PREFIX},
        ).scalar()
        if found is not None:
            return str(found)
    return None


def require_simulation_database(connection: sa.Connection, campaign: str | None) -> bool:
    """Refuse a database of production, unless the rows carry a campaign; return whether it is one of simulations.

    Raises:
        UsageError: it knows sites of its own and the rows would count; or it is one that a simulation filled before.
    """
    site = foreign_site(connection)
    if site is not None:
        if campaign is None:
            raise UsageError(
                f"This database holds the site {site}, which no simulation made: simulated rows would count in it.",
                hint="Simulate into an empty database (FLYWHEEL_HOME, FLYWHEEL_DATABASE_URL), or as a campaign: "
                "--campaign ID marks each row, so that it counts nowhere.",
            )
        return False
    held = connection.execute(sa.text("SELECT site_id FROM sites LIMIT 1")).scalar()
    if held is not None and campaign is None:
        raise UsageError(
            f"This database holds a simulated fleet already ({held}): two fleets in one could not be scored.",
            hint="Name an empty database: FLYWHEEL_HOME or FLYWHEEL_DATABASE_URL.",
        )
    return True


def put_fleet(engine: sa.Engine, stream: FleetStream, *, as_of: dt.datetime) -> None:
    """Put sites, appliances, standing rules and imported patterns in, and the scenario's policy with its clock in force."""
    rows = stream.fleet_rows(stream.begin_ms)
    with engine.begin() as connection:
        require_simulation_database(connection, None)
        for table, values in ((tables.sites, rows["sites"]), (tables.appliances, rows["appliances"])):
            connection.execute(insert(table).on_conflict_do_nothing(), values)
        import_patterns(connection, rows["patterns"])
        import_rules(
            connection, rows["rules"], actor=ACTOR, reason=f"scenario {stream.scenario.name}: stood before day 0"
        )
    set_clock(engine, stream, as_of)


def set_clock(engine: sa.Engine, stream: FleetStream, as_of: dt.datetime) -> None:
    """Put the scenario's policy in force with this clock, for the batches from now on."""
    scenario = stream.scenario
    with engine.begin() as connection:
        activate_policy(
            connection, scenario.policy, actor=ACTOR, reason=f"scenario {scenario.name}: simulated time", as_of=as_of
        )


def update_fleet(engine: sa.Engine, stream: FleetStream, at_ms: int) -> None:
    """Bring appliances, renamed sites and their aliases to what they are at a time."""
    rows = stream.fleet_rows(at_ms)
    known = aliases(stream, at_ms)
    with engine.begin() as connection:
        if stream.scenario.fleet.renames:
            connection.execute(insert(tables.sites).on_conflict_do_nothing(), rows["sites"])
        connection.execute(
            sa.text(
                "UPDATE appliances AS a SET site_id = n.site_id, agent_version = n.agent_version, last_checkin = :at "
                "FROM unnest(CAST(:ids AS text[]), CAST(:sites AS text[]), CAST(:versions AS text[])) "
                "  AS n (appliance_id, site_id, agent_version) WHERE n.appliance_id = a.appliance_id"
            ),
            {
                "at": rows["appliances"][0]["last_checkin"],
                "ids": [row["appliance_id"] for row in rows["appliances"]],
                "sites": [row["site_id"] for row in rows["appliances"]],
                "versions": [row["agent_version"] for row in rows["appliances"]],
            },
        )
        for alias in known:
            add_site_alias(connection, alias["alias"], alias["site_id"], actor=ACTOR, reason="the site was renamed")


def deliver(
    engine: sa.Engine, deliveries: Iterable[Delivery], *, source: str, received_at: dt.datetime | None
) -> Landed:
    """Bring posts in by the ordinary import, in pieces of bounded size; return what became of them.

    `received_at` is the clock of the contract; None: the present.
    """
    landed = Landed()
    with tempfile.TemporaryDirectory(prefix="flywheel-simulation-") as directory:
        path = Path(directory) / "piece.ndjson"
        pieces = 0
        waiting = iter(deliveries)
        while True:
            count = 0
            with path.open("wb") as file:
                for delivery in waiting:
                    file.write(delivery.body + b"\n")
                    count += 1
                    if count == _PIECE:
                        break
            if not count:
                return landed
            pieces += 1
            landed.add(import_file(engine, path, source=f"{source}-{pieces}", received_at=received_at))


def serving(engine: sa.Engine) -> dict[str, dict[tuple[str, str], ServedRule]]:
    """Read what each appliance's manifest holds: (incident type, platform) -> the first rule that matches."""
    contents: dict[str, dict[tuple[str, str], ServedRule]] = {}
    served: dict[str, dict[tuple[str, str], ServedRule]] = {}
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT DISTINCT ON (manifest_hash) manifest_hash, rules FROM rule_manifests ORDER BY manifest_hash"
            )
        ).all()
        for row in rows:
            matched: dict[tuple[str, str], ServedRule] = {}
            for rule in row.rules:
                said = {c["field"]: c["value"] for c in rule["conditions"] if c["operator"] == "eq"}
                kind = (said.get("incident_type") or said.get("check_type") or "", said.get("platform") or "")
                if all(kind) and kind not in matched:
                    matched[kind] = ServedRule(rule["id"], *kind, rule["actions"][0].partition(":")[2])
            contents[row.manifest_hash] = matched
        for row in connection.execute(sa.text("SELECT appliance_id, manifest_hash FROM rule_manifests")):
            served[row.appliance_id] = contents[row.manifest_hash]
    return served
