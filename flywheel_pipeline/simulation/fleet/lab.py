"""The lab: a simulated fleet lives day by day against a real database, and the pipeline runs at the end of each day.

Belongs here: stepping simulated days, what somebody does on them, and one pass of the pipeline. Does not belong here:
the fleet (`stream`) and the score (`score`).

A pass is what `flywheel run` does, under the clock of the simulated day, in one of two ways:

    in process    the functions behind the assets, in the order of the graph: refresh, candidates, the required gates,
                  quarantines, decisions, promotions, manifests and commands. The same SQL, ledger and padlock, without
                  Dagster around them; a few tenths of a second a day.
    whole graph   the Dagster job `pipeline` itself; some seconds a day.

Appliances run what their manifest holds after each pass, so a promoted rule heals, or fails, from the next day on.
"""

from __future__ import annotations

import datetime as dt
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates import quality as aggregates_quality
from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.candidates.patterns import write_observed
from flywheel_pipeline.delivery.publish import queue_commands, write_manifests
from flywheel_pipeline.promotion import quality as promotion_quality
from flywheel_pipeline.promotion.acts import act as human_act
from flywheel_pipeline.promotion.apply import apply_promotions, apply_quarantines
from flywheel_pipeline.promotion.decide import decide_patterns, decide_rules
from flywheel_pipeline.quality import record_verdict, unmet_gates
from flywheel_pipeline.simulation.fleet import database
from flywheel_pipeline.simulation.fleet.scenario import Act
from flywheel_pipeline.simulation.fleet.stream import DAY_MS, Delivery, FleetStream, ServedRule
from flywheel_pipeline.sql_models.loader import ModelGraph, load_models
from flywheel_pipeline.telemetry import quality as telemetry_quality

#: (day, days in all, what is being done)
Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Day:
    """What one simulated day brought. `held` maps a pattern to (verdict, reason) where it did not move."""

    day: int
    clock: str
    landed: dict[str, Any]
    moved: tuple[tuple[str, str], ...]
    quarantined: tuple[str, ...]
    held: dict[str, tuple[str, str]]
    unmet_gates: dict[str, str]
    acts: tuple[dict[str, Any], ...]
    seconds: float


@dataclass
class History:
    """The days of one simulation."""

    days: list[Day] = field(default_factory=list)

    def as_dict(self) -> list[dict[str, Any]]:
        """The days as JSON types."""
        return [asdict(day) for day in self.days]

    @property
    def landed(self) -> database.Landed:
        """What the intake made of all posts."""
        total = database.Landed()
        for day in self.days:
            total.read += day.landed["read"]
            total.inserted += day.landed["inserted"]
            total.corrected += day.landed["corrected"]
            total.unchanged += day.landed["unchanged"]
            total.rejected += day.landed["rejected"]
        return total


def run_scenario(
    engine: sa.Engine,
    stream: FleetStream,
    *,
    whole_graph: bool = False,
    promotion_only: bool = False,
    told: Told | None = None,
    also: Callable[[Delivery], None] | None = None,
) -> History:
    """Let a scenario live in an empty database, day by day, with a pass at the end of each.

    Args:
        engine: an upgraded database, empty of sites.
        stream: the fleet at its beginning.
        whole_graph: run the Dagster job for each pass instead of its functions in process.
        promotion_only: queue no commands, and write manifests only after a pass that moved or quarantined a rule. For
            fleets whose appliances, sites and agents stay as they are: their manifests are the same then.
        told: called as the days go by.
        also: called with each delivery, for files beside the database.

    Raises:
        UsageError: the database knows sites already.
    """
    scenario = stream.scenario
    database.put_fleet(engine, stream, as_of=scenario.begins)
    with engine.begin() as connection:
        write_manifests(connection, open_batch(connection, f"simulation-{scenario.name}-{stream.seed}-start").batch_id)
    history = History()
    days = scenario.days + scenario.settle_days
    for day in range(days):
        begun = time.monotonic()
        if told is not None:
            told(day, days, "deliver")
        acts = tuple(do(engine, one) for one in scenario.acts if one.day == day)
        served = database.serving(engine)
        stream.serve(functools.partial(_held_by, served))
        until = stream.begin_ms + (day + 1) * DAY_MS
        clock = dt.datetime.fromtimestamp(until / 1000, dt.UTC)
        coming: Iterable[Delivery] = stream.rest() if day == days - 1 else stream.advance(until)
        if also is not None:
            coming = _copied(coming, also)
        landed = database.deliver(
            engine, coming, source=f"simulation-{scenario.name}-{stream.seed}-day-{day}", received_at=clock
        )
        database.update_fleet(engine, stream, until)
        database.set_clock(engine, stream, clock)
        if told is not None:
            told(day, days, "decide")
        run_id = f"simulation-{scenario.name}-{stream.seed}-day-{day}"
        passed = (
            _pass_by_graph(engine) if whole_graph else pass_in_process(engine, run_id, promotion_only=promotion_only)
        )
        history.days.append(
            Day(day, clock.isoformat(), asdict(landed), acts=acts, seconds=time.monotonic() - begun, **passed)
        )
    return history


def _held_by(
    served: Mapping[str, Mapping[tuple[str, str], ServedRule]], appliance_id: str
) -> Mapping[tuple[str, str], ServedRule]:
    return served.get(appliance_id, {})


