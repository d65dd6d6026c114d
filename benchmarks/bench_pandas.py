"""Full recompute of 1 M rows: pandas read_sql + groupby against the same question in PostgreSQL.

Two questions, each answered in a process of its own, with equal results:
counters  per rule and day: executions, successes; the rule resolved (legacy form included), synthetic rows left out.
          Ours asks as the nightly recount does (aggregates/recount.py), without its sites.
classes   the same and per outcome class, every execution classified by the class rules in the database. Ours reads
          the shipped view `executions`.
pandas reads only the columns it needs. Memory is what the process grew by at its peak, for ours with the private
memory of its backends added. Bars, on the counters: >= 10x faster, >= 10x less memory; the classes are shown beside.

    python benchmarks/bench_pandas.py [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fleet import Line, database, load, server

from flywheel_pipeline.database.engine import open_engine

OURS = {
    "counters": """
SELECT coalesce(ra.rule_id, n.named)::text AS rule_id, (t.event_at AT TIME ZONE 'UTC')::date::text AS day, '' AS outcome_class,
       count(*) AS executions, count(*) FILTER (WHERE t.success) AS successes
FROM execution_telemetry AS t
CROSS JOIN LATERAL (SELECT CASE WHEN t.rule_id <> '' THEN t.rule_id ELSE t.runbook_id END AS named) AS n
LEFT JOIN rule_aliases AS ra ON ra.alias = n.named AND t.event_at >= ra.valid_from AND t.event_at < ra.valid_to
WHERE flywheel_level(t.resolution_level, t.rule_id, t.runbook_id) = 'L1'
  AND t.chaos_campaign_id IS NULL AND NOT coalesce(t.tags @> '{"synthetic": true}', false)
  AND t.event_at - t.created_at BETWEEN interval '-730 days' AND interval '10 minutes'
GROUP BY 1, (t.event_at AT TIME ZONE 'UTC')::date
""",
    "classes": """
