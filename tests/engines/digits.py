"""The same cells by PostgreSQL and by an engine, held against each other to the last digit; and rows full of odd values.

Belongs here: the comparison and the rows. Does not belong here: any engine's set-up.
"""

from __future__ import annotations

import datetime as dt
import itertools
from typing import Any

import sqlalchemy as sa
from hypothesis import strategies as st

from flywheel_pipeline.aggregates import refresh
from flywheel_pipeline.archive.export import export_due
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.engines.job import ComputeEngine
from flywheel_pipeline.engines.rebuild import rebuild
from flywheel_pipeline.engines.work import Computation
from flywheel_pipeline.sql_models.loader import load_models
from flywheel_pipeline.sql_models.relations import execute

GRAPH = load_models()
CELLS = [model for model in GRAPH if model.cell]
NOON = dt.datetime(2026, 2, 2, 12, tzinfo=dt.UTC)
_numbers = itertools.count(1)


def differences(engine: sa.Engine, compute: ComputeEngine, archive: Archive | None = None) -> dict[str, int]:
    """Rebuild by PostgreSQL, empty the cells, rebuild by the engine; return the rows that differ by model, none if equal.

    Rates of the scorecard and of the candidates are compared too: PostgreSQL computes them from the cells.
    """
    refresh.rebuild(engine)
    kept = {model.name for model in CELLS} | {"rule_scorecard", "pattern_candidates"}
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA IF EXISTS kept CASCADE; CREATE SCHEMA kept")
        for name in kept:
            execute(connection, f"CREATE TABLE kept.{name} AS SELECT * FROM public.{name}")
        assert execute(connection, "SELECT count(*) FROM kept.telemetry_daily_volume").scalar_one() > 0
    empty(engine)
    reports = rebuild(engine, Computation(compute, archive))
    assert sum(report.rows_written for report in reports) > 0
    found = {}
    with engine.connect() as connection:
        for name in sorted(kept):
            columns = ", ".join(f'"{column}"' for column in GRAPH.models[name].columns)
            rows = execute(
                connection,
                f"SELECT count(*) FROM ((SELECT {columns} FROM kept.{name} EXCEPT ALL SELECT {columns} FROM public.{name}) "
                f"UNION ALL (SELECT {columns} FROM public.{name} EXCEPT ALL SELECT {columns} FROM kept.{name})) AS d",
            ).scalar_one()
            if rows:
                found[name] = rows
    return found


def empty(engine: sa.Engine) -> None:
    """Leave nothing in any cell."""
    with engine.begin() as connection:
        for model in CELLS:
            connection.exec_driver_sql(f"DELETE FROM {model.name}")


def contents(engine: sa.Engine) -> dict[str, str]:
    """Count and content of every cell table, and of the outbox."""
    with engine.connect() as connection:
        return {
            name: execute(
                connection, f"SELECT count(*) || ' ' || coalesce(sum(hashtextextended(t::text, 0)), 0) FROM {name} AS t"
            ).scalar_one()
            for name in [*(model.name for model in CELLS), "touched_cells"]
        }


def row(**fields: Any) -> dict[str, Any]:
    """A verified L1 success, with these fields set or replaced; every row has the same columns."""
    at = fields.pop("at", NOON)
    return {
        "execution_id": f"x-{next(_numbers):09d}",
        "incident_id": None,
        "site_id": "site-a",
        "appliance_id": "site-a-00",
        "hostname": "host-1",
        "runbook_id": "L1-SSH-001",
        "rule_id": None,
        "action": None,
        "platform": "linux",
        "incident_type": "ssh_config",
        "agent_version": "1.0.56",
        "started_at": at,
        "completed_at": None,
        "duration_seconds": None,
        "success": True,
        "status": None,
        "verification_passed": True,
        "resolution_level": "L1",
        "error_message": None,
        "failure_type": None,
        "chaos_campaign_id": None,
        "tags": sa.null(),
        "created_at": at + dt.timedelta(minutes=1),
        **fields,
    }


