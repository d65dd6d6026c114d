"""Retention: what is purged stays in the figures, and nothing that was not counted can be purged."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from exactness import graph
from telemetry_rows import NOON, insert, row

from flywheel_pipeline.aggregates.recount import recount
from flywheel_pipeline.aggregates.refresh import purge, rebuild, refresh
from flywheel_pipeline.database.migrate import upgrade
from flywheel_pipeline.errors import FlywheelError, ModelError
from flywheel_pipeline.telemetry.intake import post_execution

DAYS = 6
BEFORE = NOON.date() + dt.timedelta(days=3)
CELLS = [model for model in graph() if model.cell]


@pytest.fixture
def fleet(engine: sa.Engine) -> sa.Engine:
    """A good and a bad execution a day for six days, a skewed and a synthetic row among the first; all counted."""
    with engine.begin() as connection:
        for day in range(DAYS):
            at = NOON + dt.timedelta(days=day)
            insert(connection, [row(at=at), row(at=at, hostname="h2", success=False)])
        insert(connection, [row(created_at=NOON - dt.timedelta(hours=1)), row(chaos_campaign_id="c")])
        refresh(connection, graph())
    return engine


def contents(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    with engine.connect() as connection:
        found = {
            model.name: sorted(
                (tuple(r) for r in connection.exec_driver_sql(f"SELECT {', '.join(model.columns)} FROM {model.name}")),
                key=repr,
            )
            for model in CELLS
        }
        found["l1_rules"] = [
            tuple(r) for r in connection.exec_driver_sql("SELECT rule_id, match_count, success_count FROM l1_rules")
        ]
    return found


def one(engine: sa.Engine, query: str) -> object:
    with engine.connect() as connection:
        return connection.exec_driver_sql(query).scalar_one()


def test_archived_and_live_are_all_time(fleet: sa.Engine) -> None:
    before = contents(fleet)
    assert sum(purge(fleet, before=BEFORE, actor="test").values()) == 8
    assert one(fleet, "SELECT count(*) FROM execution_telemetry") == 2 * DAYS + 2 - 8
    assert one(fleet, "SELECT count(*) FROM touched_cells") == 0
    assert contents(fleet) == before
    archived = one(fleet, "SELECT sum(rows_purged) FROM sealed_days")
    live = one(fleet, "SELECT count(*) FROM execution_telemetry")
    assert archived == 8
    assert archived + live == one(  # type: ignore[operator]
        fleet,
        "SELECT (SELECT sum(executions) FROM telemetry_daily_volume) "
        "+ (SELECT count(*) FROM telemetry_violations WHERE problem = 'skewed_clock')",
    )
    assert purge(fleet, before=BEFORE, actor="test") == {}


def test_neither_refresh_nor_rebuild_nor_aliases_change_sealed_figures(fleet: sa.Engine) -> None:
    before = contents(fleet)
    purge(fleet, before=BEFORE, actor="test")
    rebuild(fleet, chunk_cells=2)
    assert contents(fleet) == before
    with fleet.begin() as connection:
        refresh(connection, graph(), whole_rollups=True)
        connection.exec_driver_sql(
            "INSERT INTO rule_aliases (alias, rule_id, actor, reason) VALUES ('L1-SSH-001', 'L1-OTHER', 'test', 'test')"
        )
        refresh(connection, graph())
    assert one(fleet, "SELECT match_count FROM l1_rules WHERE rule_id = 'L1-SSH-001'") == 6
    assert one(fleet, "SELECT executions FROM rule_site_stats WHERE rule_id = 'L1-OTHER'") == 6
    assert recount(fleet).differences == 0


def test_live_days_go_on_after_a_purge(fleet: sa.Engine) -> None:
    purge(fleet, before=BEFORE, actor="test")
    with fleet.begin() as connection:
        insert(connection, [row(at=NOON + dt.timedelta(days=3))])
        connection.exec_driver_sql("DELETE FROM execution_telemetry WHERE hostname = 'h2'")
        refresh(connection, graph())
    assert one(fleet, "SELECT match_count FROM l1_rules WHERE rule_id = 'L1-SSH-001'") == 12 - 3 + 1
    assert recount(fleet).differences == 0


def test_purge_refuses_while_the_outbox_holds_those_days(fleet: sa.Engine) -> None:
    with fleet.begin() as connection:
        insert(connection, [row(at=NOON + dt.timedelta(days=3))])  # may change the day before, which is to be sealed
    with pytest.raises(FlywheelError, match="wait for a refresh"):
        purge(fleet, before=BEFORE, actor="test")
    assert one(fleet, "SELECT count(*) FROM sealed_days") == 0
    assert sum(purge(fleet, before=BEFORE - dt.timedelta(days=1), actor="test").values()) == 6


def test_purge_refuses_rows_that_were_never_counted(fleet: sa.Engine) -> None:
    with fleet.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # as a restore does
        insert(connection, [row()])
    with pytest.raises(FlywheelError, match="5 rows of 2026-02-02 are in the log and 4 in the aggregates"):
        purge(fleet, before=BEFORE, actor="test")
    rebuild(fleet)
    assert sum(purge(fleet, before=BEFORE, actor="test").values()) == 9


def test_a_late_row_of_a_sealed_day_is_refused_and_kept_by_the_intake(fleet: sa.Engine) -> None:
    purge(fleet, before=BEFORE, actor="test")
    with fleet.connect() as connection, pytest.raises(sa.exc.DatabaseError, match="figures are sealed"):
        insert(connection, [row(), row(at=NOON + dt.timedelta(days=4))])
    with fleet.connect() as connection, pytest.raises(sa.exc.DatabaseError, match="figures are sealed"):
        connection.execute(sa.text("UPDATE execution_telemetry SET started_at = :at"), {"at": NOON})
    post = {
        "site_id": "site-a",
        "reported_at": NOON.isoformat(),
        "execution": {
            "execution_id": "late",
            "hostname": "h",
            "runbook_id": "L1-SSH-001",
            "success": True,
            "started_at": NOON.isoformat(),
        },
    }
    result = post_execution(fleet, post, received_at=NOON + dt.timedelta(days=DAYS))
    assert result.outcome == "rejected"
    assert result.reason is not None
    assert "sealed" in result.reason
    assert (
        one(
            fleet,
            "SELECT convert_from(payload, 'UTF8')::jsonb -> 'execution' ->> 'execution_id' FROM telemetry_rejects",
        )
        == "late"
    )


def test_an_upgrade_refuses_to_drop_sealed_figures(fleet: sa.Engine) -> None:
    purge(fleet, before=BEFORE, actor="test")
    before = contents(fleet)
    with fleet.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE rule_daily_stats ADD COLUMN by_hand text")
    with pytest.raises(ModelError, match="figures of purged days"):
        upgrade(fleet)
    assert contents(fleet) == before
