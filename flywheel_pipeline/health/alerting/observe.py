"""What is the case: checks, runs and daemons as Dagster knows them, quarantines and stuck patterns as the ledger does.

Belongs here: reading, and saying it as observations. Does not belong here: what follows from it (`record`). Results
are read in order since the last one folded in, so that a failure and its recovery between two looks are both told.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from flywheel_pipeline.health.alerting.record import Observation, Outcome

if TYPE_CHECKING:
    import dagster as dg
    from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
    from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord

HISTORY: Final = 50  # results of one check, or runs of one job, read back at most in one look
SHOWN_OFFENDERS: Final = 3
DAEMON_KEY: Final = "daemon:dagster"
# Without these two nothing starts by itself; both beat every 30 s.
WATCHED_DAEMONS: Final = ("SENSOR", "SCHEDULER")
GATE_ERROR: Final = "DagsterAssetCheckFailedError"
# The refusal of a human act is told to the person who asked for it.
UNWATCHED_JOBS: Final = ("__", "human_")
#: A quarantine older than this when it is first seen is history, not news: a database that was taken over.
NEWS: Final = dt.timedelta(days=1)


def _time(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def known(connection: sa.Connection, kind: str) -> dict[str, dt.datetime]:
    """Return {key: time of the newest observation folded in} of one kind."""
    rows = connection.execute(
        sa.text("SELECT alert_key, observed_at FROM alerts WHERE kind = :kind"), {"kind": kind}
    ).all()
    return {row.alert_key: row.observed_at for row in rows}


# -- checks --------------------------------------------------------------------------------------------------------


def check_key(asset: str, name: str) -> str:
    """Return the key of a check's alert."""
    return f"check:{asset}.{name}"


def observe_checks(
    connection: sa.Connection, instance: dg.DagsterInstance, graph: BaseAssetGraph[Any]
) -> list[Observation]:
    """Return the results of every check of the graph since the last look; at the first look its latest one.

    A check whose step failed is an error. One that a failed gate or a crash upstream kept from running says nothing:
    the gate or the run alerts. An open alert of a check that the graph no longer has recovers, and says why.
    """
    keys = sorted(graph.asset_check_keys, key=str)
    positions = known(connection, "check")
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    runs = _Runs(instance)
    found: list[Observation] = []
    for key in keys:
        last = latest.get(key)
        if last is None:
            continue
        name = check_key(key.asset_key.to_user_string(), key.name)
        since = positions.get(name)
        if since is not None and last.event is not None and not _planned(last) and _time(last.event.timestamp) <= since:
            continue
        records: Sequence[AssetCheckExecutionRecord] = instance.event_log_storage.get_asset_check_execution_history(
            key, limit=HISTORY
        )
        statement = graph.get(key).description or ""
        seen = [o for r in records if (o := _of_check(r, name, statement, runs)) is not None]
        if since is None:
            seen = sorted(seen, key=lambda o: o.at)[-1:]
        found += [o for o in seen if since is None or o.at > since]
    now = dt.datetime.now(dt.UTC)
    gone = set(positions) - {check_key(k.asset_key.to_user_string(), k.name) for k in keys}
    found += [
        Observation(
            key, "check", "pass", "info", now, _check_title(key), "The graph no longer has this check.", level=True
        )
        for key in sorted(gone)
    ]
    return found


def _planned(record: AssetCheckExecutionRecord) -> bool:
    return record.status.value == "PLANNED"


def _check_title(key: str) -> str:
    asset, _, name = key.removeprefix("check:").rpartition(".")
    return f"{name} on {asset}"


def _of_check(record: AssetCheckExecutionRecord, key: str, statement: str, runs: _Runs) -> Observation | None:
    asset, _, name = key.removeprefix("check:").rpartition(".")
    details: dict[str, Any] = {"statement": statement, "asset": asset, "check": name, "run_id": record.run_id}
    title = _check_title(key)
    event = None if record.event is None else record.event.dagster_event
    if _planned(record):
        run = runs.get(record.run_id)
        step = None if event is None else event.step_key
        if run is None or run.end_time is None or step is None or step not in runs.failed_steps(record.run_id):
            return None
        message = runs.failed_steps(record.run_id)[step][1]
        return Observation(
            key,
            "check",
            "error",
            "critical",
            _time(run.end_time),
            title,
            f"It could not be evaluated: {message}",
            details={
                **details,
                "advice": "whatever it guards is not known to hold: repair the step and run the graph again",
            },
        )
    evaluation = record.evaluation
    if evaluation is None or record.event is None:
        return None
    outcome: Outcome = "pass" if evaluation.passed else "fail"
    values = {label: entry.value for label, entry in evaluation.metadata.items()}
    offenders, subject = _sample(values.get("sample"))
    details |= {k: values[k] for k in ("observed", "required") if isinstance(values.get(k), str)}
    if isinstance(values.get("offenders"), int) and not evaluation.passed:
        details |= {"offender_count": values["offenders"], "offenders": offenders}
        if subject:
            details["explain"] = subject
    return Observation(
        key,
        "check",
        outcome,
        "warning" if evaluation.severity.value == "WARN" else "critical",
        _time(record.event.timestamp),
        title,
        evaluation.description or ("It holds." if evaluation.passed else "It does not hold."),
        details=details,
    )


