"""Whatever happens to the log, in whatever order, every figure after a refresh equals a recount from the log.

A state machine on a real PostgreSQL: plain SQL and intake, corrections, deletes, TRUNCATE, slow writers, aliases, class
rules, skewed clocks, partial, rolled back and repeated refreshes, rebuilds.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
from typing import Any

import psycopg
import sqlalchemy as sa
from exactness import assert_exact, graph
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql
from telemetry_rows import insert, row

from flywheel_pipeline.aggregates import refresh as refreshing
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.promotion import ledger
from flywheel_pipeline.telemetry.intake import post_execution

FIRST = dt.datetime(2026, 2, 1, tzinfo=dt.UTC)
RECEIVED = dt.datetime(2026, 2, 8, tzinfo=dt.UTC)
_databases = itertools.count(1)

# Few values, so that rows meet: the same host an exact day apart, both sides of midnight, ends of alias times.
moments = st.builds(
    lambda day, offset: FIRST + dt.timedelta(days=day) + offset,
    st.integers(0, 3),
    st.sampled_from(
        [
            dt.timedelta(0),
            dt.timedelta(hours=6),
            dt.timedelta(hours=6, microseconds=1),
            dt.timedelta(hours=23, minutes=59, seconds=59, microseconds=999_999),
        ]
    ),
)
sites = st.sampled_from(["site-a", "site-a", "old-a", "old-a", "older-a", "site-b"])
hosts = st.sampled_from(["h1", "h1", "h1", "h2"])
identities = st.sampled_from(
    [
        {"resolution_level": "L1", "runbook_id": "L1-SSH-001"},
        {"resolution_level": "L1", "runbook_id": "RB-AUTO-NEW"},
        {"resolution_level": None, "runbook_id": "RB-AUTO-OLD"},
        {"resolution_level": " l1 ", "runbook_id": "RB-LIN-SSH-001", "rule_id": "RB-AUTO-OLD"},
        {"resolution_level": "L1", "runbook_id": "RB-LIN-SSH-001", "rule_id": "L1-SSH-001"},
        {"resolution_level": "L2", "runbook_id": "L2-run_linux_runbook:RB-LIN-SSH-001"},
        {"resolution_level": "L2", "runbook_id": "RB-LIN-SSH-001"},
        {"resolution_level": None, "runbook_id": "L2-restart~100%"},
        {"resolution_level": "L2", "runbook_id": "x", "action": "run_runbook:RB-LIN-SSH-001"},
        {"resolution_level": "L3", "runbook_id": "ESC-1"},
        {"resolution_level": None, "runbook_id": "nobody knows"},
    ]
)
outcomes = st.sampled_from(
    [
        {"success": True, "verification_passed": True},
        {"success": True, "verification_passed": True},
        {"success": True, "verification_passed": True},
        {"success": True, "verification_passed": None},
        {"success": True, "verification_passed": False, "status": "failure"},
        {"success": False, "verification_passed": None, "error_message": "Unknown action: run_windows_runbook"},
        {"success": False, "verification_passed": False, "error_message": "odd thing happened"},
        {"success": False, "verification_passed": False, "failure_type": "odd", "status": "failure"},
        {"success": True, "verification_passed": True, "chaos_campaign_id": "chaos-1"},
        {"success": True, "verification_passed": True, "tags": {"synthetic": True}},
    ]
)
clocks = st.sampled_from(
    [dt.timedelta(minutes=1)] * 9 + [dt.timedelta(minutes=-10), dt.timedelta(minutes=-11), dt.timedelta(days=731)]
)
kinds = st.sampled_from(["ssh_config"] * 5 + ["firewall", "", None])
raw_rows = st.builds(
    lambda at, site, host, identity, outcome, lag, kind, platform, version, timed: row(
        at=at,
        site_id=site,
        hostname=host,
        created_at=at + lag,
        incident_type=kind,
        platform=platform,
        agent_version=version,
        **{**({} if timed else {"started_at": None, "duration_seconds": -1.0}), **identity, **outcome},
    ),
    moments,
    sites,
    hosts,
    identities,
    outcomes,
    clocks,
    kinds,
    st.sampled_from(["windows", "Windows", "", None]),
    st.sampled_from(["1.0.56", "", None]),
    st.booleans(),
)
changes = st.one_of(
    outcomes,
    identities,
    st.builds(lambda site: {"site_id": site}, sites),
    st.builds(lambda host: {"hostname": host}, hosts),
    st.builds(lambda at: {"started_at": at}, moments),
    st.builds(lambda at, lag: {"started_at": None, "completed_at": None, "created_at": at + lag}, moments, clocks),
    st.builds(lambda kind: {"incident_type": kind}, kinds),
)
class_rules = st.builds(
    lambda name, outcome_class, field, pattern: {
        "rule_name": name,
        "outcome_class": outcome_class,
        "field": field,
        "pattern": pattern,
        "description": "of a test",
    },
    st.sampled_from(["one", "two"]),
    st.sampled_from(["synthetic", "not_applicable", "unreachable", "suppressed"]),
    st.sampled_from(["error_message", "failure_type", "status"]),
    st.sampled_from(["ODD%", "%thing%", "%a_l%", "unknown action%"]),
)


def sendable(outcome: dict[str, Any]) -> dict[str, Any]:
    """What of an outcome keeps the contract of the intake."""
    return {name: value for name, value in outcome.items() if name not in ("chaos_campaign_id", "tags", "status")}


class History(RuleBasedStateMachine):
    """One database, one refresher, one slow writer beside it."""

    server: EmbeddedServer
    template: str
    executions = Bundle("executions")
    posts = Bundle("posts")

    @initialize(target=executions, rows=st.lists(raw_rows, min_size=8, max_size=16))
    def create(self, rows: list[dict[str, Any]]) -> Any:
        self.name = f"history_{next(_databases)}"
        self._administer("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", self.name, self.template)
        self.engine = open_engine(self.server.url.set(database=self.name))
        self.slow: sa.Connection | None = None
        with self.engine.begin() as connection:
            ids = insert(connection, rows)
        self.refresh()
        return multiple(*ids)

    def teardown(self) -> None:
        try:
            self.end_slow_writer(commit=True)
            self.refresh()
            self.figures_equal_a_recount()
        finally:
            if self.slow is not None:
                self.slow.close()
            self.engine.dispose()
            self._administer("DROP DATABASE {} WITH (FORCE)", self.name)

    def _administer(self, statement: str, *names: str) -> None:
        where = psycopg.conninfo.make_conninfo(
            host=str(self.server.socket_directory), port=5432, user="flywheel", dbname="postgres"
        )
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _run(self, statement: str, **values: Any) -> None:
        self.exact = False
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    # -- writers ---------------------------------------------------------------------------------------------

    @rule(target=executions, rows=st.lists(raw_rows, min_size=1, max_size=6))
    def insert_by_sql(self, rows: list[dict[str, Any]]) -> Any:
        self.exact = False
        with self.engine.begin() as connection:
            return multiple(*insert(connection, rows))

    @rule(rows=st.lists(raw_rows, min_size=1, max_size=3))
    def insert_and_roll_back(self, rows: list[dict[str, Any]]) -> None:
        with self.engine.connect() as connection:
            insert(connection, rows)
            connection.rollback()

    @rule(target=executions, kept=raw_rows, dropped=raw_rows)
    def insert_with_a_savepoint(self, kept: dict[str, Any], dropped: dict[str, Any]) -> Any:
        self.exact = False
        with self.engine.begin() as connection:
            with connection.begin_nested() as savepoint:
                insert(connection, [dropped])
                savepoint.rollback()
            return insert(connection, [kept])[0]

    @precondition(lambda self: self.slow is None)
    @rule(target=executions, rows=st.lists(raw_rows, min_size=1, max_size=3))
    def begin_slow_writer(self, rows: list[dict[str, Any]]) -> Any:
        self.slow = self.engine.connect()
        self.slow.begin()
        return multiple(*insert(self.slow, rows))

    @precondition(lambda self: self.slow is not None)
    @rule(commit=st.booleans())
    def end_slow_writer(self, commit: bool) -> None:
        if self.slow is not None:
            if commit:
                self.exact = False
                self.slow.commit()
            self.slow.close()
            self.slow = None

    @rule(target=posts, at=moments, site=st.sampled_from(["site-a", "site-b", "old-a"]), host=hosts, outcome=outcomes)
    def post(self, at: dt.datetime, site: str, host: str, outcome: dict[str, Any]) -> dict[str, Any]:
        execution = {
            "execution_id": row()["execution_id"],
            "hostname": host,
            "runbook_id": "L1-SSH-001",
            "incident_type": "ssh_config",
            "started_at": at.isoformat(),
            **sendable(outcome),
        }
        sent = {"site_id": site, "reported_at": at.isoformat(), "execution": execution}
        assert self._post(sent) == "inserted"
        return sent

    @rule(target=posts, sent=posts, minutes=st.integers(-5, 5), outcome=outcomes)
    def correct_through_the_intake(self, sent: dict[str, Any], minutes: int, outcome: dict[str, Any]) -> dict[str, Any]:
        at = dt.datetime.fromisoformat(sent["reported_at"]) + dt.timedelta(minutes=minutes)
        again = {**sent, "reported_at": at.isoformat(), "execution": {**sent["execution"], **sendable(outcome)}}
        self._post(again)
        return again

    @rule(sent=posts)
    def post_again(self, sent: dict[str, Any]) -> None:
        self._post(sent)

    def _post(self, sent: dict[str, Any]) -> str:
        self.exact = False
        return post_execution(self.engine, json.dumps(sent).encode(), received_at=RECEIVED).outcome

    @rule(ids=st.lists(executions, min_size=1, max_size=4), change=changes)
    def correct_by_sql(self, ids: list[str], change: dict[str, Any]) -> None:
        values = {name: json.dumps(value) if name == "tags" else value for name, value in change.items()}
        sets = ", ".join(
            f"{name} = CAST(:{name} AS jsonb)" if name == "tags" else f"{name} = :{name}" for name in values
        )
        self._run(f"UPDATE execution_telemetry SET {sets} WHERE execution_id = ANY (:ids)", ids=ids, **values)

    @rule(ids=st.lists(executions, min_size=1, max_size=4))
    def delete(self, ids: list[str]) -> None:
        self._run("DELETE FROM execution_telemetry WHERE execution_id = ANY (:ids)", ids=ids)

    @precondition(lambda self: self.slow is None)
    @rule(sure=st.integers(0, 3))
    def truncate(self, sure: int) -> None:
        if sure == 3:
            self._run("TRUNCATE execution_telemetry")

    # -- how rows are read -------------------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(["site", "rule"]),
        older=st.booleans(),
        begins=st.none() | moments,
        ends=st.none() | moments,
    )
    def add_alias(self, kind: str, older: bool, begins: dt.datetime | None, ends: dt.datetime | None) -> None:
        names = {"site": ("site-a", "old-a", "older-a"), "rule": ("RB-AUTO-NEW", "RB-AUTO-OLD", "L1-SSH-001")}[kind]
        self._run(
            f"INSERT INTO {kind}_aliases (alias, {kind}_id, valid_from, valid_to, actor, reason) "
            "SELECT CAST(:alias AS text), :target, x.f, x.t, 'test', 'test' "
            "FROM (SELECT coalesce(CAST(:begins AS timestamptz), '-infinity') AS f, coalesce(CAST(:ends AS timestamptz), 'infinity') AS t) x "
            f"WHERE x.f < x.t AND NOT EXISTS (SELECT FROM {kind}_aliases a WHERE a.alias = CAST(:alias AS text) AND a.valid_from < x.t AND a.valid_to > x.f)",
            alias=names[1 + older],
            target=names[0],
            begins=begins,
            ends=ends,
        )

    @rule(kind=st.sampled_from(["site", "rule"]), at=moments, remove=st.booleans())
    def end_alias(self, kind: str, at: dt.datetime, remove: bool) -> None:
        first = f"(SELECT min(id) FROM {kind}_aliases)"
        if remove:
            self._run(f"DELETE FROM {kind}_aliases WHERE id = {first}")
        else:
            self._run(
                f"UPDATE {kind}_aliases a SET valid_to = :at WHERE id = {first} AND valid_from < :at "
                f"AND NOT EXISTS (SELECT FROM {kind}_aliases b WHERE b.alias = a.alias AND b.id <> a.id "
                "AND b.valid_from < :at AND b.valid_to > a.valid_from)",
                at=at,
            )

    @rule(added=class_rules)
    def set_class_rule(self, added: dict[str, Any]) -> None:
        self._run(
            "INSERT INTO outcome_class_rules (rule_name, outcome_class, field, pattern, description) "
            "VALUES (:rule_name, :outcome_class, :field, :pattern, :description) ON CONFLICT (rule_name) DO UPDATE "
            "SET outcome_class = excluded.outcome_class, field = excluded.field, pattern = excluded.pattern",
            **added,
        )

    @rule(name=st.sampled_from(["one", "two", "unknown_action"]))
    def toggle_class_rule(self, name: str) -> None:
        self._run("UPDATE outcome_class_rules SET enabled = NOT enabled WHERE rule_name = :name", name=name)

    @rule(name=st.sampled_from(["one", "two"]))
    def remove_class_rule(self, name: str) -> None:
        self._run("DELETE FROM outcome_class_rules WHERE rule_name = :name", name=name)

    @rule()
    def register_the_new_rule(self) -> None:
        self.exact = False
        with self.engine.begin() as connection:
            ledger.register_builtin(
                connection,
                [
                    {
                        "rule_id": "RB-AUTO-NEW",
                        "incident_type": "ssh_config",
                        "platform": "linux",
                        "runbook_id": "RB-LIN-SSH-001",
                    }
                ],
            )

    # -- refreshes ---------------------------------------------------------------------------------------------

    @rule()
    def refresh(self) -> None:
        with self.engine.begin() as connection:
            refreshing.refresh(connection, graph())
        self.exact = True

    @rule()
    def refresh_twice(self) -> None:
        self.refresh()
        with self.engine.begin() as connection:
            again = refreshing.refresh(connection, graph())
        assert (again.cells, again.rows_written, again.counters_changed) == (0, 0, 0)

    @rule(cells=st.integers(1, 3))
    def refresh_in_part(self, cells: int) -> None:
        with self.engine.begin() as connection:
            report = refreshing.refresh(connection, graph(), max_cells=cells)
        self.exact = self.exact or report.remaining == 0

    @rule()
    def refresh_and_roll_back(self) -> None:
        with self.engine.connect() as connection:
            refreshing.refresh(connection, graph())
            connection.rollback()

    @rule(site=st.none() | sites, chunk=st.integers(1, 4), day=st.none() | moments)
    def rebuild(self, site: str | None, chunk: int, day: dt.datetime | None) -> None:
        reports = refreshing.rebuild(
            self.engine, site=site, from_day=None if day is None else day.date(), chunk_cells=chunk
        )
        assert reports[-1].remaining == 0
        if self.exact:
            assert sum(report.rows_written for report in reports) == 0
        self.exact = True

    @invariant()
    def figures_equal_a_recount(self) -> None:
        if getattr(self, "exact", False):
            assert_exact(self.engine)


def test_figures_equal_a_recount_after_any_history(server: EmbeddedServer, template_database: str) -> None:
    machine = type("HistoryHere", (History,), {"server": server, "template": template_database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("FLYWHEEL_HISTORIES", "4")),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )
