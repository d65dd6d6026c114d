"""Writers that never give up, what they sent, and what must therefore be there.

Belongs here: a deterministic stream of steps per writer, the process that sends it, and the truth that follows from
what was acknowledged. Does not belong here: faults.

A step is one transaction: new rows, corrections of earlier ones, or a batch sent again. A writer sends a step until the
database acknowledges it and then notes it in its journal; the next step comes after that. Killed, it goes on behind
its journal. So a step may be sent twice, and must count once; and what stands in a journal must be in the log.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from fault_lab import FORK, PASSING, leave_the_group

from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable
from flywheel_pipeline.telemetry.intake import import_file

HOSTS = 6
#: One writer is an appliance: it posts to the agent API, and reports for its own site alone.
OVER_HTTP, HTTP_SITE, HTTP_APPLIANCE = 2, "soak-http", "soak-http-01"
SITES = [f"soak-{number:02d}" for number in range(24)]
#: (level, what stands in runbook_id, incident type, the runbook of an L2 action, share of successes)
KINDS: list[tuple[str, str, str, str | None, float]] = [
    ("L1", "L1-FIREWALL-001", "firewall_status", None, 0.9),
    ("L1", "L1-SSH-001", "ssh_config", None, 0.7),
    ("L1", "L1-NOBODY-KNOWS", "backup_status", None, 0.5),
    ("L2", "L2-run_windows_runbook:RB-WIN-SEC-002", "audit_policy", "RB-WIN-SEC-002", 0.97),
    ("L2", "L2-run_windows_runbook:RB-WIN-SVC-002", "service_spooler", "RB-WIN-SVC-002", 0.95),
    ("L2", "L2-run_windows_runbook:RB-WIN-SEC-019", "registry_run_persistence", "RB-WIN-SEC-019", 0.6),
    ("L3", "ESC-0001", "bitlocker_status", None, 0.0),
]
WEIGHTS = [30, 20, 10, 15, 10, 10, 5]
_COLUMNS = (
    "execution_id varchar, site_id varchar, appliance_id varchar, runbook_id varchar, hostname varchar, platform varchar, "
    "incident_type varchar, agent_version varchar, started_at timestamptz, completed_at timestamptz, duration_seconds float8, "
    "success boolean, status varchar, verification_passed boolean, resolution_level varchar, error_message text, "
    "chaos_campaign_id varchar, created_at timestamptz, reported_at timestamptz"
)
_NAMES = ", ".join(part.split()[0] for part in _COLUMNS.split(", "))
_INSERT = (
    f"INSERT INTO execution_telemetry ({_NAMES}) SELECT {_NAMES} FROM jsonb_to_recordset(CAST(:rows AS jsonb)) "
    f"AS r ({_COLUMNS}) ON CONFLICT (execution_id) DO NOTHING"
)
_CORRECT = (
    "UPDATE execution_telemetry AS t SET success = r.success, status = r.status, verification_passed = r.verification_passed, "
    "error_message = r.error_message, reported_at = r.reported_at "
    f"FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS r ({_COLUMNS}) "
    "WHERE t.execution_id = r.execution_id AND t.reported_at < r.reported_at"
)


@dataclass(frozen=True)
class Step:
    """One transaction of a writer: `kind` is new, corrected or again; `bad` lines go along where it sends files."""

    kind: str
    rows: list[dict[str, Any]]
    bad: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Stream:
    """What all writers of one soak send; two of equal fields send the same."""

    seed: int
    steps: int
    rows_a_step: int
    first_day: dt.datetime
    days: int

    def step(self, writer: int, number: int) -> Step:
        """The step of this number, from 1; corrections and repetitions follow behind the same number of new rows."""
        pick = random.Random(f"{self.seed}:{writer}:{number}")
        chance = pick.random()
        if number == 1 or chance < 0.84:
            bad = [b'{"broken": %d, "writer": %d' % (number, writer)] if pick.random() < 0.1 else []
            return Step("new", self._rows(writer, number), bad)
        earlier = pick.randrange(1, number)
        while self._kind(writer, earlier) != "new":
            earlier -= 1
        rows = self._rows(writer, earlier)
        if chance < 0.92:
            return Step("again", rows)
        corrected = pick.sample(rows, max(len(rows) // 10, 1))
        return Step("corrected", [self._corrected(row, number, pick.random() < 0.5) for row in corrected])

    def _kind(self, writer: int, number: int) -> str:
        chance = random.Random(f"{self.seed}:{writer}:{number}").random()
        return "new" if number == 1 or chance < 0.84 else "again" if chance < 0.92 else "corrected"

    def _rows(self, writer: int, number: int) -> list[dict[str, Any]]:
        pick = random.Random(f"{self.seed}:{writer}:{number}:rows")
        today = number * self.days // (self.steps + 1)
        rows = []
        for position in range(self.rows_a_step):
            # One row in fifty comes late, one in two hundred from a clock that runs years behind.
            day = pick.randrange(today + 1) if pick.random() < 0.02 else today
            at = self.first_day + dt.timedelta(days=day, seconds=pick.randrange(86_400))
            arrived = at + dt.timedelta(minutes=1)
            if pick.random() < 0.005 and writer % 2:
                at -= dt.timedelta(days=1000)
            level, runbook, incident, _, share = pick.choices(KINDS, WEIGHTS)[0]
            success = pick.random() < share
            site = pick.choice(SITES)
            if writer == OVER_HTTP:
                site = HTTP_SITE
            rows.append(
                {
                    "execution_id": f"w{writer:02d}-{number:06d}-{position:04d}",
                    "site_id": site,
                    "appliance_id": f"{site}-01",
                    "runbook_id": runbook,
                    "hostname": f"{site}-h{pick.randrange(HOSTS)}",
                    "platform": "windows",
                    "incident_type": incident,
                    "agent_version": f"1.0.{70 + pick.randrange(3)}",
                    "started_at": at.isoformat(),
                    "completed_at": (at + dt.timedelta(seconds=5)).isoformat(),
                    "duration_seconds": 5.0,
                    "success": success,
                    "status": "success" if success else "failure",
                    "verification_passed": success,
                    "resolution_level": level,
                    "error_message": None if success else "Phase 'verify' failed: step 3",
                    "chaos_campaign_id": "campaign-1" if pick.random() < 0.02 else None,
                    "created_at": arrived.isoformat(),
                    "reported_at": arrived.isoformat(),
                }
            )
        return rows

    @staticmethod
    def _corrected(row: Mapping[str, Any], number: int, success: bool) -> dict[str, Any]:
        reported = dt.datetime.fromisoformat(row["reported_at"]) + dt.timedelta(seconds=number)
        return {
            **row,
            "success": success,
            "status": "success" if success else "failure",
            "verification_passed": success,
            "error_message": None if success else "Phase 'verify' failed: step 3",
            "reported_at": reported.isoformat(),
        }


# -- the process -----------------------------------------------------------------------------------


@dataclass
class Writer:
    """A process that sends the steps of one writer: through the intake (even numbers), by plain SQL (odd ones), or, where
    it has the address of the agent API and a token, over HTTP.
    """

    number: int
    stream: Stream
    url: sa.URL
    place: Path
    api: tuple[str, str] | None = None
    process: Any = None

    @property
    def journal(self) -> Path:
        """One line per acknowledged step."""
        return self.place / f"writer-{self.number:02d}.journal"

    @property
    def retries(self) -> int:
        """How often a step had to be sent again because of a fault."""
        file = self.place / f"writer-{self.number:02d}.retries"
        return file.stat().st_size if file.exists() else 0

    @property
    def acknowledged(self) -> int:
        """Number of the last acknowledged step."""
        return self.journal.stat().st_size // 8 if self.journal.exists() else 0

    def start(self) -> None:
        """Go on behind the journal."""
        self.process = FORK.Process(target=_write, args=(self,), daemon=True)
        self.process.start()

    def kill(self) -> None:
        """Kill -9; the step in flight was committed or was not."""
        self.process.kill()  # one that ended already stays as it is
        self.process.join()

    def wrong(self) -> str | None:
        """The traceback of a writer that met what no fault explains."""
        file = self.place / f"writer-{self.number:02d}.wrong"
        return file.read_text() if file.exists() else None


def allow(place: Path, steps: int) -> None:
    """Let all writers go as far as this step."""
    scratch = place / "allowed.new"
    scratch.write_text(str(steps))
    scratch.replace(place / "allowed")


def _allowed(place: Path) -> int:
    return int((place / "allowed").read_text())


def _write(writer: Writer) -> None:
    leave_the_group()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _send_all(writer)
    except BaseException:  # noqa: BLE001 (the parent reads it, and fails)
        (writer.place / f"writer-{writer.number:02d}.wrong").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _send_all(writer: Writer) -> None:
    journal = os.open(writer.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    retries = os.open(writer.place / f"writer-{writer.number:02d}.retries", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pick = random.Random()
    engine: sa.Engine | None = None
    number = writer.acknowledged + 1
    while number <= writer.stream.steps:
        if number > _allowed(writer.place):
            time.sleep(0.02)
            continue
        step = writer.stream.step(writer.number, number)
        while True:
            try:
                if writer.api is not None:
                    _send_by_http(step, *writer.api)
                    break
                engine = engine or open_engine(writer.url)
                if writer.number % 2:
                    _send_by_sql(engine, step, pick.random() * 0.05)
                else:
                    _send_by_intake(engine, step, writer)
                break
            except (*PASSING, DatabaseUnavailable, httpx.TransportError, SendAgain):
                os.write(retries, b".")
                time.sleep(0.05)
        os.write(journal, b"%07d\n" % number)
        number += 1


def _send_by_sql(engine: sa.Engine, step: Step, pause: float) -> None:
    with engine.begin() as connection:
        statement = _CORRECT if step.kind == "corrected" else _INSERT
        connection.execute(sa.text(statement), {"rows": json.dumps(step.rows)})
        time.sleep(pause)  # a transaction at work, for faults to fall into


def _send_by_intake(engine: sa.Engine, step: Step, writer: Writer) -> None:
    with tempfile.NamedTemporaryFile(dir=writer.place, suffix=".ndjson") as file:
        file.write(_posts(step))
        file.flush()
        report = import_file(engine, file.name, source=f"writer-{writer.number:02d}")
    if report.rejected != len(step.bad):
        raise AssertionError(f"the intake refused what is no bad row: {report.as_dict()}")


class SendAgain(Exception):
    """The agent API says that a batch is to be sent again."""


def _send_by_http(step: Step, address: str, token: str) -> None:
    answer = httpx.post(
        f"{address}/api/agent/executions",
        content=_posts(step),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/x-ndjson"},
        timeout=30,
    )
    if answer.status_code in (408, 429, 503):
        raise SendAgain
    if answer.status_code != 200 or answer.json()["rejected"] != len(step.bad):
        raise AssertionError(f"the agent API answered {answer.status_code}: {answer.text[:2000]}")


def _posts(step: Step) -> bytes:
    lines = [
        json.dumps(
            {
                "site_id": row["site_id"],
                "reported_at": row["reported_at"],
                "execution": {k: v for k, v in row.items() if k not in ("site_id", "created_at", "reported_at")},
            }
        ).encode()
        for row in step.rows
    ]
    return b"\n".join([*lines, *step.bad]) + b"\n"


# -- the truth -------------------------------------------------------------------------------------

Cell = tuple[str, dt.date, str]


@dataclass
class Truth:
    """What must be in the database, from the journals and the streams alone."""

    stream: Stream
    rows: dict[str, tuple[Cell | None, bool]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    successes: Counter[str] = field(default_factory=Counter)
    cells: Counter[Cell] = field(default_factory=Counter)
    healed: Counter[Cell] = field(default_factory=Counter)
    taken: Counter[int] = field(default_factory=Counter)
    bad: set[bytes] = field(default_factory=set)

    def take(self, writer: Writer) -> None:
        """Add the steps that this writer's journal names and that were not taken yet."""
        last = writer.acknowledged
        for number in range(self.taken[writer.number] + 1, last + 1):
            step = self.stream.step(writer.number, number)
            for row in step.rows if step.kind != "again" else ():
                self._set(row["execution_id"], _cell(row), row["success"])
            if writer.number % 2 == 0:
                self.bad.update(step.bad)
        self.taken[writer.number] = last

    def _set(self, name: str, cell: Cell | None, success: bool) -> None:
        writer = name[:3]
        if name in self.rows:
            before = self.rows[name][1]
            self.successes[writer] -= before
            if cell is not None:
                self.healed[cell] -= before
        else:
            self.counts[writer] += 1
            if cell is not None:
                self.cells[cell] += 1
        self.rows[name] = (cell, success)
        self.successes[writer] += success
        if cell is not None:
            self.healed[cell] += success

    def differences(self, engine: sa.Engine) -> list[str]:
        """Hold the log and the counters against it: lost rows, rows too many, other outcomes, other counters."""
        found = []
        with engine.connect() as connection:
            kept = {
                row.writer: (row.rows, row.successes)
                for row in connection.exec_driver_sql(
                    "SELECT left(execution_id, 3) AS writer, count(*) AS rows, count(*) FILTER (WHERE success) AS successes "
                    "FROM execution_telemetry GROUP BY 1"
                )
            }
            counted = {
                (row.site_id, row.day, row.rule_id): (row.executions, row.raw_successes)
                for row in connection.exec_driver_sql(
                    "SELECT site_id, day, rule_id, executions, raw_successes FROM rule_daily_stats WHERE executions > 0"
                )
            }
            rejects = {bytes(p) for p in connection.exec_driver_sql("SELECT payload FROM telemetry_rejects").scalars()}
        for writer in sorted({*self.counts, *kept}):
            wanted, is_there = (self.counts[writer], self.successes[writer]), kept.get(writer, (0, 0))
            if wanted != is_there:
                found.append(f"{writer}: {wanted} rows and successes acknowledged, {is_there} in the log")
        wanted_cells = {cell: (count, self.healed[cell]) for cell, count in self.cells.items()}
        if wanted_cells != counted:
            off = [c for c in {*wanted_cells, *counted} if wanted_cells.get(c) != counted.get(c)]
            for cell in sorted(off, key=str):
                found.append(f"{cell}: {wanted_cells.get(cell)} sent, {counted.get(cell)} counted")
        found += [f"refused and not in the rejects: {line!r}" for line in self.bad - rejects]
        return found

    def fingerprint(self) -> str:
        """MD5 over every execution and its outcome, in order of their ids."""
        lines = (f"{name}|{'t' if success else 'f'}" for name, (_, success) in sorted(self.rows.items()))
        return hashlib.md5("\n".join(lines).encode(), usedforsecurity=False).hexdigest()


FINGERPRINT = (
    "SELECT md5(string_agg(execution_id || '|' || CASE WHEN success THEN 't' ELSE 'f' END, E'\\n' "
    'ORDER BY execution_id COLLATE "C")) FROM execution_telemetry'
)


def _cell(row: Mapping[str, Any]) -> Cell | None:
    """Where this row counts in the statistics of rules; None: nowhere there."""
    at, arrived = dt.datetime.fromisoformat(row["started_at"]), dt.datetime.fromisoformat(row["created_at"])
    if row["resolution_level"] != "L1" or row["chaos_campaign_id"] or arrived - at > dt.timedelta(days=730):
        return None
    return row["site_id"], at.date(), row["runbook_id"]
