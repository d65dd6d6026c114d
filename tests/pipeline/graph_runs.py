"""Running the graph in a test: the job `pipeline` and parts of it, over a database of the test's own.

Belongs here: runs, and reading what they left behind. Does not belong here: assertions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.build import PIPELINE_JOB, build_defs
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.run import RunOutcome
from flywheel_pipeline.simulation.stage import Part

#: Make a copy of a database by its name.
CopyDatabase = Callable[[str], sa.Engine]
#: Point FLYWHEEL_* at a database and a home, for as long as the context lasts.
Environment = Callable[[sa.Engine, Path], AbstractContextManager[None]]

#: Dagster's own log lines stay out of the test output; each test asserts on outcomes.
QUIET: Mapping[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

#: Every table that holds state, and the columns that only say when or by which run something was last looked at.
STATE_TABLES = (
    "execution_telemetry",
    "execution_corrections",
    "patterns",
    "l1_rules",
    "rule_events",
    "human_acts",
    "rule_manifests",
    "appliance_commands",
    "episodes",
    "rule_daily_stats",
    "rule_site_stats",
    "pattern_daily_stats",
    "pattern_site_stats",
    "touched_cells",
    "policy_activations",
)
BOOKKEEPING = ("updated_at", "built_at", "batch_id")


@dataclass(frozen=True)
class Graph:
    """The code location over one database, and the Dagster instance that its runs go to."""

    engine: sa.Engine
    instance: dg.DagsterInstance

    @property
    def definitions(self) -> dg.Definitions:
        """The code location whose database resource is this test's."""
        url = self.engine.url.render_as_string(hide_password=False)
        return build_defs(resources={"database": FlywheelDatabase(url=url)})

    def run(self, *, assets: Iterable[str] | None = None, **tags: str) -> dg.ExecuteInProcessResult:
        """Run the job `pipeline`, or the given assets of it without any check, as the UI's launchpad can."""
        job = self.definitions.resolve_job_def(PIPELINE_JOB)
        if assets is not None:
            job = job.get_subset(asset_selection={dg.AssetKey(name) for name in assets}, asset_check_selection=set())
        return job.execute_in_process(instance=self.instance, raise_on_error=False, tags=tags, run_config=dict(QUIET))

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.text(query), values).mappings()]

    def value(self, query: str, **values: Any) -> Any:
        """Return the one value of a query."""
        with self.engine.connect() as connection:
            return connection.execute(sa.text(query), values).scalar_one()

    def execute(self, statement: str, **values: Any) -> None:
        """Run a statement and commit it."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def promotions(self) -> list[str]:
        """Return the rules that Flywheel itself promoted, by id."""
        return [
            row["rule_id"]
            for row in self.rows("SELECT rule_id FROM rule_events WHERE kind IN ('promoted', 'advanced') ORDER BY 1")
        ]

    def quarantines(self) -> int:
        """Count the rules out of service."""
        return int(self.value("SELECT count(*) FROM l1_rules WHERE state = 'quarantined'"))

    def verdicts(self) -> dict[str, str]:
        """Return the gate verdicts of the latest batch."""
        return {
            row["gate"]: row["verdict"]
            for row in self.rows(
                "SELECT gate, verdict FROM gate_verdicts "
                "WHERE batch_id = (SELECT max(batch_id) FROM refresh_batches) ORDER BY gate"
            )
        }


@dataclass(frozen=True)
class PlayedDay:
    """The day after both its runs, with the states that `flywheel status` read on the way.

    `before`: the morning staged and nothing run; `noon`: after the morning's run; `evening`: after the evening's.
    """

    engine: sa.Engine
    home: Path
    parts: tuple[Part, Part]
    outcomes: tuple[RunOutcome, RunOutcome]
    before: dict[str, Any]
    noon: dict[str, Any]
    evening: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


Flywheel = Callable[..., Answer]


def state_of(engine: sa.Engine) -> dict[str, list[str]]:
    """Return every row of every state table as JSON text, sorted; bookkeeping columns left out."""
    state = {}
    with engine.connect() as connection:
        for table in STATE_TABLES:
            rows = connection.exec_driver_sql(f"SELECT to_jsonb(t) FROM {table} AS t").scalars()
            state[table] = sorted(
                json.dumps({key: value for key, value in row.items() if key not in BOOKKEEPING}, sort_keys=True)
                for row in rows
            )
    return state


def failed_steps(result: dg.ExecuteInProcessResult) -> set[str]:
    """Return the keys of the steps that failed."""
    return {event.step_key for event in result.all_events if event.is_step_failure and event.step_key}


def finished_steps(result: dg.ExecuteInProcessResult) -> set[str]:
    """Return the keys of the steps that ran to their end; what stands behind a failed gate is not among them."""
    return {event.step_key for event in result.all_events if event.is_step_success and event.step_key}
