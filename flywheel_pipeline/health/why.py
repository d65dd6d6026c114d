"""Why does this rule fail? Everything that can be said of it from telemetry, as one answer.

Belongs here: reading a rule's cells and putting the parts together. Does not belong here: the parts themselves
(`segments`, `change_point`, `concentration`, `condition`, `templates`, `attribution`), their words (`report`), and the
keeping of answers (`stored`). Nothing in an answer names a host.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.health import change_point as cp
from flywheel_pipeline.health.attribution import ErrorTemplate, WaterfallStep, known_hosts, waterfall
from flywheel_pipeline.health.concentration import (
    Concentration,
    Flapping,
    StepShare,
    concentration,
    flapping,
    step_shares,
)
from flywheel_pipeline.health.failing_rules import failures_of
from flywheel_pipeline.health.redaction import public_value
from flywheel_pipeline.health.templates import CauseFamily, cause_families

if TYPE_CHECKING:
    from flywheel_pipeline.health.condition import Suggestion
    from flywheel_pipeline.health.rule_cells import RuleCells
    from flywheel_pipeline.health.segments import Cells, Segment

TEMPLATES_SHOWN = 20


@dataclass(frozen=True)
class DayRate:
    """Executions and successes of a day."""

    day: dt.date
    executions: int
    successes: int


@dataclass(frozen=True)
class Attribution:
    """Why a rule fails.

    Attributes:
        executions, successes, failures: all but synthetic; rate: successes / executions, None over nothing.
        rated_rate: the last step of the waterfall.
        steps: raw to adjusted rate; families: causes by what failed; templates: errors, at most twenty.
        segments: where it fails beyond chance; segment_steps: the error step most frequent in each
            (outside those before it), with its share.
        change: since when; concentration, flapping: on which hosts; error_steps: at which step.
        suggestion: a narrower condition that holds on held-out sites; no_suggestion: else the reason.
        days: for the plot.
    """

    rule_id: str
    first_day: dt.date
    last_day: dt.date
    executions: int
    successes: int
    failures: int
    rate: float
    rated_rate: float | None
    steps: tuple[WaterfallStep, ...]
    families: tuple[CauseFamily, ...]
    templates: tuple[ErrorTemplate, ...]
    segments: tuple[Segment, ...]
    segment_steps: tuple[StepShare | None, ...]
    change: cp.ChangePoint | None
    concentration: Concentration
    flapping: Flapping
    error_steps: tuple[StepShare, ...]
    suggestion: Suggestion | None
    no_suggestion: str
    days: tuple[DayRate, ...]


def why(connection: sa.Connection, rule_id: str) -> Attribution:
    """Attribute the failures of one rule.

    Raises:
        FlywheelError: it has no executions that count.
    """
    found = attribute(connection, [rule_id])
    if rule_id not in found:
        raise FlywheelError(
            f"There are no executions of {rule_id}.",
            hint="`flywheel status` lists the rules; test rows and rows of impossible clocks do not count.",
        )
    return found[rule_id]


def attribute(connection: sa.Connection, rule_ids: Sequence[str]) -> dict[str, Attribution]:
    """Attribute the failures of each of these rules; those without executions are missing.

    Telemetry is read twice, however many rules: once into their cells, once for the messages. Nothing is written.
    """
    if not rule_ids:
        return {}
    from flywheel_pipeline.health import rule_cells  # numpy: not for runs in which nothing fails

    ids = list(rule_ids)
    _plan_for_many_rows(connection, True)
    cells = rule_cells.read(connection, ids)
    errors = failures_of(connection, ids)
    _plan_for_many_rows(connection, False)
    events = _policy_events(connection)
    return {
        rule_id: _attribute(connection, rule_id, cells[rule_id], errors.get(rule_id, []), events)
        for rule_id in ids
        if rule_id in cells
    }


def _plan_for_many_rows(connection: sa.Connection, on: bool) -> None:
    """Have all executions of a rule hashed, for this transaction; off: as the server plans.

    The planner expects some fifty rows behind the classes of `executions`, so it would sort a million rows by nine texts
    (half of the time) and look the alias of each site up by itself. Hashing needs more than the default of 4 MB.
    """
    for name, value in (("work_mem", "'96MB'"), ("enable_sort", "off"), ("enable_nestloop", "off")):
        connection.exec_driver_sql(f"SET LOCAL {name} = {value if on else 'DEFAULT'}")


def _attribute(
    connection: sa.Connection,
    rule_id: str,
    of_rule: RuleCells,
    errors: Sequence[ErrorTemplate],
    policy_events: Sequence[cp.Event],
) -> Attribution:
    from flywheel_pipeline.health import condition, segments

    days = [DayRate(*row) for row in of_rule.days()]
    first, last = days[0].day, days[-1].day
    steps = waterfall(of_rule.classes())
    width, starts = segments.buckets(first, last)
    cells = of_rule.searched(width, starts)
    host_rows = of_rule.hosts()
    hosts = known_hosts(row[1] for row in host_rows)
    causes = segments.find_causes(cells)
    suggestion, no_suggestion = condition.suggest(cells)
    change = cp.find_change([(d.day, d.executions, d.executions - d.successes) for d in days])
    if change is not None:
        upgrades = cp.agent_upgrades(
            (site, public_value("agent_version", version, hosts), day) for site, version, day in of_rule.first_seen()
        )
        ledger = _ledger_events(connection, rule_id)
        change = replace(change, events=cp.join_events(change, [*upgrades, *policy_events, *ledger]))
    returned = connection.execute(
        sa.text(
            "SELECT site_id, hostname, sum(successes)::bigint, sum(refired)::bigint FROM episodes "
            "WHERE level = 'L1' AND rule_id = :id AND successes > 0 GROUP BY 1, 2"
        ),
        {"id": rule_id},
    ).all()
    executions, successes = steps[0].executions, steps[0].successes
    return Attribution(
        rule_id=rule_id,
        first_day=first,
        last_day=last,
        executions=executions,
        successes=successes,
        failures=executions - successes,
        rate=successes / executions,
        rated_rate=steps[-1].rate,
        steps=tuple(steps),
        families=tuple(cause_families(errors, successes, executions)),
        templates=tuple(errors[:TEMPLATES_SHOWN]),
        segments=tuple(_public(segment, hosts) for segment in causes),
        segment_steps=_top_steps(of_rule, of_rule.unsummed(width, starts), causes) if causes else (),
        change=change,
        concentration=concentration(host_rows),
        flapping=flapping((r[0], r[1], r[2], r[3]) for r in returned),
        error_steps=tuple(step_shares(of_rule.steps())),
        suggestion=None
        if suggestion is None
        else replace(suggestion, exclude=tuple(_public_conditions(c, hosts) for c in suggestion.exclude)),
        no_suggestion=no_suggestion,
        days=tuple(days),
    )


def _public(segment: Segment, hosts: Any) -> Segment:
    also = []
    for other in segment.also:
        dimension, _, value = other.partition(" ")
        also.append(f"{dimension} {public_value(dimension, value, hosts)}")
    return replace(segment, conditions=_public_conditions(segment.conditions, hosts), also=tuple(also))


def _public_conditions(conditions: Sequence[Any], hosts: Any) -> tuple[Any, ...]:
    return tuple(replace(c, value=public_value(c.dimension, c.value, hosts)) for c in conditions)


def _top_steps(of_rule: RuleCells, cells: Cells, causes: Sequence[Segment]) -> tuple[StepShare | None, ...]:
    """The error step most frequent in each segment, outside those before it; None where no agent said."""
    from flywheel_pipeline.health import segments

    found: list[StepShare | None] = []
    rest = of_rule.failures > 0
    for segment in causes:
        rows = segments.matches(cells, segment.conditions)
        shares = step_shares(of_rule.steps(rows & rest))
        found.append(next((share for share in shares if share.step is not None), None))
        rest &= ~rows
    return tuple(found)


def _policy_events(connection: sa.Connection) -> list[cp.Event]:
    rows = connection.execute(
        sa.text(
            "SELECT (activated_at AT TIME ZONE 'UTC')::date, policy_name FROM policy_activations ORDER BY id DESC LIMIT 1000"
        )
    )
    return [cp.Event(day, "policy", f"policy {name} came into force") for day, name in rows]


def _ledger_events(connection: sa.Connection, rule_id: str) -> list[cp.Event]:
    rows = connection.execute(
        sa.text(
            "SELECT (occurred_at AT TIME ZONE 'UTC')::date, kind, rule_version FROM rule_events WHERE rule_id = :id "
            "ORDER BY event_id DESC LIMIT 1000"
        ),
        {"id": rule_id},
    )
    return [cp.Event(day, "ledger", f"the rule (version {version}) was {kind}") for day, kind, version in rows]
