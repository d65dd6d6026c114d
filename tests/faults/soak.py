"""A soak: writers, pipelines and a daemon at work, and one random fault after the other.

After each fault: every writer gets through what it was allowed to send, one refresh, and then the log must hold exactly
what was acknowledged, the counters what a recount from the journals gives, and the doctor must find the invariants
whole. Equal seeds send equal rows and choose equal faults; where in a transaction a fault strikes is chance.

    python tests/faults/soak.py [--quick] [--seed N] [--faults N] [--rows N] [--writers N] [--json]

The full soak (210 faults, 1,000,000 rows, 8 writers, a real Dagster daemon beside two pipelines) takes a quarter of an
hour on two cores; --quick, without the daemon, half a minute. Exit 1 if anything was lost, doubled or illegal.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "aggregates"))

import dagster as dg
import plain_recount
import sqlalchemy as sa
from dagster_shared.serdes import deserialize_value
from fault_lab import (
    FORK,
    PASSING,
    AgentApi,
    Daemon,
    Proxy,
    SmallDisk,
    backends,
    broken_invariants,
    kill_postmaster,
    kill_server_process,
    leave_the_group,
    refresh_once,
    run_workers,
    terminate_backends,
    until,
)
from fault_writers import (
    FINGERPRINT,
    HTTP_APPLIANCE,
    HTTP_SITE,
    OVER_HTTP,
    SITES,
    Stream,
    Truth,
    Writer,
    allow,
)

from flywheel_pipeline.aggregates.batches import activate_policy
from flywheel_pipeline.build import PIPELINE_JOB, build_defs
from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.delivery.tokens import issue
from flywheel_pipeline.errors import DatabaseUnavailable, FlywheelError
from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.sql_models.loader import load_models

#: A million rows over 160 days and 25 sites are 250 a cell: a late row costs the cell that it falls into, so that a refresh
#: after a round takes a quarter of what it takes over 40 days. The short soak has fewer rows and fewer days.
DAYS, DAYS_OF_A_SHORT_ONE = 160, 40
#: The doctor reads the whole log for these. The truth of the journals stands in for them after each fault, and these are
#: asked after every `examine_every`-th and at the end.
READ_THE_WHOLE_LOG = (1, 2, 8)
PLAIN_SITES = ("soak-03", "soak-17")
#: Errors that a step may end with while a fault lasts; anything else is a fault of the product.
EXCUSED = (
    "OperationalError",
    "InternalError",
    "DatabaseUnavailable",
    "AdminShutdown",
    "SchemaMismatch",
    "InvalidatePoolError",
)
#: Checks that a fault makes fail by right. Any other one that fails, with the severity of an error, found a wrong figure.
EXCUSED_CHECKS = {
    "telemetry_freshness": "rows arrive by the server's clock and the batch has one that jumps by 400 days; none came yet",
}
#: Why `apply` may hold promotions and fail. A gate without an answer was struck by a fault, which its own step tells of.
_OVERTAKEN = re.compile(r"\d+ promotions are held: batch \d+ refreshed the aggregates after this batch did;")
_GATES_UNMET = re.compile(
    r"\d+ promotions are held: the batch did not pass its gates: ((?:\w+ (?:fail|error|missing)(?:, )?)+)"
)


@dataclass
class Report:
    """What a soak found. `illegal` names invariants that did not hold, `differences` rows or counters that were off."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    recovery_seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    rejected: int = 0
    corrections: int = 0
    retries: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    failed_checks: Counter[str] = field(default_factory=Counter)
    unexcused: list[str] = field(default_factory=list)
    promotions: int = 0
    events: int = 0
    illegal: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    daemon_deaths: int = 0
    api_deaths: int = 0
    seconds: float = 0.0
    seconds_by_phase: Counter[str] = field(default_factory=Counter)
    asked: int = 0

    @property
    def complete(self) -> bool:
        """Every fault that was asked for was injected; what was stopped before proves less."""
        return sum(self.faults.values()) >= self.asked

    @property
    def sound(self) -> bool:
        """Nothing lost, nothing counted twice, no illegal state, and no run failed of what no fault explains."""
        return not (self.illegal or self.differences or self.unexcused)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "sound": self.sound,
            "complete": self.complete,
            "seed": self.seed,
            "faults": sum(self.faults.values()),
            "faults_by_kind": dict(sorted(self.faults.items())),
            "recovery_seconds": {
                kind: {"median": round(statistics.median(s), 2), "max": round(max(s), 2)}
                for kind, s in sorted(self.recovery_seconds.items())
            },
            "left_out": self.left_out,
            "rows": self.rows,
            "rejected": self.rejected,
            "corrections": self.corrections,
            "steps_sent_again": self.retries,
            "runs": dict(self.runs),
            "failed_steps": dict(self.failures.most_common()),
            "failed_checks": dict(self.failed_checks.most_common()),
            "promotions": self.promotions,
            "ledger_events": self.events,
            "daemon_deaths": self.daemon_deaths,
            "api_deaths": self.api_deaths,
            "differences": self.differences,
            "illegal_states": self.illegal,
            "unexcused_failures": self.unexcused,
            "seconds": round(self.seconds, 1),
            "seconds_by_phase": {phase: round(seconds, 1) for phase, seconds in self.seconds_by_phase.most_common()},
        }