def _sample(table: object) -> tuple[list[str], str | None]:
    """Return the first cells of a Markdown sample, at most three, and the first of them where it names a rule or pattern."""
    lines = table.splitlines() if isinstance(table, str) else []
    if len(lines) < 3:
        return [], None
    heading = _first_cell(lines[0])
    cells = [_first_cell(line) for line in lines[2 : 2 + SHOWN_OFFENDERS]]
    return cells, cells[0] if heading in {"rule", "rule_id", "pattern", "pattern_key"} else None


def _first_cell(line: str) -> str:
    text = line.removeprefix("|").replace("\\|", "\x00").split("|", 1)[0]
    return text.replace("\x00", "|").replace("&lt;", "<").strip()


# -- runs ----------------------------------------------------------------------------------------------------------


class _Runs:
    """Run records and failed steps, each read once a look."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._records: dict[str, Any] = {}
        self._steps: dict[str, dict[str, tuple[bool, str]]] = {}

    def get(self, run_id: str) -> Any:
        if run_id not in self._records:
            self._records[run_id] = self._instance.get_run_record_by_id(run_id)
        return self._records[run_id]

    def failed_steps(self, run_id: str) -> dict[str, tuple[bool, str]]:
        """Return {step: (whether a gate stopped it, the first line of its error, masked)}."""
        from dagster import DagsterEventType

        from flywheel_pipeline.health.attribution import mask

        if run_id not in self._steps:
            steps = {}
            for entry in self._instance.all_logs(run_id, of_type=DagsterEventType.STEP_FAILURE):
                event = entry.dagster_event
                if event is None or event.step_key is None:
                    continue
                data = event.step_failure_data
                error = None if data.error is None else data.error.cause or data.error
                told = data.user_failure_data.description if data.user_failure_data is not None else None
                message = told or ("no reason given" if error is None else error.message)
                steps[event.step_key] = (error is not None and error.cls_name == GATE_ERROR, mask(message))
            self._steps[run_id] = steps
        return self._steps[run_id]


def observe_runs(connection: sa.Connection, instance: dg.DagsterInstance, jobs: Iterable[str]) -> list[Observation]:
    """Return how the runs of these jobs ended since the last look; at the first look the latest of each job.

    A run that only a failed gate stopped did what it must: the gate's check alerts, the run does not.
    """
    import dagster as dg

    positions = known(connection, "run")
    runs = _Runs(instance)
    ended = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    found: list[Observation] = []
    for job in sorted(name for name in jobs if not name.startswith(UNWATCHED_JOBS)):
        since = positions.get(f"run:{job}")
        # update_timestamp is never before the end of the run.
        records = instance.get_run_records(
            dg.RunsFilter(job_name=job, statuses=ended, updated_after=since), limit=HISTORY if since else 1
        )
        found += [_of_run(record, job, runs) for record in records if record.end_time is not None]
    return found


def _of_run(record: dg.RunRecord, job: str, runs: _Runs) -> Observation:
    import dagster as dg

    run = record.dagster_run
    details: dict[str, Any] = {"job": job, "run_id": run.run_id}
    outcome: Outcome = "pass"
    sentence = "The last run succeeded."
    if run.status == dg.DagsterRunStatus.FAILURE:
        steps = runs.failed_steps(run.run_id)
        broken = {step: message for step, (gate, message) in steps.items() if not gate}
        if broken or not steps:
            outcome = "fail"
            step, message = next(iter(broken.items()), ("", "its process ended, or it took too long"))
            sentence = f"The run failed{f' at {step}' if step else ''}: {message}"
            details |= {
                "offenders": sorted(broken)[:SHOWN_OFFENDERS],
                "offender_count": len(broken),
                "advice": "read the run's log; nothing was promoted past the failure, and the next run takes up what waits",
            }
        else:
            sentence = "The last run was stopped by a gate, which alerts by itself."
    return Observation(
        f"run:{job}", "run", outcome, "critical", _time(record.end_time or 0.0), f"job {job}", sentence, details=details
    )


# -- daemon --------------------------------------------------------------------------------------------------------


def observe_daemon(
    instance: dg.DagsterInstance, stale_after_seconds: float, *, now: float | None = None
) -> Observation:
    """Say whether the daemon beats; whoever is asked must not be the daemon alone."""
    now = time.time() if now is None else now
    beats = instance.get_daemon_heartbeats()
    ages = {name: now - beats[name].timestamp for name in WATCHED_DAEMONS if name in beats}
    if len(ages) < len(WATCHED_DAEMONS):
        missing = ", ".join(name for name in WATCHED_DAEMONS if name not in ages)
        return daemon_down(f"The Dagster daemon never reported ({missing}).", now)
    oldest = max(ages.values())
    if oldest > stale_after_seconds:
        return daemon_down(f"The Dagster daemon last reported {oldest / 60:.0f} min ago; it reports every 30 s.", now)
    return Observation(
        DAEMON_KEY, "daemon", "pass", "critical", _time(now), "Dagster daemon", "The daemon reports again.", level=True
    )


def daemon_down(sentence: str, now: float) -> Observation:
    """Say that the daemon does not run: no sensor ticks, no schedule fires."""
    advice = "nothing is refreshed, promoted or quarantined meanwhile; telemetry waits in the outbox: `flywheel up`"
    return Observation(
        DAEMON_KEY,
        "daemon",
        "fail",
        "critical",
        _time(now),
        "Dagster daemon",
        sentence,
        level=True,
        details={"statement": "The Dagster daemon runs.", "advice": advice},
    )


# -- ledger and patterns -------------------------------------------------------------------------------------------


def observe_quarantines(connection: sa.Connection, now: dt.datetime) -> Iterator[Observation]:
    """Yield the quarantines and re-admissions in the ledger that were not told yet.

    A rule that entered the ledger in quarantine was taken over so; that is no news.
    """
    rows = connection.execute(
        sa.text(
            """
            SELECT e.rule_id, e.kind, e.to_state, e.actor, e.reason, e.run_id, e.occurred_at
            FROM rule_events AS e
            LEFT JOIN alerts AS a ON a.alert_key = 'quarantine:' || e.rule_id
            WHERE (e.kind = 'quarantined' AND e.occurred_at > coalesce(a.observed_at, :news))
               OR (e.from_state = 'quarantined' AND e.occurred_at > a.observed_at)
            ORDER BY e.event_id
            """
        ),
        {"news": now - NEWS},
    ).all()
    for row in rows:
        out = row.kind == "quarantined"
        yield Observation(
            f"quarantine:{row.rule_id}",
            "quarantine",
            "fail" if out else "pass",
            "warning",
            row.occurred_at,
            f"rule {row.rule_id}",
            f"{'Quarantined' if out else row.kind.capitalize()} by {row.actor}: {row.reason}",
            details={
                "asset": "rule_events",
                "explain": row.rule_id,
                **({"run_id": row.run_id} if row.run_id else {}),
                **({"advice": "correct it and `flywheel readmit`, or `flywheel retire`"} if out else {}),
            },
        )


def observe_candidates(connection: sa.Connection, stuck_after_days: float, now: dt.datetime) -> Iterator[Observation]:
    """Yield the patterns that wait undecided or held for longer than `stuck_after_days`, and those that no longer do.

    Counted from when Flywheel first knew the pattern, and only while it is seen: one that was not observed for as long
    is no candidate any more.
    """
    before = now - dt.timedelta(days=stuck_after_days)
    rows = connection.execute(
        sa.text(
            """
            SELECT p.pattern_key, p.status, p.created_at,
                   p.status IN ('pending', 'approved') AND p.created_at < :before AND p.last_seen >= :before AS stuck,
                   d.reason
            FROM patterns AS p
            LEFT JOIN alerts AS a ON a.alert_key = 'candidate:' || p.pattern_key
            LEFT JOIN LATERAL (
              SELECT reason FROM promotion_decisions
              WHERE subject_kind = 'pattern' AND subject_id = p.pattern_key ORDER BY decision_id DESC LIMIT 1
            ) AS d ON true
            WHERE p.pattern_key IS NOT NULL
              AND ((p.status IN ('pending', 'approved') AND p.created_at < :before AND p.last_seen >= :before)
                   OR a.state = 'open')
            ORDER BY p.pattern_key
            """
        ),
        {"before": before},
    ).all()
    for row in rows:
        days = (now - row.created_at).total_seconds() / 86400
        yield Observation(
            f"candidate:{row.pattern_key}",
            "candidate",
            "fail" if row.stuck else "pass",
            "warning",
            now,
            f"pattern {row.pattern_key}",
            f"{row.status.capitalize()} for {days:.0f} days: {row.reason or 'no decision was made'}"
            if row.stuck
            else f"It waits no longer: {row.status}.",
            level=True,
            details={
                "asset": "promotion_decisions",
                "explain": row.pattern_key,
                **(
                    {"advice": "`flywheel approve` or `flywheel reject` it, or bring what its gate asks for"}
                    if row.stuck
                    else {}
                ),
            },
        )


def graph_jobs(repository: Any) -> list[str]:
    """Return the names of the jobs of a code location."""
    return [job.name for job in repository.get_all_jobs()]


def details_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the details of an event's row as a plain dict."""
    return dict(row["details"])