@functools.cache
def _models() -> ModelGraph:
    """The SQL models, read once: parsing them takes as long as all the rest of a small pass."""
    return load_models()


def _copied(coming: Iterable[Delivery], also: Callable[[Delivery], None]) -> Iterator[Delivery]:
    for delivery in coming:
        also(delivery)
        yield delivery


def pass_in_process(engine: sa.Engine, run_id: str, *, promotion_only: bool = False) -> dict[str, Any]:
    """Run one pass of the pipeline in this process, under the policy and clock in force; return what it did.

    `promotion_only` as in `run_scenario`.
    """
    with engine.begin() as connection:
        batch = open_batch(connection, run_id)
        refresh(connection, _models(), batch_id=batch.batch_id)
        write_observed(connection)
    with engine.connect() as connection:
        findings = {
            "telemetry_contract": telemetry_quality.telemetry_contract(connection, batch.now),
            "telemetry_freshness": telemetry_quality.telemetry_freshness(connection, batch.now),
        }
    findings["counters_equal_recount"] = aggregates_quality.counters_equal_recount(engine, full=False)
    with engine.begin() as connection:
        for gate, finding in findings.items():
            record_verdict(connection, batch.batch_id, gate, finding)
        batch = open_batch(connection, run_id)
        quarantined = apply_quarantines(connection, batch, decide_rules(connection, batch))
    with engine.begin() as connection:
        decided = decide_patterns(connection, batch)
        for question in (promotion_quality.executable_runbooks_only, promotion_quality.success_floor):
            record_verdict(connection, batch.batch_id, question.__name__, question(connection, batch))
    with engine.begin() as connection:
        applied = apply_promotions(connection, batch)
        unmet = unmet_gates(connection, batch.batch_id)
        if not promotion_only or applied.moved or quarantined.moved:
            write_manifests(connection, batch.batch_id)
        if not promotion_only:
            queue_commands(connection, batch.batch_id)
    held: dict[str, tuple[str, str]] = {
        item.subject_id: (item.decision.verdict, item.decision.reason)
        for item in decided
        if item.decision.target_state is None
    }
    held |= {subject: ("held", why) for subject, why in applied.held}
    return {
        "moved": applied.moved,
        "quarantined": tuple(rule_id for rule_id, _ in quarantined.moved),
        "held": held,
        "unmet_gates": unmet,
    }


def _pass_by_graph(engine: sa.Engine) -> dict[str, Any]:
    from flywheel_pipeline.run import dagster_instance, run_pipeline

    with dagster_instance(engine.url) as instance:
        outcome = run_pipeline(instance, trigger="simulation")
    with engine.connect() as connection:
        batch = connection.execute(
            sa.text("SELECT batch_id FROM refresh_batches WHERE run_id = :run"), {"run": outcome.run_id}
        ).scalar_one()
        moves = connection.execute(
            sa.text("SELECT rule_id, kind, to_state FROM rule_events WHERE batch_id = :batch ORDER BY event_id"),
            {"batch": batch},
        ).all()
        held = connection.execute(
            sa.text(
                "SELECT DISTINCT ON (subject_id) subject_id, verdict, reason FROM promotion_decisions "
                "WHERE subject_kind = 'pattern' AND confirmed_batch_id = :batch AND verdict NOT IN ('promote', 'advance') "
                "ORDER BY subject_id, decision_id DESC"
            ),
            {"batch": batch},
        ).all()
        unmet = unmet_gates(connection, batch)
    return {
        "moved": tuple((m.rule_id, m.to_state) for m in moves if m.kind in ("promoted", "advanced")),
        "quarantined": tuple(m.rule_id for m in moves if m.kind == "quarantined"),
        "held": {row.subject_id: (row.verdict, row.reason) for row in held},
        "unmet_gates": unmet,
    }


def do(engine: sa.Engine, one: Act) -> dict[str, Any]:
    """Do what somebody does in a scenario; return what became of it: {act, done, message}."""
    if one.act == "blanket_reenable":
        return {"act": one.act, **_blanket_reenable(engine)}
    if one.act == "quarantine":
        (report,) = human_act(
            engine, "quarantine", [one.rule_id or ""], actor=database.ACTOR, reason="the scenario says so"
        )
        return {"act": one.act, "done": report.done, "message": report.message}
    with engine.connect() as connection:
        keys = list(
            connection.execute(
                sa.text("SELECT pattern_key FROM patterns WHERE incident_type = :type AND pattern_key IS NOT NULL"),
                {"type": one.incident_type},
            ).scalars()
        )
    if not keys:
        return {"act": one.act, "done": False, "message": f"no pattern of {one.incident_type} is known yet"}
    reports = human_act(engine, "approve", keys, actor="dana (simulated)", reason="the scenario says so")
    return {"act": one.act, "done": all(r.done for r in reports), "message": "; ".join(r.message for r in reports)}


def _blanket_reenable(engine: sa.Engine) -> dict[str, Any]:
    """Do what the old system's migration did to its quarantined rules, in its own words."""
    try:
        with engine.begin() as connection:
            count = connection.execute(sa.text("UPDATE l1_rules SET enabled = true WHERE NOT enabled")).rowcount
    except sa.exc.DBAPIError as error:
        return {"done": False, "message": str(error.orig).splitlines()[0]}
    return {"done": count > 0, "message": f"{count} rules re-enabled"}
