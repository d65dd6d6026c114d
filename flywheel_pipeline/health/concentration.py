"""On how many hosts a rule fails: dead hosts, flapping hosts, and at which step it stops.

Belongs here: pure functions on counts. Hosts come in by name and leave as counts, or as "host 1" of their site: the
same number means the same host within one answer and nothing outside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

DEAD_EXECUTIONS = 5  # all failed: fewer may be bad luck
FLAPPING_RETURNS = 3  # fixes that did not hold for a day
SHOWN = 5


@dataclass(frozen=True)
class WorstHost:
    """A host without its name: `host` is its number within the site, that with most failures first."""

    site: str
    host: str
    executions: int
    failures: int


@dataclass(frozen=True)
class Concentration:
    """How failures spread over hosts.

    Attributes:
        hosts: that the rule ran on; failing_hosts: with a failure at all.
        hosts_for_half: the fewest hosts that make half of all failures.
        dead_hosts: with five executions or more, none successful; dead_failures: theirs; dead_sites: where they are.
        share_of_dead: fraction of all failures on them.
        rate_without_dead: success rate of the rest; None over nothing.
        worst: hosts with most failures.
    """

    hosts: int
    failing_hosts: int
    hosts_for_half: int
    dead_hosts: int
    dead_failures: int
    dead_sites: int
    share_of_dead: float
    rate_without_dead: float | None
    worst: tuple[WorstHost, ...]


@dataclass(frozen=True)
class Flapping:
    """Hosts that are fixed again and again, such as where a policy reverts each fix.

    Attributes:
        hosts: with three fixes or more that did not hold for a day, being half of theirs or more.
        returned: verified successes after which the same drift came back within a day, on all hosts.
        share: fraction of verified successes that did not hold; None over nothing.
    """

    hosts: int
    sites: int
    returned: int
    share: float | None


@dataclass(frozen=True)
class StepShare:
    """Failures at a step; `step` is None where the agent did not say."""

    step: int | None
    failures: int
    share: float


def concentration(hosts: Iterable[tuple[str, str, int, int]]) -> Concentration:
    """Measure it from (site, host, executions, failures), each host once."""
    rows = sorted(hosts, key=lambda h: (-h[3], -h[2], h[0], h[1]))
    executions, failures = sum(h[2] for h in rows), sum(h[3] for h in rows)
    running, half = 0, 0
    while failures and 2 * running < failures:
        running += rows[half][3]
        half += 1
    dead = [h for h in rows if h[2] >= DEAD_EXECUTIONS and h[3] == h[2]]
    dead_failures = sum(h[3] for h in dead)
    rest = executions - dead_failures
    number: Counter[str] = Counter()
    worst = []
    for site, _, n, f in rows[:SHOWN]:
        number[site] += 1
        worst.append(WorstHost(site, f"host {number[site]}", n, f))
    return Concentration(
        hosts=len(rows),
        failing_hosts=sum(1 for h in rows if h[3]),
        hosts_for_half=half,
        dead_hosts=len(dead),
        dead_failures=dead_failures,
        dead_sites=len({h[0] for h in dead}),
        share_of_dead=dead_failures / failures if failures else 0.0,
        rate_without_dead=1 - (failures - dead_failures) / rest if rest else None,
        worst=tuple(w for w in worst if w.failures),
    )


def flapping(hosts: Iterable[tuple[str, str, int, int]]) -> Flapping:
    """Measure it from (site, host, verified successes, those that did not hold), each host once."""
    rows = list(hosts)
    flap = [h for h in rows if h[3] >= FLAPPING_RETURNS and 2 * h[3] >= h[2]]
    fixed, returned = sum(h[2] for h in rows), sum(h[3] for h in rows)
    return Flapping(len(flap), len({h[0] for h in flap}), returned, returned / fixed if fixed else None)


def step_shares(failures: Iterable[tuple[int | None, int]]) -> list[StepShare]:
    """Failures by step, most first."""
    counts: Counter[int | None] = Counter()
    for step, n in failures:
        counts[step] += n
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0] is None, item[0] or 0))
    return [StepShare(step, n, n / total) for step, n in ordered if n]
