"""A small fleet on a real database, run through the pipeline day by day under a clock of its own.

Belongs here: telemetry of chosen hosts and days, and one run of refresh, checks, decisions and promotions. The sites
that run a rule are those whose manifest holds it. Does not belong here: assertions.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.aggregates.batches import Batch, activate_policy, open_batch
from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.candidates.keys import pattern_key, rule_id_of_pattern
from flywheel_pipeline.candidates.patterns import write_observed
from flywheel_pipeline.delivery.publish import write_manifests
from flywheel_pipeline.promotion import quality
from flywheel_pipeline.promotion.apply import Applied, apply_promotions, apply_quarantines
from flywheel_pipeline.promotion.decide import EARLY_GATES, Decided, decide_patterns, decide_rules
from flywheel_pipeline.quality import Finding, record_verdict
from flywheel_pipeline.sql_models.loader import load_models

FIRST_DAY = dt.datetime(2026, 1, 5, 8, tzinfo=dt.UTC)
GRAPH = load_models()
PASSED = Finding(passed=True, sentence="Staged by the test.", observed="", required="")
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Pattern:
    """What L2 did: one incident type healed by one runbook on Windows."""

    incident_type: str
    runbook_id: str

    @property
    def key(self) -> str:
        """The pattern key."""
        return pattern_key(self.incident_type, self.runbook_id, "windows")

    @property
    def rule_id(self) -> str:
        """The rule promoted from it."""
        return rule_id_of_pattern(self.key)


AUDIT = Pattern("audit_policy", "RB-WIN-SEC-002")
SPOOLER = Pattern("service_spooler", "RB-WIN-SVC-002")
PASSWORDS = Pattern("password_policy", "RB-WIN-SEC-004")  # credentials: of the high-risk class
# Eight patterns that legacy may promote, none of them on an incident type that a built-in rule handles.
MANY = tuple(
    Pattern(incident_type, runbook_id)
    for incident_type, runbook_id in (
        ("audit_policy", "RB-WIN-SEC-002"),
        ("lockout_policy", "RB-WIN-SEC-003"),
        ("password_policy", "RB-WIN-SEC-004"),
        ("registry_run_persistence", "RB-WIN-SEC-019"),
        ("wmi_event_persistence", "RB-WIN-SEC-021"),
        ("service_spooler", "RB-WIN-SVC-002"),
        ("service_w32time", "RB-WIN-SVC-003"),
        ("service_wuauserv", "RB-WIN-SVC-004"),
    )
)


@dataclass(frozen=True)
class Ran:
    """What one run decided and applied."""

    batch: Batch
    decided: dict[str, Decided]
    applied: Applied
    quarantined: Applied

    def verdict(self, pattern: Pattern) -> tuple[str, str]:
        """The verdict on a pattern and its reason."""
        decision = self.decided[pattern.key].decision
        return decision.verdict, decision.reason


class StagedFleet:
    """Sites of four hosts, each with one appliance of a current agent."""

    def __init__(self, engine: sa.Engine, sites: int = 60, *, policy: str = "standard") -> None:
        """Put `sites` sites into the database of `engine`."""
        self.engine = engine
        self.policy = policy
        self.sites = [f"site-{i:03d}" for i in range(sites)]
        with engine.begin() as connection:
            connection.execute(
                sa.text(
                    "INSERT INTO appliances (appliance_id, site_id, agent_version, last_checkin) "
                    "VALUES (:site || '-01', :site, '1.0.74', :at)"
                ),
                [{"site": site, "at": FIRST_DAY} for site in self.sites],
            )

    def heal(
        self,
        pattern: Pattern,
        day: float,
        *,
        sites: Iterable[str] | None = None,
        hosts: Sequence[int] = (1, 2, 3, 4),
        rule: bool = False,
        good: Callable[[str, int], bool] = lambda _site, _host: True,
        **columns: Any,
    ) -> int:
        """Report one execution on each host of each site at 08:00 of a day; by the rule, or by L2. Returns how many."""
        action = f"run_windows_runbook:{pattern.runbook_id}"
        rows = [
            {
                "execution_id": f"execution-{next(_numbers)}",
                "site_id": site,
                "appliance_id": f"{site}-01",
                "runbook_id": pattern.rule_id if rule else f"L2-{action}",
                "rule_id": pattern.rule_id if rule else None,
                "action": action,
                "hostname": f"HOST{host}",
                "platform": "windows",
                "incident_type": pattern.incident_type,
                "agent_version": "1.0.74",
                "started_at": FIRST_DAY + dt.timedelta(days=day),
                "success": good(site, host),
                "verification_passed": good(site, host),
                "resolution_level": "L1" if rule else "L2",
                "created_at": FIRST_DAY + dt.timedelta(days=day, minutes=1),
                **columns,
            }
            for site in (self.sites if sites is None else sites)
            for host in hosts
        ]
        names = ", ".join(rows[0])
        places = ", ".join(f":{name}" for name in rows[0])
        with self.engine.begin() as connection:
            connection.execute(sa.text(f"INSERT INTO execution_telemetry ({names}) VALUES ({places})"), rows)
        return len(rows)

    def refreshed(self, day: float) -> Batch:
        """Open the batch of a run at noon of a day and refresh; every check before the decisions passes."""
        now = FIRST_DAY + dt.timedelta(days=day, hours=4)
        run_id = f"staged-{next(_numbers)}"
        with self.engine.begin() as connection:
            activate_policy(connection, self.policy, actor="test", reason="a clock of its own", as_of=now)
            batch = open_batch(connection, run_id)
            refresh(connection, GRAPH, batch_id=batch.batch_id)
            write_observed(connection)
            for gate in EARLY_GATES:
                record_verdict(connection, batch.batch_id, gate, PASSED)
            return open_batch(connection, run_id)

    def decide(self, batch: Batch) -> dict[str, Decided]:
        """Decide every pattern and ask the gates of promotion."""
        with self.engine.begin() as connection:
            decided = {item.subject_id: item for item in decide_patterns(connection, batch)}
            for gate in (quality.executable_runbooks_only, quality.success_floor):
                record_verdict(connection, batch.batch_id, gate.__name__, gate(connection, batch))
        return decided

    def apply(self, batch: Batch) -> Applied:
        """Apply the batch's promotions and publish."""
        with self.engine.begin() as connection:
            applied = apply_promotions(connection, batch)
            write_manifests(connection, batch.batch_id)
        return applied

    def run(self, day: float) -> Ran:
        """Run the whole pipeline at noon of a day."""
        batch = self.refreshed(day)
        with self.engine.begin() as connection:
            quarantined = apply_quarantines(connection, batch, decide_rules(connection, batch))
        decided = self.decide(batch)
        return Ran(batch, decided, self.apply(batch), quarantined)

    def rows(self, query: str, **values: Any) -> list[Any]:
        """Return the rows of a query."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(query), values).all())

    def execute(self, statement: str, **values: Any) -> None:
        """Run a statement and commit it."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def state(self, pattern: Pattern) -> str:
        """The state of the pattern's rule; none where there is no rule."""
        found = self.rows("SELECT state FROM l1_rules WHERE rule_id = :id", id=pattern.rule_id)
        return str(found[0].state) if found else "none"

    def serving(self, rule_id: str) -> list[str]:
        """The sites whose manifest holds the rule."""
        return [
            row.site_id
            for row in self.rows(
                "SELECT site_id FROM rule_manifests WHERE rules @> jsonb_build_array(jsonb_build_object('id', CAST(:id AS text))) "
                "ORDER BY site_id",
                id=rule_id,
            )
        ]

    def verdicts(self, batch: Batch) -> dict[str, str]:
        """The gate verdicts of a batch."""
        return {
            row.gate: row.verdict
            for row in self.rows("SELECT gate, verdict FROM gate_verdicts WHERE batch_id = :b", b=batch.batch_id)
        }

    def events(self, rule_id: str) -> list[tuple[str, str]]:
        """The steps of a rule as (kind, state), in order."""
        return [
            (row.kind, row.to_state)
            for row in self.rows(
                "SELECT kind, to_state FROM rule_events WHERE rule_id = :id ORDER BY event_id", id=rule_id
            )
        ]
