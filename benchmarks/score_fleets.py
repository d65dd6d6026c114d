r"""A thousand simulated fleets under the standard policy: what reached the fleet, held against what was planted.

Each fleet has its own size, weather and six patterns: two whose runbook is truly good (true rate .98 to 1.00), a fair one
(.94 to .975), a mediocre one (.78 to .87), a bad one (.30 to .75) and a trap (below). It lives day by day in a database of its own, with a pass of the
pipeline at the end of each: intake, refresh, gates, decisions, ledger, manifests, as they run in service; appliances run what
their manifest holds. Nothing is replayed or estimated. Bars:

- false fleet promotions: 0. (Just under the floor of .90 a rule is promoted with probability up to alpha = .01: that figure is
  exact, `promotion/evalue.py`, and not simulated here.)
- good rules promoted within the bars: >= 95 %. The bars are those after which the policy parks what is inconclusive: 60 days
  or 1,000 episodes. Here there are only 24 days, which is stricter.
- no bar, and told: how many fair ones got there. Sites that the rule serves report no more of L2, and each site counts with
  10 episodes at most: in fleets of this size (60 to 90 sites) the evidence of a fair rule often stops short of the threshold.

A thousand fleets take hours, so they are lived in pieces: each fleet is one line of --out, appended when it is over, and a
later call goes on with the seeds that are not there. --until ends a piece at a time of day; the fleets then under way are
finished. --score reads such files and prints the table, with exact binomial intervals (Clopper and Pearson, 95 %).

    python benchmarks/score_fleets.py [--fleets 1000] [--from-seed 1] [--jobs 2] [--quick] [--out FILE] [--until HH:MM]
    python benchmarks/score_fleets.py --score FILE ...
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime as dt
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql
from scipy.stats import binomtest

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.simulation.fleet import lab
from flywheel_pipeline.simulation.fleet.scenario import Drift, Exclusions, LateFlip, Otherwise, Scenario
from flywheel_pipeline.simulation.fleet.score import score
from flywheel_pipeline.simulation.fleet.stream import FleetStream

DAYS = 24
RECALL_BAR = 0.95
#: Kinds that may reach the fleet; of all others none may.
FIT = ("good", "fair")
#: Runbooks of no high-risk class: those need a named approver besides, by design.
TYPES = (
    ("service_spooler", "RB-WIN-SVC-003"),
    ("service_w32time", "RB-WIN-SVC-004"),
    ("logging", "RB-WIN-LOGGING-001"),
    ("registry_run_persistence", "RB-WIN-SEC-019"),
    ("wmi_event_persistence", "RB-WIN-SEC-021"),
    ("audit_policy", "RB-WIN-SEC-002"),
)


def trap(pick: random.Random, kind: str) -> dict[str, Any]:
    """What is planted in a pattern that looks better than it is. None of these may reach the fleet."""
    if kind == "failures reported as successes":
        return {"success_rate": pick.uniform(0.5, 0.85), "silent_failure_rate": 1.0}
    if kind == "back within a day":
        return {"success_rate": 0.99, "recurrence_rate": pick.uniform(0.15, 0.4)}
    if kind == "dead at some sites":
        return {"success_rate": 1.0, "failing_sites_share": pick.uniform(0.15, 0.35)}
    if kind == "successes corrected later":
        return {"success_rate": pick.uniform(0.6, 0.85), "late_flip": LateFlip(share=0.9, hours=pick.uniform(1, 12))}
    if kind == "chosen where it works":
        other = Otherwise(runbook="RB-WIN-SVC-002", share=pick.uniform(0.2, 0.5))
        return {"success_rate": 0.99, "otherwise": other, "expect": "never"}
    if kind == "a third says nothing":
        gone = pick.uniform(0.3, 0.5)
        return {"success_rate": pick.uniform(0.5, 0.85), "exclusions": Exclusions(unreachable=gone)}
    raise ValueError(kind)


TRAPS = (
    "failures reported as successes",
    "back within a day",
    "dead at some sites",
    "successes corrected later",
    "chosen where it works",
    "a third says nothing",
)


def fleet(seed: int) -> tuple[Scenario, dict[str, str]]:
    """The fleet of a seed, and of what kind each of its patterns is, by incident type."""
    pick = random.Random(f"fleet {seed}")
    types = pick.sample(TYPES, len(TYPES))
    kinds = ["good", "good", "fair", "mediocre", "bad", pick.choice(TRAPS)]
    drifts = []
    for (incident_type, runbook), kind in zip(types, kinds, strict=True):
        planted: dict[str, Any]
        if kind == "good":
            planted = {"success_rate": pick.uniform(0.985, 1.0), "recurrence_rate": pick.uniform(0, 0.005)}
        elif kind == "fair":
            planted = {"success_rate": pick.uniform(0.94, 0.975)}
        elif kind == "mediocre":
            planted = {"success_rate": pick.uniform(0.78, 0.87)}
        elif kind == "bad":
            planted = {"success_rate": pick.uniform(0.3, 0.75), "expect": "any"}
        else:
            planted = trap(pick, kind)
        drifts.append(
            Drift(incident_type=incident_type, runbook=runbook, per_host_day=pick.uniform(0.4, 1.5), **planted)
        )
    scenario = Scenario.model_validate(
        {
            "name": f"fleet_{seed}",
            "title": "a fleet of many",
            "plants": ", ".join(kinds),
            "days": DAYS,
            "fleet": {
                "sites": pick.randint(60, 90),
                "windows": 3,
                "dead_hosts": pick.uniform(0, 0.02),
            },
            "transport": {"duplicates": pick.uniform(0, 0.03), "late": pick.uniform(0, 0.08), "late_hours": 3.0},
            "drifts": drifts,
        }
    )
    return scenario, {incident_type: kind for (incident_type, _), kind in zip(types, kinds, strict=True)}


@dataclass(frozen=True)
class Pattern:
    """One pattern at the end: planted and found. `fleet_day`: when every machine had it, None if never; `reason`: why it
    did not move on the last day of drifts (on the day after it, nothing arrives and the gate on freshness holds all).
    """

    kind: str
    good: bool
    true_rate: float
    state: str
    fleet_day: float | None
    false_at: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Lived:
    """One fleet at the end; `wrong` names figures of the score that were off, such as rows counted twice."""

    seed: int
    patterns: tuple[Pattern, ...]
    rows: int
    wrong: tuple[str, ...]
    seconds: float
    cpu_seconds: float


# -- a worker: one server, one database after the other --------------------------------------------

_server: EmbeddedServer | None = None


def _administer(statement: str, *names: str) -> None:
    assert _server is not None
    where = psycopg.conninfo.make_conninfo(
        host=str(_server.socket_directory), port=5432, user="flywheel", dbname="postgres"
    )
    with psycopg.connect(where, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _cpu_seconds() -> float:
    """What this process and its server, with all that it has ended, have taken of a processor."""
    assert _server is not None
    server = psutil.Process(int((_server.data / "postmaster.pid").read_text().split()[0]))
    spent = sum(server.cpu_times()[:4])
    for child in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile, and counts in its parent from now on
            spent += sum(child.cpu_times()[:2])
    return spent + time.process_time()


def start_worker(place: str) -> None:
    """Start this worker's server; its databases are of no use tomorrow, so nothing is flushed."""
    global _server
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    home = Path(tempfile.mkdtemp(dir=place))
    options = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_wal_size": "256MB"}
    _server = EmbeddedServer(home, options=options)
    _server.ensure_running()
    _administer("CREATE DATABASE {}", "template_of_fleets")
    engine = open_engine(_server.url.set(database="template_of_fleets"))
    migrate.upgrade(engine)
    engine.dispose()