def write(engine: sa.Engine, rows: list[dict[str, Any]]) -> None:
    """Insert rows by one statement."""
    with engine.begin() as connection:
        connection.execute(sa.insert(execution_telemetry).values(rows))


#: Ends of executions that no other engine can say, or only just.
ODD_ENDS = [
    "infinity", "-infinity", "294276-12-31 23:59:59+00", "12026-02-02 00:00+00", "9999-12-31 23:59:59.999999+00", "0001-01-01 00:00+00",
    "0044-03-15 12:00+00 BC", "4713-01-01 00:00+00 BC",
]  # fmt: skip


def write_odd_ends(engine: sa.Engine) -> None:
    """An execution for each odd end, and one at the ends of the calendar's days that are allowed."""
    write(engine, [row(execution_id=f"end {number}", hostname=f"h-{number}") for number in range(len(ODD_ENDS))])
    edges = (dt.datetime(1, 1, 2, tzinfo=dt.UTC), dt.datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=dt.UTC))
    write(engine, [row(at=at, created_at=at, execution_id=f"edge {at.year}") for at in edges])
    with engine.begin() as connection:
        for number, end in enumerate(ODD_ENDS):
            connection.execute(
                sa.text(
                    "UPDATE execution_telemetry SET completed_at = CAST(:end AS timestamptz) WHERE execution_id = :id"
                ),
                {"end": end, "id": f"end {number}"},
            )
        connection.exec_driver_sql(
            "UPDATE execution_telemetry SET completed_at = '-infinity' WHERE execution_id LIKE 'edge%%'"
        )


SECRETS = ("AKIA1234", "ab-SE+CRET")


def archive_with_secrets(engine: sa.Engine, url: str) -> tuple[Archive, str]:
    """An archive of one day at a URL that was given with `SECRETS` in it, and the full path of its file."""
    write(engine, [row(at=NOON + dt.timedelta(minutes=number)) for number in range(200)])
    refresh.rebuild(engine)
    archive = Archive.open(url, create=True)
    export_due(engine, archive, today=NOON.date() + dt.timedelta(days=2), after_days=0)
    (file,) = archive.manifest(NOON.date()).files("executions")
    assert any(secret in file.url for secret in SECRETS)
    return archive, archive.full_path(file.path)


