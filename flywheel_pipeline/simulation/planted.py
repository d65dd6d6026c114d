"""Fleets whose causes of failure are known, to hold attribution against: as rows, and the truth beside them.

Belongs here: making executions of one rule. Does not belong here: attribution.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flywheel_pipeline.health.segments import Cells, buckets, from_rows

FIRST_DAY = dt.date(2025, 12, 1)
OLD_AGENT, NEW_AGENTS = "1.0.56", ("1.0.70", "1.0.74")
OS = ("Windows 10", "Windows 11", "Windows Server 2019", "Windows Server 2022")
HARDWARE = ("laptop", "desktop", "server", "vm", "vm-no-tpm")
ONSET_DAY = 35
GOLDEN_SEED = 6


@dataclass(frozen=True)
class Execution:
    """One execution of the planted rule; `causes` says which planted causes would have made it fail on their own."""

    site: str
    host: str
    agent_version: str
    os: str
    hardware: str
    day: dt.date
    success: bool
    error: str | None
    step: int | None
    causes: tuple[int, ...]
    base_failure: bool


@dataclass(frozen=True)
class Where:
    """What a cause may depend on; `day` counts from the first day, 0."""

    agent_version: str
    os: str
    hardware: str
    day: int


@dataclass(frozen=True)
class Cause:
    """A planted cause: where it acts, how often it makes an execution fail, and with which message and step."""

    name: str
    acts: Callable[[Where], bool]
    probability: float
    error: str
    step: int


THREE_CAUSES: tuple[Cause, ...] = (
    Cause(
        "agent 1.0.56",
        lambda where: where.agent_version == OLD_AGENT,
        0.93,
        "Unknown action: run_windows_runbook:RB-WIN-SEC-005",
        1,
    ),
    Cause(
        "VMs without TPM",
        lambda where: where.hardware == "vm-no-tpm",
        0.95,
        "A compatible Trusted Platform Module (TPM) Security Device cannot be found on this computer.",
        2,
    ),
    Cause(
        "Windows 10 since day 35",
        lambda where: where.os == "Windows 10" and where.day >= ONSET_DAY,
        0.6,
        "Phase 'verify' failed: ProtectionStatus=0",
        3,
    ),
)


def fleet(
    causes: Sequence[Cause] = THREE_CAUSES,
    *,
    executions: int = 3057,
    sites: int = 20,
    hosts: int = 160,
    days: int = 60,
    base: float = 0.04,
    spread: float = 0.0,
    dead_hosts: int = 0,
    seed: int = 1,
) -> list[Execution]:
    """Simulate the executions of one rule.

    Args:
        causes: what makes executions fail, each on its own; empty: a fleet without a cause.
        executions: rows made.
        sites: among which hosts are spread.
        hosts: in all.
        days: from FIRST_DAY on.
        base: failure rate that nothing explains.
        spread: of that rate between hosts (0: none; a beta with this intra-host correlation else).
        dead_hosts: hosts that always fail and fire five times as often, wherever they are.
        seed: the same seed gives the same fleet.
    """
    rng = np.random.default_rng(seed)
    site_of = rng.integers(0, sites, hosts)
    # A third of the sites still runs the old release; an upgrade is per site.
    agent_of_site = rng.choice([OLD_AGENT, *NEW_AGENTS], sites, p=[0.32, 0.34, 0.34])
    os_of = rng.choice(OS, hosts, p=[0.3, 0.4, 0.15, 0.15])
    hardware_of = rng.choice(HARDWARE, hosts, p=[0.38, 0.3, 0.1, 0.1, 0.12])
    if spread > 0:
        scale = (1 - spread) / spread
        rate_of = rng.beta(base * scale, (1 - base) * scale, hosts)
    else:
        rate_of = np.full(hosts, base)
    weight = rng.gamma(2.0, 1.0, hosts)
    dead = rng.permutation(hosts)[:dead_hosts]
    rate_of[dead] = 1.0
    weight[dead] = 5 * weight.mean()
    host_of = rng.choice(hosts, executions, p=weight / weight.sum())
    day_of = np.sort(rng.integers(0, days, executions))
    made = []
    for h, d in zip(host_of.tolist(), day_of.tolist(), strict=True):
        agent, os, hardware = str(agent_of_site[site_of[h]]), str(os_of[h]), str(hardware_of[h])
        fired = tuple(
            i for i, c in enumerate(causes) if c.acts(Where(agent, os, hardware, d)) and rng.random() < c.probability
        )
        unexplained = bool(rng.random() < rate_of[h])
        success = not fired and not unexplained
        cause = causes[fired[0]] if fired else None
        made.append(
            Execution(
                site=f"site-{site_of[h]:02d}",
                host=f"WS-{h:03d}",
                agent_version=agent,
                os=os,
                hardware=hardware,
                day=FIRST_DAY + dt.timedelta(days=d),
                success=success,
                error=None if success else cause.error if cause else "Phase 'remediate' failed",
                step=None if success else cause.step if cause else 2,
                causes=fired,
                base_failure=unexplained,
            )
        )
    return made


def true_rate_without(executions: Sequence[Execution], fixed: set[int]) -> float:
    """The success rate that the same executions would have had with these planted causes gone."""
    succeed = sum(not e.base_failure and not set(e.causes) - fixed for e in executions)
    return succeed / len(executions)


def true_excess(executions: Sequence[Execution], cause: int) -> int:
    """Failures that only this planted cause made."""
    return sum(e.causes == (cause,) and not e.base_failure for e in executions)


def golden_fleet() -> list[Execution]:
    """3,057 executions in which the old agent is the largest cause, VMs without TPM the second, Windows 10 the third."""
    return fleet(seed=GOLDEN_SEED)


def cells(executions: Sequence[Execution]) -> Cells:
    """The executions as the cells that a search takes."""
    width, starts = buckets(min(e.day for e in executions), max(e.day for e in executions))
    counts: Counter[tuple[str, str, str | None, str | None, str | None, int]] = Counter()
    failed: Counter[tuple[str, str, str | None, str | None, str | None, int]] = Counter()
    for e in executions:
        key = (e.site, e.host, e.agent_version, e.os, e.hardware, (e.day - starts[0]).days // width)
        counts[key] += 1
        failed[key] += not e.success
    return from_rows([(*key, counts[key], failed[key]) for key in counts], starts)