# -- what a run says, and whether a fault explains it ----------------------------------------------


def outcome(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """What became of a run, as plain JSON values: failed steps [step, error, message], failed checks [name, sentence]."""
    failures = []
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            cause: Any = error.cause or error if error is not None else None
            failures.append([event.step_key, getattr(cause, "cls_name", "unknown"), str(getattr(cause, "message", ""))])
    checks = [said for said in map(_failed_check, result.get_asset_check_evaluations()) if said]
    return {"success": result.success, "failures": failures, "checks": checks}


def failed_checks(connection: sa.Connection) -> list[list[str]]:
    """The failed checks [name, sentence] of all runs in Dagster's storage, which are a daemon's."""
    events = connection.exec_driver_sql(
        "SELECT evaluation_event FROM dagster.asset_check_executions WHERE execution_status = 'FAILED'"
    ).scalars()
    entries = [deserialize_value(event, dg.EventLogEntry) for event in events]
    found = [_failed_check(entry.get_dagster_event().asset_check_evaluation_data) for entry in entries]
    return [said for said in found if said]


def _failed_check(evaluation: dg.AssetCheckEvaluation) -> list[str] | None:
    if evaluation.passed or evaluation.severity is not dg.AssetCheckSeverity.ERROR:
        return None
    return [evaluation.check_name, evaluation.description or ""]


def unexcused(said: dict[str, Any]) -> list[str]:
    """What no fault explains of the outcome of a run. A message of a lost connection excuses no failed check."""
    return [
        f"check {name}: {sentence.strip()[:300]}" for name, sentence in said["checks"] if name not in EXCUSED_CHECKS
    ] + [
        f"{step}: {name}: {message.strip()[:300]}"
        for step, name, message in said["failures"]
        if not _explained(name, message, said["checks"])
    ]


def _explained(name: str, message: str, failed_checks: list[list[str]]) -> bool:
    if name == "DagsterAssetCheckFailedError":
        return bool(failed_checks)  # each is judged by itself
    if name == "Failure":
        unmet = _GATES_UNMET.search(message)
        verdicts = re.findall(r"(\w+) (fail|error|missing)", unmet[1]) if unmet else []
        return bool(_OVERTAKEN.search(message)) or (
            bool(verdicts) and all(verdict != "fail" or gate in EXCUSED_CHECKS for gate, verdict in verdicts)
        )
    return name in EXCUSED or _is_passing(message)


# -- a pipeline in a process of its own ------------------------------------------------------------


def _run_pipelines(job: dg.JobDefinition, record: Path, pause: float) -> None:
    """Run the whole graph again and again, as a daemon's run workers do; note what became of each run."""
    leave_the_group()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        while True:
            try:
                said = outcome(job.execute_in_process(instance=instance, raise_on_error=False, run_config=quiet))
            except (*PASSING, FlywheelError, dg.DagsterError) as error:
                said = {"success": False, "failures": [["run", type(error).__name__, str(error)]], "checks": []}
            with record.open("a") as file:
                file.write(json.dumps(said) + "\n")
            time.sleep(pause)


class Pipeline:
    """One such process, which can be killed and started again."""

    def __init__(self, job: dg.JobDefinition, record: Path, pause: float) -> None:
        """Start it."""
        self.arguments = (job, record, pause)
        self.start()

    def start(self) -> None:
        """Start another one in its place."""
        self.process = FORK.Process(target=_run_pipelines, args=self.arguments, daemon=True)
        self.process.start()

    def kill(self) -> None:
        """Kill -9, in the middle of a step."""
        self.process.kill()  # one that ended already stays as it is
        self.process.join()


# -- the soak --------------------------------------------------------------------------------------


class Soak:
    """One soak over a server of its own. `run()` gives the report; `close()` leaves nothing behind."""

    def __init__(
        self,
        *,
        seed: int,
        faults: int,
        rows: int,
        writers: int,
        daemon: bool,
        examine_every: int,
        home: Path,
        megabytes: int,
        only: tuple[str, ...] = (),
    ) -> None:
        """Start the server on a small disk, the writers, the pipelines and the daemon."""
        self.pick = random.Random(seed)
        self.rounds = faults
        self.examine_every = examine_every
        self.home = home
        self.report = Report(seed)
        self.disk: SmallDisk | None = None
        try:
            self.disk = SmallDisk(home / "disk", megabytes)
        except OSError as error:
            self.report.left_out["disk full"] = str(error)
        self.settings = Settings(home=(home / "disk") if self.disk else home / "plain")
        self.server = EmbeddedServer(
            self.settings.home,
            options={"max_wal_size": "256MB", "shared_buffers": "128MB", "log_min_messages": "panic"},
        )
        url = self.server.ensure_running()
        self.engine = open_engine(url)
        migrate.upgrade(self.engine)
        self.models = load_models()
        self.days = DAYS if rows >= 500_000 else DAYS_OF_A_SHORT_ONE
        self.first_day = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0) - dt.timedelta(
            days=self.days + 1
        )
        rows_a_step = 250 if rows >= 500_000 else 40
        # Of ten steps about 8.4 bring new rows.
        self.steps_a_round = max(round(rows / 0.83 / writers / rows_a_step / faults + 0.5), 1)
        self.stream = Stream(seed, self.steps_a_round * faults, rows_a_step, self.first_day, self.days)
        self.place = home / "soak"
        self.place.mkdir()
        allow(self.place, 0)
        token = self._prepare()
        self.api = AgentApi(home / "api", url)
        self.proxy = Proxy(self.server, home / "proxy")
        self.truth = Truth(self.stream)
        self.writers = [
            Writer(
                number,
                self.stream,
                self.proxy.url(url) if number % 3 == 0 else url,
                self.place,
                (self.api.address, token) if number == OVER_HTTP else None,
            )
            for number in range(writers)
        ]
        definitions = build_defs(
            resources={"database": FlywheelDatabase(url=url.render_as_string(hide_password=False))}
        )
        job = definitions.resolve_job_def(PIPELINE_JOB)
        self.pipelines = [
            Pipeline(job, self.place / f"pipeline-{number}.log", 5.0 if daemon else 0.2)
            for number in range(1 if daemon else 2)
        ]
        for writer in self.writers:
            writer.start()
        self.with_daemon = daemon
        self.allowed = 0
        self.daemons: list[Daemon] = []
        self.kinds: dict[str, Callable[[], None]] = {
            "connections terminated": self._terminate,
            "one backend killed": self._kill_backend,
            "postmaster killed": self._kill_postmaster,
            "database restarted": self._restart,
            "database stopped without checkpoint": self._stop_hard,
            "writer killed": self._kill_writer,
            "agent API killed": self._kill_api,
            "pipeline killed": self._kill_pipeline,
            "connections cut in the network": self.proxy.cut,
            "network frozen": self._freeze,
            "telemetry locked": self._lock,
            "refresh lock held": self._hold_refresh,
            "backend stopped": self._stop_backend,
            "transaction left open": self._leave_open,
            "clock jumps": self._jump,
            "upgrade killed half-way": self._kill_upgrade,
        }
        if self.disk is not None:
            self.kinds["disk full"] = self._fill_disk
        self.of_daemons: dict[str, Callable[[], None]] = {
            "run worker killed": self._kill_run_worker,
            "run interrupted": self._interrupt_run,
            "daemon killed": self._kill_daemon,
            "two daemons": self._two_daemons,
            "everything killed": self._kill_everything,
        }
        if not daemon:
            self.of_daemons = {}
        if only:
            self.kinds = {kind: harm for kind, harm in self.kinds.items() if kind in only}
            self.of_daemons = {kind: harm for kind, harm in self.of_daemons.items() if kind in only}

    def _prepare(self) -> str:
        """Register the fleet; return the token of the appliance that reports over HTTP."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "INSERT INTO appliances (appliance_id, site_id, agent_version, last_checkin) "
                    "VALUES (:site || '-01', :site, '1.0.74', now())"
                ),
                [{"site": site} for site in SITES],
            )
            return issue(connection, HTTP_APPLIANCE, site_id=HTTP_SITE, actor="soak", reason="reports over HTTP").token

    def _set_clock(self, at: dt.datetime) -> None:
        with self.engine.begin() as connection:
            activate_policy(connection, "legacy", actor="soak", reason="the clock of the stream", as_of=at)

    # -- faults ------------------------------------------------------------------------------------

    def _terminate(self) -> None:
        terminate_backends(self.engine)

    def _one_backend(self) -> int | None:
        found = backends(self.engine)
        return self.pick.choice(found) if found else None

    def _kill_backend(self) -> None:
        if (pid := self._one_backend()) is not None:
            kill_server_process(pid)

    def _kill_postmaster(self) -> None:
        kill_postmaster(self.server)
        self.server.ensure_running()

    def _restart(self) -> None:
        self.server.stop("fast")
        self.server.ensure_running()

    def _stop_hard(self) -> None:
        self.server.stop("immediate")
        time.sleep(self.pick.random() * 0.5)
        self.server.ensure_running()

    def _kill_writer(self) -> None:
        for writer in self.pick.sample(self.writers, max(len(self.writers) // 3, 1)):
            writer.kill()
            writer.start()

    def _kill_api(self) -> None:
        self.api.kill()
        self.api.start()

    def _kill_pipeline(self) -> None:
        for pipeline in self.pipelines:
            pipeline.kill()
            pipeline.start()

    def _freeze(self) -> None:
        with self.proxy.frozen():
            time.sleep(0.5)

    def _lock(self) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE execution_telemetry IN ACCESS EXCLUSIVE MODE")
            time.sleep(0.5)

    def _hold_refresh(self) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("SELECT flywheel_lock_refresh()")
            time.sleep(0.5)

    def _stop_backend(self) -> None:
        if (pid := self._one_backend()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.5)
                os.kill(pid, signal.SIGCONT)

    def _leave_open(self) -> None:
        connection = self.engine.connect()
        connection.exec_driver_sql("INSERT INTO touched_cells (site_id, day) VALUES ('soak-00', '2026-01-01')")
        time.sleep(0.3)
        refresh_once(self.engine, self.models)
        connection.rollback()
        connection.close()

    def _jump(self) -> None:
        now = self.first_day + dt.timedelta(days=self.pick.choice([-900, -3, 30, 400]))
        self._set_clock(now)
        time.sleep(0.5)

    def _kill_upgrade(self) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE schema_objects SET content_hash = 'older' WHERE kind <> 'seed'")
        child = FORK.Process(target=_upgrade, args=(self.engine.url,), daemon=True)
        child.start()
        time.sleep(self.pick.random())
        child.kill()
        child.join()
        self._upgrade()

    def _upgrade(self) -> None:
        # Deadlocks with running refreshes break one of the two off; the operator starts the upgrade again.
        for _ in range(20):
            try:
                migrate.upgrade(self.engine)
            except (*PASSING, DatabaseUnavailable):
                time.sleep(0.1)
            else:
                return
        migrate.upgrade(self.engine)

    def _fill_disk(self) -> None:
        assert self.disk is not None
        with self.disk.full():
            time.sleep(0.6)

    def _kill_run_worker(self) -> None:
        for pid in run_workers(self.settings.home):
            kill_server_process(pid)

    def _interrupt_run(self) -> None:
        for pid in run_workers(self.settings.home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)

    def _daemon(self) -> None:
        self.daemons.append(Daemon(self.settings, self.engine.url, f"daemon-{self.pick.randrange(10**6)}"))

    def _kill_daemon(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
        self.daemons.clear()
        self._daemon()

    def _two_daemons(self) -> None:
        if len(self.daemons) < 2:
            self._daemon()

    def _kill_everything(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
        self.daemons.clear()
        for pid in run_workers(self.settings.home):
            kill_server_process(pid)
        for process in (*self.writers, *self.pipelines, self.api):
            process.kill()
        kill_postmaster(self.server)
        self._patiently(self.server.ensure_running)  # a postmaster that is just dying may still be taken for alive
        for process in (*self.writers, *self.pipelines, self.api):
            process.start()
        self._daemon()

    # -- rounds ------------------------------------------------------------------------------------

    def run(self, progress: Callable[[str], None], *, minutes: float | None = None) -> Report:
        """Play all rounds, or those that fit into `minutes`; stop early only where a writer met what no fault explains.

        Whoever stops it (Ctrl-C, SIGTERM) or lets its time run out still gets the whole comparison of what was played.
        """
        begun = time.monotonic()
        self.report.asked = self.rounds
        deck: list[str] = []
        try:
            for number in range(1, self.rounds + 1):
                if minutes is not None and time.monotonic() - begun > minutes * 60:
                    progress(f"stopped after {number - 1} faults: {minutes:g} minutes are over")
                    break
                if not deck:
                    deck = self._shuffled()
                self._round(number, deck.pop(), progress, begun)
        except KeyboardInterrupt:
            progress(f"stopped by hand after {sum(self.report.faults.values())} faults: comparing what was played")
            # What was under way is healed and sent to its end, or a step that nobody noted would look like one too many.
            self._patiently(lambda: refresh_once(self.engine, self.models))
            self._finish(self.allowed)
        with self._phase("conclusion"):
            self._conclude()
        self.report.seconds = time.monotonic() - begun
        return self.report

    def _round(self, number: int, kind: str, progress: Callable[[str], None], begun: float) -> None:
        with self._phase("daemons come and go"):
            self._staff(kind)
        day = number * self.days // self.rounds
        with self._phase("fault"):
            self._patiently(lambda: self._set_clock(self.first_day + dt.timedelta(days=day + 1)))
            self.allowed = number
            allow(self.place, number * self.steps_a_round)
            time.sleep(self.pick.random() * 0.3)
            self._patiently({**self.kinds, **self.of_daemons}[kind])
        healed = time.monotonic()
        self._revive()
        with self._phase("acts"):
            self._acts(number)
        with self._phase("writers"):
            self._finish(number)
        with self._phase("refresh"):
            report = self._patiently(lambda: refresh_once(self.engine, self.models))
        with self._phase("judgement"):
            self._judge(number, kind)
        seconds = time.monotonic() - healed
        self.report.faults[kind] += 1
        self.report.recovery_seconds[kind].append(seconds)
        passed = time.monotonic() - begun
        progress(
            f"{number:>4}/{self.rounds}  {kind:<36} sound after {seconds:5.1f} s   {len(self.truth.rows):>9,} rows, "
            f"{report.cells} cells refreshed, {sum(w.retries for w in self.writers)} steps sent again, "
            f"{passed:.0f} s, {passed / number * (self.rounds - number):.0f} s to go"
            + ("" if self.report.sound else f"   BROKEN: {(self.report.illegal + self.report.differences)[-1:]}")
        )

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.report.seconds_by_phase[name] += time.monotonic() - begun

    def _shuffled(self) -> list[str]:
        """The next faults, the last one first: all of the database's twice, then all of the daemon's in a row."""
        rest = [*self.kinds, *self.kinds] if self.of_daemons else list(self.kinds)
        return [
            *self.pick.sample(sorted(self.of_daemons), len(self.of_daemons)),
            *self.pick.sample(sorted(rest), len(rest)),
        ]

    def _staff(self, kind: str) -> None:
        """Have a daemon at work for the faults of daemons, and kill it behind them: it would take half the machine."""
        if kind in self.of_daemons and not self.daemons:
            self._daemon()
        if kind not in self.of_daemons and self.daemons:
            for daemon in self.daemons:
                daemon.kill()
            self.daemons.clear()
            for pid in run_workers(self.settings.home):
                kill_server_process(pid)

    def _patiently(self, what: Callable[[], Any]) -> Any:
        """Do it, again and again while the database is not there; start the server where it ended."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return what()
            except (*PASSING, DatabaseUnavailable):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
                with contextlib.suppress(DatabaseUnavailable):
                    self.server.ensure_running()

    def _revive(self) -> None:
        """What a supervisor does: start a daemon, or an agent API, that ended by itself."""
        ended = [daemon for daemon in self.daemons if not daemon.alive()]
        self.report.daemon_deaths += len(ended)
        for daemon in ended:
            daemon.kill()
            self.daemons.remove(daemon)
            self._daemon()
        if not self.api.alive():
            self.report.api_deaths += 1
            self.api.kill()
            self.api.start()

    def _acts(self, number: int) -> None:
        """People act in between: they take a promoted rule out, freeze and thaw."""
        if number % 7 == 3:
            self._patiently(lambda: act(self.engine, "freeze", [], actor="soak", reason="a look at it"))
        if number % 7 == 4:
            self._patiently(lambda: act(self.engine, "thaw", [], actor="soak", reason="looked at"))
        if number == self.rounds * 3 // 4:
            rule = self._patiently(self._promoted_rule)
            if rule is not None:
                self._patiently(
                    lambda: act(self.engine, "quarantine", [rule], actor="soak", reason="somebody complained")
                )

    def _promoted_rule(self) -> str | None:
        with self.engine.connect() as connection:
            rule: str | None = connection.exec_driver_sql(
                "SELECT rule_id FROM l1_rules WHERE source = 'promoted' AND enabled ORDER BY rule_id LIMIT 1"
            ).scalar()
            return rule

    def _finish(self, number: int) -> None:
        wanted = number * self.steps_a_round

        def through() -> bool:
            self._revive()
            for writer in self.writers:
                if (wrong := writer.wrong()) is not None:
                    raise AssertionError(f"writer {writer.number} met what no fault explains:\n{wrong}")
            return all(writer.acknowledged >= wanted for writer in self.writers)

        try:
            until(through, 120, "the writers' last acknowledgement")
        except TimeoutError as error:
            behind = {w.number: f"{w.acknowledged} of {wanted}, {w.retries} sent again" for w in self.writers}
            log = (self.api.home / "serve.log").read_text("utf-8", "replace")[-2_000:]
            raise TimeoutError(f"{error}: {behind}; the agent API {self.api.alive()=}, its log ends\n{log}") from error
        for writer in self.writers:
            self.truth.take(writer)

    def _judge(self, number: int, kind: str) -> None:
        found = self._patiently(lambda: self.truth.differences(self.engine))
        self.report.differences += [f"after fault {number} ({kind}): {line}" for line in found[:5]]
        whole = number % self.examine_every == 0
        invariants = tuple(i for i in range(1, 13) if whole or i not in READ_THE_WHOLE_LOG)
        broken = self._patiently(lambda: broken_invariants(self.engine, invariants=invariants))
        self.report.illegal += [f"after fault {number} ({kind}): {i}: {sentence}" for i, sentence in broken.items()]

    def _conclude(self) -> None:
        """Stop everybody, and compare every row, every cell and the plain recount once more."""
        self.stop_processes()
        self._patiently(lambda: refresh_once(self.engine, self.models))
        broken = broken_invariants(self.engine, deep=True)
        self.report.illegal += [f"at the end: {i}: {sentence}" for i, sentence in broken.items()]
        self.report.differences += self.truth.differences(self.engine)
        with self.engine.connect() as connection:
            if connection.exec_driver_sql(FINGERPRINT).scalar_one() != self.truth.fingerprint():
                self.report.differences.append("an execution has another outcome than was acknowledged")
            self.report.differences += _plain_differences(connection)
            self.report.rows = connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one()
            self.report.rejected = connection.exec_driver_sql("SELECT count(*) FROM telemetry_rejects").scalar_one()
            self.report.corrections = connection.exec_driver_sql(
                "SELECT count(*) FROM execution_corrections"
            ).scalar_one()
            self.report.promotions = connection.exec_driver_sql(
                "SELECT count(*) FROM rule_events WHERE kind IN ('promoted', 'advanced')"
            ).scalar_one()
            self.report.events = connection.exec_driver_sql("SELECT count(*) FROM rule_events").scalar_one()
            if self.with_daemon and connection.exec_driver_sql("SELECT to_regclass('dagster.runs')").scalar_one():
                for status, runs in connection.exec_driver_sql(
                    "SELECT lower(status), count(*) FROM dagster.runs GROUP BY 1"
                ):
                    self.report.runs[f"daemon's {status}"] = runs
                self._count({"failures": [], "checks": failed_checks(connection)})
        self.report.retries = sum(writer.retries for writer in self.writers)
        for record in self.place.glob("pipeline-*.log"):
            for line in record.read_text().splitlines():
                said = json.loads(line)
                self.report.runs["successful" if said["success"] else "failed"] += 1
                self._count(said)

    def _count(self, said: dict[str, Any]) -> None:
        self.report.failures.update(f"{step}: {name}" for step, name, _ in said["failures"])
        self.report.failed_checks.update(name for name, _ in said["checks"])
        self.report.unexcused += unexcused(said)

    def stop_processes(self) -> None:
        """Kill -9 of writers, pipelines and daemons."""
        for daemon in self.daemons:
            daemon.kill()
        self.daemons.clear()
        self.api.kill()
        for pid in run_workers(self.settings.home):
            kill_server_process(pid)
        for process in (*self.writers, *self.pipelines):
            if process.process is not None and process.process.is_alive():
                process.kill()

    def close(self) -> None:
        """End all processes and remove the server and its disk."""
        self.stop_processes()
        self.proxy.stop()
        self.engine.dispose()
        self.server.remove()
        if self.disk is not None:
            self.disk.unmount()


