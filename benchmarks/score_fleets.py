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

A fleet takes some 25 CPU seconds, nearly all of them in the pipeline: a thousand take more than three hours on two cores. They can
be lived in pieces, by seed, and told together: `--seed 1 --fleets 200 --json a`, `--seed 201 --fleets 200 --also a`.

    python benchmarks/score_fleets.py [--fleets 1000] [--seed 1] [--workers 2] [--quick] [--json FILE] [--also FILE ...]
"""

from __future__ import annotations

import argparse
import contextlib
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

import psycopg
from psycopg import sql

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.simulation.fleet import lab
from flywheel_pipeline.simulation.fleet.scenario import Drift, Exclusions, LateFlip, Otherwise, Scenario
from flywheel_pipeline.simulation.fleet.score import score
from flywheel_pipeline.simulation.fleet.stream import FleetStream

DAYS = 24
RECALL_BAR = 0.95
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


# -- a worker: one server, one database after the other --------------------------------------------

_server: EmbeddedServer | None = None


def _administer(statement: str, *names: str) -> None:
    assert _server is not None
    where = psycopg.conninfo.make_conninfo(
        host=str(_server.socket_directory), port=5432, user="flywheel", dbname="postgres"
    )
    with psycopg.connect(where, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


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
    begun = time.monotonic()
    name = f"fleet_{seed}"
    _administer("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, "template_of_fleets")
    engine = open_engine(_server.url.set(database=name))
    try:
        scenario, kinds = fleet(seed)
        stream = FleetStream(scenario, seed)
        history = lab.run_scenario(engine, stream)
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
    return Lived(seed, patterns, truth["counts"]["executions"], wrong, time.monotonic() - begun)


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


def read(document: dict[str, Any]) -> Lived:
    """A fleet as --json wrote it."""
    patterns = tuple(Pattern(**{**found, "false_at": tuple(found["false_at"])}) for found in document.pop("patterns"))
    return Lived(**{**document, "patterns": patterns, "wrong": tuple(document["wrong"])})


def told(met: bool, sentence: str) -> bool:
    """Print one line of the table."""
    print(f"{'ok  ' if met else 'MISS'} fleets: {sentence}", flush=True)
    return met


def report(lived: list[Lived], seconds: float) -> bool:
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
    unfit = sum(not p.good for p in patterns)
    wrong = Counter(name for one in lived for name in one.wrong)
    late = (
        f"median {statistics.median(days):.0f} days, 95 % by day {days[int(len(days) * 0.95)]:.0f}" if days else "never"
    )
    met = told(
        not false,
        f"{len(lived):,} fleets, {sum(one.rows for one in lived):,} rows: {len(false)} false fleet promotions of {unfit:,} "
        f"unfit patterns (bar 0); before the fleet, below the floor of that stage: {dict(earlier) or 'none'}",
    )
    share = len(days) / len(good) if good else 0.0
    met &= told(
        share >= RECALL_BAR,
        f"{share:.1%} of {len(good):,} good rules in the whole fleet within {DAYS} days (bar {RECALL_BAR:.0%}), {late}",
    )
    met &= told(not wrong, f"figures of the scores that were off: {dict(wrong) or 'none'}")
    each = statistics.median(one.seconds for one in lived)
    print(f"     {seconds:.0f} s, {each:.1f} s a fleet in one worker")
    return met


def main() -> int:
    """Let them live, print the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first fleet; the others follow")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="8 fleets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every fleet and pattern, as JSON lines")
    parser.add_argument(
        "--also", type=Path, action="append", default=[], metavar="FILE", help="fleets lived before, counted in"
    )
    options = parser.parse_args()
    fleets = 8 if options.quick else options.fleets
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    begun = time.monotonic()
    lived: list[Lived] = []
    before = [read(json.loads(line)) for file in options.also for line in file.read_text("utf-8").splitlines()]
    coming = range(options.seed, options.seed + fleets)
    if twice := [seed for seed, n in Counter([*coming, *(one.seed for one in before)]).items() if n > 1]:
        parser.error(f"fleet {twice[0]} would count twice")
    with scratch() as place, contextlib.ExitStack() as stack:
        out = stack.enter_context(options.json.open("w")) if options.json else None
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.workers, start_worker, (place,)))
        for one in pool.imap_unordered(live, coming):
            lived.append(one)
            if out is not None:
                out.write(json.dumps(asdict(one)) + "\n")
            passed = time.monotonic() - begun
            bad = [p for p in one.patterns if "fleet" in p.false_at]
            left = [p for p in one.patterns if p.good and p.fleet_day is None]
            if len(lived) % max(fleets // 50, 1) == 0 or bad or left or one.wrong:
                print(
                    f"{len(lived):>5}/{fleets}  {passed:5.0f} s, {passed / len(lived) * (fleets - len(lived)):5.0f} s to go"
                    + "".join(f"   FALSE in fleet {one.seed}: {p.kind}, {p.true_rate:.3f}" for p in bad)
                    + "".join(
                        f"   good and not there, fleet {one.seed}: {p.true_rate:.3f}, {p.state}: {p.reason}"
                        for p in left
                    )
                    + "".join(f"   OFF in fleet {one.seed}: {name}" for name in one.wrong),
                    file=sys.stderr,
                    flush=True,
                )
    return 0 if report([*before, *lived], time.monotonic() - begun) else 1


if __name__ == "__main__":
    sys.exit(main())