ODD_TEXT = st.sampled_from(
    [
        "", " ", "plain", "ÄÖÜ straße", "İstanbul ı", "ΣΊΣΥΦΟΣ ς", "𐐀𐐨 Deseret", "K Kelvin", "ﬃ ligature", "e\u0301 é",
        "tab\tline\nfeed\r", 'quote " and \'', "back\\slash", "comma, {brace}", "%_", "\u00a0 nbsp", "🙂", "ﬁn", "\\N", "NULL",
    ]
)  # fmt: skip
ERRORS = st.sampled_from(
    [
        None, "", "Unknown action: run_windows_runbook:RB-WIN-SEC-016", "unknown ACTION: x", "Unknown action: Run_x", "Unknown action: ",
        "Unknown action: a_b\nc", "İT HAPPENED", "it happened", "STRASSE", "straße", "ÄRGER im Netz", "ärger IM netz", "100% done", "a_b",
        "axb", "back\\slash", "ΣΊΣΥΦΟΣ", "σίσυφος", "𐐀", "𐐨", "Execution timed out after 60s", "odd thing",
    ]
)  # fmt: skip
PATTERNS = st.sampled_from(
    [
        "%ÄRGER%",
        "%straße%",
        "%100\\%%",
        "a\\_b",
        "a_b",
        "back\\\\slash",
        "\\o\\d\\d%",
        "%σίσυφος%",
        "𐐨",
        "i%happened",
        "K%",
    ]
)
# Ends of days, of a leap day, and moments that local time has twice or never; each once more, so that there are ties.
MOMENTS = st.sampled_from(
    [
        NOON,
        NOON + dt.timedelta(microseconds=1),
        NOON + dt.timedelta(hours=24),
        NOON + dt.timedelta(hours=24, microseconds=1),
        NOON - dt.timedelta(hours=12),
        NOON - dt.timedelta(hours=12, microseconds=1),
        dt.datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=dt.UTC),
        dt.datetime(2025, 10, 26, 2, 30, tzinfo=dt.timezone(dt.timedelta(hours=2))),
        dt.datetime(2025, 10, 26, 2, 30, tzinfo=dt.timezone(dt.timedelta(hours=1))),
        dt.datetime(2026, 2, 3, 4, 45, tzinfo=dt.timezone(dt.timedelta(hours=14))),
        dt.datetime(1899, 12, 31, 23, 0, tzinfo=dt.timezone(dt.timedelta(hours=-11, minutes=-30))),
        dt.datetime(1500, 2, 28, 12, 0, tzinfo=dt.UTC),
    ]
)
IDENTITIES = st.sampled_from(
    [
        {"resolution_level": "L1", "runbook_id": "L1-SSH-001"},
        {"resolution_level": "l1 ", "runbook_id": "RB-LIN-SSH-001", "rule_id": "RB-AUTO-OLD"},
        {"resolution_level": "\tL1", "runbook_id": "x"},
        {"resolution_level": None, "runbook_id": "RB-AUTO-Ä"},
        {"resolution_level": None, "runbook_id": "L2-restart~100%"},
        {"resolution_level": "L2", "runbook_id": "L2-run_linux_runbook:RB-LIN\nX"},
        {"resolution_level": "L2", "runbook_id": "L2-"},
        {"resolution_level": "L2", "runbook_id": "x", "action": "run_runbook:RB-LIN-SSH-001\n"},
        {"resolution_level": "L2", "runbook_id": "x", "action": "run_runbook:"},
        {"resolution_level": "L3", "runbook_id": "ESC-1", "action": "run_macos_runbook:a:b"},
        {"resolution_level": "ｌ1", "runbook_id": "nobody knows", "rule_id": ""},
        {"resolution_level": "L1", "runbook_id": " ", "rule_id": None},
    ]
)
OUTCOMES = st.sampled_from(
    [
        {"success": True, "verification_passed": True},
        {"success": True, "verification_passed": True, "status": "failure"},
        {"success": True, "verification_passed": None},
        {"success": False, "verification_passed": None, "status": "success"},
        {"success": False, "verification_passed": False, "failure_type": "İT"},
        {"success": True, "chaos_campaign_id": "chaos"},
        {"success": True, "tags": {"synthetic": True}},
        {"success": True, "tags": {"synthetic": "true"}},
        {"success": True, "tags": {"a": {"synthetic": True}, "b": '"synthetic": true'}},
        {"success": True, "tags": [{"synthetic": True}]},
        {"success": True, "tags": {"synthetic": True, "é\"\\": [1.50, None]}},
    ]
)  # fmt: skip
ROWS = st.lists(
    st.builds(
        lambda at, lag, identity, outcome, message, **texts: row(
            at=at, created_at=at + lag, error_message=message, **texts, **identity, **outcome
        ),
        MOMENTS,
        st.sampled_from([dt.timedelta(minutes=1)] * 6 + [dt.timedelta(minutes=-10), dt.timedelta(minutes=-11), dt.timedelta(days=731)]),
        IDENTITIES,
        OUTCOMES,
        ERRORS,
        site_id=st.sampled_from(["site-a", "site-b", "SITE-A", "ällë", "old-name"]),
        hostname=st.sampled_from(["host-1", "HOST-1", "h\u00f6st", " "]),
        platform=st.one_of(st.none(), st.sampled_from(["", "Windows", "ΣΊΣΥΦΟΣ", "İ", "𐐀"])),
        incident_type=st.one_of(st.none(), ODD_TEXT),
        agent_version=st.one_of(st.none(), ODD_TEXT),
        appliance_id=ODD_TEXT,
        duration_seconds=st.sampled_from([None, -0.5, 0.1, float("nan"), float("inf")]),
    ),
    min_size=20,
    max_size=80,
)  # fmt: skip