def _is_passing(message: str) -> bool:
    return any(
        words in message
        for words in (
            "server closed the connection",
            "terminating connection",
            "the database system is",
            "consuming input failed",
            "No space left",
            "connection to server",
            "deadlock detected",
            "could not extend",
        )
    )


def _upgrade(url: sa.URL) -> None:
    with contextlib.suppress(*PASSING, DatabaseUnavailable):
        migrate.upgrade(open_engine(url))
    os._exit(0)


def _plain_differences(connection: sa.Connection) -> list[str]:
    """The plain recount of two sites, in Python over raw rows, against every table of theirs."""
    found = []
    for name, wanted in plain_recount.expected(connection, sites=PLAIN_SITES).items():
        if "site_id" not in plain_recount.KEYS[name]:
            continue
        stored = plain_recount.stored(connection, name, plain_recount.VALUES[name])
        kept = {key: value for key, value in stored.items() if key[0] in PLAIN_SITES}
        if kept != wanted:
            keys = [key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key)]
            found.append(f"{name} differs from the plain recount in {len(keys)} rows, first {keys[0]}")
    return found


def soak(arguments: argparse.Namespace, progress: Callable[[str], None]) -> Report:
    """Play a soak in a home of its own, which is gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="fw-soak-"))
    home.chmod(0o755)
    one = None
    try:
        one = Soak(
            seed=arguments.seed,
            faults=arguments.faults,
            rows=arguments.rows,
            writers=arguments.writers,
            daemon=not arguments.quick,
            examine_every=1 if arguments.quick else 50,
            home=home,
            megabytes=600 if arguments.quick else 3000,
            only=tuple(arguments.only),
        )
        return one.run(progress, minutes=arguments.minutes)
    finally:
        if one is not None:
            one.close()
        shutil.rmtree(home, ignore_errors=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; --quick changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="17 faults, 12,000 rows, no daemon")
    parser.add_argument("--seed", type=int, default=20260215)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument(
        "--minutes", type=float, help="begin no fault after so long; fewer faults than asked for exit 1"
    )
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="only this kind of fault")
    parser.add_argument("--json", action="store_true", help="the report as JSON, progress on standard error")
    read = parser.parse_args(arguments)
    read.faults = read.faults or (17 if read.quick else 210)
    read.rows = read.rows or (12_000 if read.quick else 1_000_000)
    return read


def table(report: Report) -> str:
    """The report for people."""
    lines = [f"{'fault':<38}{'times':>6}  {'sound again after, s: median':>28}  {'max':>6}"]
    for kind, count in sorted(report.faults.items()):
        seconds = report.recovery_seconds[kind]
        lines.append(f"{kind:<38}{count:>6}  {statistics.median(seconds):>28.1f}  {max(seconds):>6.1f}")
    lines += [f"{kind:<38} left out: {why}" for kind, why in report.left_out.items()]
    runs = ", ".join(f"{count} {name}" for name, count in sorted(report.runs.items()))
    lines += [
        "",
        f"{sum(report.faults.values())} faults in {report.seconds:.0f} s, seed {report.seed}"
        + ("" if report.complete else f": STOPPED BEFORE THE {report.asked} THAT WERE ASKED FOR"),
        "seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in report.seconds_by_phase.most_common()),
        f"{report.rows:,} rows in the log, {report.corrections:,} corrections, {report.rejected} rejects, "
        f"{report.retries} steps sent again",
        f"runs: {runs}; {report.promotions} promotions, {report.events} events; the daemon ended by itself "
        f"{report.daemon_deaths} times, the agent API {report.api_deaths}",
        "failed steps: " + ", ".join(f"{name} {count}" for name, count in report.failures.most_common()),
        "failed checks: " + ", ".join(f"{name} {count}" for name, count in report.failed_checks.most_common()),
        f"rows lost, doubled or counted otherwise: {len(report.differences)}",
        f"illegal states: {len(report.illegal)}",
        f"failures of runs that no fault explains: {len(report.unexcused)}",
    ]
    return "\n".join([*lines, *report.differences[:20], *report.illegal[:20], *report.unexcused[:20]])


def main() -> int:
    """Play the soak, print the table; 1 if it was not sound, or not played to its end."""
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = soak(arguments, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else table(report))
    return 0 if report.sound and report.complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
