"""Ways of doing it that are known to fail, as controls: under the right fault the doctor must see each of them fail.

Belongs here: the wrong ways, as close to the right ones as can be. Does not belong here: faults and assertions; and
nothing here is used by the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from flywheel_pipeline.aggregates.refresh import refresh
from flywheel_pipeline.sql_models.loader import ModelGraph


@dataclass
class CursorOnTheLastId:
    """Looks for rows behind the highest id it has seen, instead of taking the outbox."""

    graph: ModelGraph
    last: int = 0

    def refresh(self, connection: sa.Connection) -> None:
        """Recompute the cells of the rows behind the cursor, exactly; the outbox is thrown away."""
        connection.exec_driver_sql("DELETE FROM touched_cells")
        found = connection.execute(
            sa.text(
                "WITH seen AS (SELECT id, site_id, (event_at AT TIME ZONE 'UTC')::date AS day FROM execution_telemetry "
                "WHERE id > :last), "
                "touched AS (INSERT INTO touched_cells (site_id, day) SELECT DISTINCT site_id, day FROM seen) "
                "SELECT max(id) FROM seen"
            ),
            {"last": self.last},
        ).scalar_one()
        refresh(connection, self.graph)
        self.last = found or self.last


@dataclass
class AddOnlyCounters:
    """Adds what is new to the counters, and notes in a file afterwards how far it came."""

    mark: Path

    def refresh(self, engine: sa.Engine, between: Callable[[], None]) -> None:
        """Add the rows behind the mark; `between` is called after the commit and before the mark is set."""
        last = int(self.mark.read_text()) if self.mark.exists() else 0
        with engine.begin() as connection:
            connection.execute(
                sa.text(
                    "UPDATE l1_rules AS r SET match_count = match_count + n.matches, success_count = success_count + n.successes "
                    "FROM (SELECT runbook_id, count(*) AS matches, count(*) FILTER (WHERE success) AS successes "
                    "FROM execution_telemetry WHERE id > :last AND resolution_level = 'L1' GROUP BY 1) AS n "
                    "WHERE n.runbook_id = r.rule_id"
                ),
                {"last": last},
            )
            newest = connection.exec_driver_sql("SELECT coalesce(max(id), 0) FROM execution_telemetry").scalar_one()
        between()
        self.mark.write_text(str(newest))


def without_the_lock(engine: sa.Engine) -> None:
    """Let refreshes overlap."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE OR REPLACE FUNCTION flywheel_lock_refresh() RETURNS void LANGUAGE sql AS 'SELECT NULL::void'"
        )


def gates_as_checks_alone(engine: sa.Engine) -> None:
    """Leave the gates to blocking checks of a run, and the ledger open to whoever materializes the asset alone."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER flywheel_guard_event ON rule_events")