def live(seed: int) -> Lived:
    """Let the fleet of a seed live, and score it."""
    assert _server is not None
    begun, spent = time.monotonic(), _cpu_seconds()
    name = f"fleet_{seed}"
    _administer("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, "template_of_fleets")
    engine = open_engine(_server.url.set(database=name))
    try:
        scenario, kinds = fleet(seed)
        stream = FleetStream(scenario, seed)
        history = lab.run_scenario(engine, stream, promotion_only=True)
        truth = stream.truth.document()
        found = score(engine, truth, history=history.as_dict())
    finally:
        engine.dispose()
        _administer("DROP DATABASE {} WITH (FORCE)", name)
    patterns = tuple(
        Pattern(
            kind=kinds.get(found_pattern["pattern_key"].split("~")[0], "?"),
            good=found_pattern["good"] and kinds.get(found_pattern["pattern_key"].split("~")[0]) == "good",
            true_rate=found_pattern["true_rate"],
            state=found_pattern["state"],
            fleet_day=found_pattern["stages"].get("fleet", {}).get("day"),
            false_at=tuple(stage for stage, entered in found_pattern["stages"].items() if entered["false"]),
            reason=history.days[-2].held.get(found_pattern["pattern_key"], ("", ""))[1],
        )
        for found_pattern in found["patterns"]
        if "RB-WIN-SVC-002" not in found_pattern["pattern_key"]  # what L2 chose instead is no pattern of this plan
    )
    wrong = tuple(figure["figure"] for figure in found["figures"] if not figure["ok"])
    return Lived(seed, patterns, truth["counts"]["executions"], wrong, time.monotonic() - begun, _cpu_seconds() - spent)


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A directory for the servers, in memory where there is room; the servers in it are ended by their own processes' end."""
    memory = Path("/dev/shm")  # noqa: S108 (made and removed here)
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 3 << 30
    place = tempfile.mkdtemp(prefix="fw-fleets-", dir=memory if roomy else None)
    os.chmod(place, 0o755)  # noqa: S103 (as root the server runs as another user)
    try:
        yield place
    finally:
        for home in Path(place).iterdir():
            EmbeddedServer(home).remove()
        shutil.rmtree(place, ignore_errors=True)


# -- all of them -----------------------------------------------------------------------------------


def read(file: Path) -> list[Lived]:
    """The fleets that a call with --out wrote; a last line cut short by a kill is no fleet."""
    lived = []
    for line in file.read_text("utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        document = json.loads(line)
        patterns = tuple(
            Pattern(**{**found, "false_at": tuple(found["false_at"])}) for found in document.pop("patterns")
        )
        lived.append(Lived(**{**document, "patterns": patterns, "wrong": tuple(document["wrong"])}))
    return lived


def cut_short_line(file: Path) -> None:
    """Remove what a kill left of a line at the end of a file."""
    text = file.read_bytes()
    if text and not text.endswith(b"\n"):
        with file.open("r+b") as out:
            out.truncate(text.rfind(b"\n") + 1)


def interval(found: int, of: int) -> str:
    """The exact 95 % interval of a share."""
    if not of:
        return "nothing"
    exact = binomtest(found, of).proportion_ci(0.95, method="exact")
    return f"95 % interval {exact.low:.2%} to {exact.high:.2%}"


def told(met: bool, sentence: str) -> bool:
    """Print one line of the table."""
    print(f"{'ok  ' if met else 'MISS'} fleets: {sentence}", flush=True)
    return met


def report(lived: list[Lived]) -> bool:
    """Print the table; return whether the bars hold."""
    patterns = [pattern for one in lived for pattern in one.patterns]
    by_kind: dict[str, list[Pattern]] = {}
    for pattern in patterns:
        by_kind.setdefault(pattern.kind, []).append(pattern)
    print(f"\n{'planted':<34}{'patterns':>9}{'fleet':>8}{'served':>8}   at the end")
    for kind, found in sorted(by_kind.items()):
        states = ", ".join(f"{state} {n}" for state, n in Counter(p.state for p in found).most_common())
        served = sum(p.state in ("canary", "ring", "fleet") or p.fleet_day is not None for p in found)
        print(f"{kind:<34}{len(found):>9}{sum(p.fleet_day is not None for p in found):>8}{served:>8}   {states}")
    good = [p for p in patterns if p.good]
    days = sorted(p.fleet_day for p in good if p.fleet_day is not None)
    false = [p for p in patterns if "fleet" in p.false_at]
    earlier = Counter(stage for p in patterns for stage in p.false_at if stage != "fleet")
    unfit = sum(p.kind not in FIT for p in patterns)
    wrong = Counter(name for one in lived for name in one.wrong)
    late = (
        f"median {statistics.median(days):.0f} days, 95 % by day {days[int(len(days) * 0.95)]:.0f}" if days else "never"
    )
    met = told(
        not false,
        f"{len(lived):,} fleets, {sum(one.rows for one in lived):,} rows: {len(false)} false fleet promotions of {unfit:,} "
        f"unfit patterns (bar 0; {interval(len(false), unfit)}); before the fleet, below the floor of that stage: {dict(earlier) or 'none'}",
    )
    share = len(days) / len(good) if good else 0.0
    met &= told(
        share >= RECALL_BAR,
        f"{share:.1%} of {len(good):,} good rules in the whole fleet within {DAYS} days (bar {RECALL_BAR:.0%}; {interval(len(days), len(good))}), {late}",
    )
    met &= told(not wrong, f"figures of the scores that were off: {dict(wrong) or 'none'}")
    cpu = statistics.median(one.cpu_seconds for one in lived)
    print(
        f"     {cpu:.1f} CPU seconds a fleet, {statistics.median(one.seconds for one in lived):.1f} s on the clock (medians)"
    )
    return met


def progress(one: Lived, done: int, of: int, passed: float) -> None:
    """Print a line on the fleet that is over."""
    notes = [f"FALSE: {p.kind}, {p.true_rate:.3f}" for p in one.patterns if "fleet" in p.false_at]
    notes += [
        f"good and not there: {p.true_rate:.3f}, {p.state}: {p.reason}"
        for p in one.patterns
        if p.good and p.fleet_day is None
    ]
    notes += [f"OFF: {name}" for name in one.wrong]
    print(
        f"{done:>5}/{of}  fleet {one.seed}  {one.cpu_seconds:.1f} CPU s  {passed:.0f} s, "
        f"{passed / done * (of - done):.0f} s to go" + "".join(f"   {note}" for note in notes),
        file=sys.stderr,
        flush=True,
    )


def live_all(seeds: list[int], jobs: int, out: Path | None, until: dt.datetime | None) -> list[Lived]:
    """Let the fleets of these seeds live, `jobs` at a time, and append each to `out` when it is over."""
    begun = time.monotonic()
    lived: list[Lived] = []
    waiting = iter(seeds)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(scratch())
        file = stack.enter_context(out.open("a", encoding="utf-8")) if out else None
        pool = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(
                jobs, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(place,)
            )
        )
        running = {pool.submit(live, seed) for seed in itertools.islice(waiting, jobs)}
        while running:
            over, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in over:
                one = future.result()
                lived.append(one)
                if file is not None:
                    file.write(json.dumps(asdict(one)) + "\n")
                    file.flush()
                progress(one, len(lived), len(seeds), time.monotonic() - begun)
                if until is None or dt.datetime.now().astimezone() < until:
                    running |= {pool.submit(live, seed) for seed in itertools.islice(waiting, 1)}
    return lived


def main() -> int:
    """Let them live, print the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=1000)
    parser.add_argument("--from-seed", type=int, default=1, help="of the first fleet; the others follow")
    parser.add_argument("--jobs", type=int, default=2, help="fleets at a time, each with a server of its own")
    parser.add_argument("--quick", action="store_true", help="8 fleets")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="append a JSON line a fleet; seeds there are not repeated"
    )
    parser.add_argument(
        "--until", type=dt.time.fromisoformat, metavar="HH:MM", help="begin no fleet after this local time"
    )
    parser.add_argument("--score", type=Path, nargs="+", metavar="FILE", help="print the table of these files only")
    options = parser.parse_args()
    if options.score:
        scored = [one for file in options.score for one in read(file)]
        if not scored:
            parser.error("no fleet is in there")
        if twice := [seed for seed, n in Counter(one.seed for one in scored).items() if n > 1]:
            parser.error(f"fleet {twice[0]} would count twice")
        return 0 if report(scored) else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    until = None
    if options.until is not None:
        now = dt.datetime.now().astimezone()
        until = dt.datetime.combine(now.date(), options.until).astimezone()
        until += dt.timedelta(days=until <= now)
    before: list[Lived] = []
    if options.out is not None and options.out.exists():
        cut_short_line(options.out)
        before = read(options.out)
    wanted = range(options.from_seed, options.from_seed + (8 if options.quick else options.fleets))
    known = {one.seed for one in before}
    lived = live_all([seed for seed in wanted if seed not in known], options.jobs, options.out, until)
    if not before and not lived:
        parser.error("no fleet was asked for")
    return 0 if report([*before, *lived]) else 1


if __name__ == "__main__":
    sys.exit(main())