SELECT rule_id, day::text AS day, outcome_class, count(*) AS executions, count(*) FILTER (WHERE success) AS successes
FROM executions WHERE level = 'L1' GROUP BY rule_id, day, outcome_class
""",
}
COUNTED = "rule_id, runbook_id, resolution_level, event_at, created_at, success, chaos_campaign_id, tags"
READ = {
    "counters": f"SELECT {COUNTED} FROM execution_telemetry",
    "classes": f"SELECT {COUNTED}, verification_passed, error_message, failure_type, status FROM execution_telemetry",
}
RANKS = ["synthetic", "agent_unsupported", "not_applicable", "unreachable", "escalated", "suppressed"]


def in_pandas(engine: sa.Engine, question: str) -> list[tuple[Any, ...]]:
    """The question answered by a data engineer who reads the table first."""
    import pandas as pd

    with engine.connect() as connection:
        frame = pd.read_sql(sa.text(READ[question]), connection)
        rules = connection.execute(
            sa.text("SELECT outcome_class, field, pattern FROM outcome_class_rules WHERE enabled")
        ).all()
    lead = frame["created_at"] - frame["event_at"]
    frame = frame[(lead >= pd.Timedelta(minutes=-10)) & (lead <= pd.Timedelta(days=730))]
    said = frame["resolution_level"].fillna("").str.strip().str.upper()
    legacy = frame["runbook_id"].str.startswith(("L1-", "RB-AUTO-")) | (frame["rule_id"].fillna("") != "")
    frame = frame[(said == "L1") | (~said.isin(["L1", "L2", "L3"]) & legacy)]
    synthetic = frame["chaos_campaign_id"].notna() | frame["tags"].map(
        lambda tags: isinstance(tags, dict) and tags.get("synthetic") is True
    )
    if question == "counters":
        frame, classes = frame[~synthetic], ""
    else:
        classes = classified(frame, synthetic, rules)
    named = frame["rule_id"].where(frame["rule_id"].fillna("") != "", frame["runbook_id"])
    day = frame["event_at"].dt.tz_convert("UTC").dt.strftime("%Y-%m-%d")
    grouped = frame.assign(named=named, day=day, outcome_class=classes).groupby(["named", "day", "outcome_class"])
    counted = grouped["success"].agg(["count", "sum"]).reset_index()
    return [tuple(row) for row in counted.itertuples(index=False)]


def classified(frame: Any, synthetic: Any, rules: Any) -> Any:
    """The outcome class of each row."""
    import re

    import numpy as np
    import pandas as pd

    rank = pd.Series(len(RANKS), index=frame.index)
    for outcome_class, field, pattern in rules:
        parts = [".*" if c == "%" else "." if c == "_" else re.escape(c) for c in pattern]
        expression = re.compile("".join(parts), re.IGNORECASE | re.DOTALL)
        known = {text for text in frame[field].dropna().unique() if expression.fullmatch(text)}
        rank = rank.where(~frame[field].isin(known), np.minimum(rank, RANKS.index(outcome_class)))
    verified = frame["verification_passed"].astype("boolean")
    failed = ~frame["success"] | (verified == False).fillna(False)  # noqa: E712 (three-valued)
    return np.select(
        [synthetic, rank < len(RANKS), failed, verified.isna()],
        ["synthetic", np.array([*RANKS, ""])[rank.to_numpy()], "failure", "unverified"],
        "success",
    )


def in_postgresql(engine: sa.Engine, question: str, peak: list[int]) -> list[tuple[Any, ...]]:
    """The same, asked of PostgreSQL; `peak` gets the private memory of its backends (kB), sampled."""
    with engine.connect() as connection:
        leader = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        done = threading.Event()

        def sample() -> None:
            postmaster = _field(leader, "PPid")
            before = _field(leader, "RssAnon")
            while not done.wait(0.005):
                workers = [pid for pid in _children(postmaster) if "parallel worker" in _command(pid)]
                now = _field(leader, "RssAnon") - before + sum(_field(pid, "RssAnon") for pid in workers)
                peak[0] = max(peak[0], now)

        watching = threading.Thread(target=sample)
        watching.start()
        try:
            return [tuple(row) for row in connection.execute(sa.text(OURS[question]))]
        finally:
            done.set()
            watching.join()


def _field(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # a parallel worker that has ended meanwhile
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def answer(way: str, question: str, url: str) -> None:
    """Answer in this process and print time, memory and a digest of the result as JSON."""
    engine = open_engine(url)
    if way == "pandas":
        import pandas  # noqa: F401 (not part of the time)
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    peak = [0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    rows = in_pandas(engine, question) if way == "pandas" else in_postgresql(engine, question, peak)
    seconds = time.perf_counter() - begun
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    plain = sorted([str(part) for part in row] for row in rows)
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    print(json.dumps({"seconds": seconds, "kb": grown + peak[0], "rows": len(rows), "digest": digest}))


def measure(quick: bool) -> list[Line]:
    """Ask both in turn and return two lines of the table."""
    rows = 300_000 if quick else 1_000_000
    seconds: dict[tuple[str, str], float] = {}
    megabytes: dict[tuple[str, str], float] = {}
    with server() as embedded:
        engine = database(embedded, "log")
        load(engine, rows)
        url = engine.url.render_as_string(hide_password=False)
        engine.dispose()
        for question in OURS:
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "pandas": []}
            for _ in range(3):
                for way, answers in found.items():
                    command = [sys.executable, __file__, "--answer", way, question, url]
                    answers.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            assert len({answer["digest"] for answers in found.values() for answer in answers}) == 1
            for way, answers in found.items():
                seconds[way, question] = statistics.median(a["seconds"] for a in answers)
                megabytes[way, question] = max(statistics.median(a["kb"] for a in answers) / 1024, 1)
    print(
        f"  with outcome classes: pandas / ours {seconds['pandas', 'classes'] / seconds['ours', 'classes']:.1f}x the time "
        f"({seconds['pandas', 'classes']:.2f} s / {seconds['ours', 'classes']:.2f} s), "
        f"{megabytes['pandas', 'classes'] / megabytes['ours', 'classes']:.0f}x the memory"
    )
    return [
        Line(
            f"recompute of counters, {rows:,} rows: pandas / ours, {what}",
            f"{values['pandas', 'counters']:,.2f} {unit} / {values['ours', 'counters']:,.2f} {unit}",
            values["pandas", "counters"] / values["ours", "counters"],
            ">=",
            10,
        )
        for what, values, unit in (("time", seconds, "s"), ("peak memory", megabytes, "MB"))
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--answer", nargs=3, metavar=("WAY", "QUESTION", "URL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(*options.answer)
        raise SystemExit(0)
    lines = measure(options.quick)
    print(*lines, sep="\n")
    raise SystemExit(0 if all(line.met for line in lines) else 1)
