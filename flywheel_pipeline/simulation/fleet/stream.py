"""The stream of a simulated fleet: incidents in the order of time, and what arrives of them in the order of arrival.

Belongs here: every draw by chance, each a hash of (seed, host, drift, number), so that a draw depends on no other one:
the same incidents come whatever the pipeline promotes meanwhile, and the same scenario and seed give the same bytes on
any machine. Does not belong here: writing anything anywhere (`sinks`).

One host has one stream per drift. After an attempt the host stays compliant for a day at least, unless the drift comes
back as planted: so "back within 24 hours" is planted, never a coincidence. Memory holds one next event per stream and
the posts on their way, never the past.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import heapq
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from flywheel_pipeline.database.seed import BUILTIN_RULES, read_seed
from flywheel_pipeline.simulation.fleet import reports
from flywheel_pipeline.simulation.fleet.reports import Attempt
from flywheel_pipeline.simulation.fleet.scenario import SITE_PREFIX, Drift, Scenario
from flywheel_pipeline.simulation.fleet.truth import Truth, rate_at

DAY_MS: Final = 86_400_000
HOUR_MS: Final = 3_600_000
#: A host that was attempted drifts anew after this at the earliest: past the recurrence window of 24 hours.
REST_MS: Final = DAY_MS + 60_000

_EIGHT = struct.Struct(">8Q")
_PLACEHOLDERS: Final = ("AUTO-", "L2-", "ESC", "UNASSIGNED-", "GENERAL", "UNKNOWN")


def uniforms(label: str) -> tuple[float, ...]:
    """Return eight numbers in [0, 1) that depend on the label alone."""
    return tuple([word / 2**64 for word in _EIGHT.unpack(hashlib.blake2b(label.encode()).digest())])


@functools.cache
def _builtin_rules() -> tuple[Mapping[str, Any], ...]:
    """The built-in rules, read once: a fleet asks for them at each pass."""
    return tuple(read_seed(BUILTIN_RULES))


@dataclass(frozen=True, slots=True)
class ServedRule:
    """A rule that an appliance runs, as its manifest says: what it matches and what it runs."""

    rule_id: str
    incident_type: str
    platform: str
    runbook: str


#: (appliance id) -> rules by (incident type, platform), the first that matches.
Serving = Callable[[str], Mapping[tuple[str, str], ServedRule]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One post as it arrives. `kind`: first, correction, duplicate, replay or invalid; `late`: it waited in a queue.

    `code` is the reason code that an invalid one must be refused with; `at_ms` the real time of arrival.
    """

    at_ms: int
    body: bytes
    execution_id: str
    appliance_id: str
    kind: str
    late: bool
    code: str | None = None


@dataclass(slots=True)
class _Stream:
    drift: int
    site: int
    host: int
    number: int = 0
    came_back: int = 0
    synthetic: bool = False


class FleetStream:
    """A scenario with a seed, playing. `advance` moves the clock and yields what arrives; `truth` grows with it."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.truth = Truth(scenario, seed)
        self.begin_ms = int(scenario.begins.timestamp() * 1000)
        self.end_ms = self.begin_ms + scenario.days * DAY_MS
        self._serving: Serving | None = None
        self._sequence = 0
        self._bad = 0
        self._sent: list[tuple[int, int, Delivery]] = []
        fleet = scenario.fleet
        self._hosts = {
            platform: [f"{letter}{n + 1:02d}" for n in range(getattr(fleet, platform))]
            for platform, letter in (("windows", "W"), ("linux", "L"), ("macos", "M"))
        }
        self._standing = self._standing_rules()
        self._unregistered = {d.rule.rule_id for d in scenario.drifts if d.rule is not None and not d.rule.registered}
        hosts_a_site = sum(map(len, self._hosts.values()))
        self._dead = self._chosen("dead", fleet.dead_hosts, hosts_a_site)
        self._flapping = self._chosen("flapping", fleet.flapping_hosts, hosts_a_site) - self._dead
        self._streams: list[_Stream] = []
        self._events: list[tuple[int, int]] = []
        for index, drift in enumerate(scenario.drifts):
            for site in range(fleet.sites):
                for host in range(len(self._hosts[drift.platform])):
                    if drift.per_host_day:
                        self._start(_Stream(index, site, host), drift.per_host_day)
                    if drift.synthetic is not None:
                        self._start(_Stream(index, site, host, synthetic=True), drift.synthetic.per_host_day)
        heapq.heapify(self._events)

    # ------------------------------------------------------------------------------------------------ the fleet

    def site_id(self, site: int, at_ms: int) -> str:
        """The name under which a site (from 0) reports at a time."""
        name = self._first_name(site)
        for rename in self.scenario.fleet.renames:
            if rename.site == site + 1 and at_ms >= self.begin_ms + rename.day * DAY_MS:
                name = rename.to
        return name

    def _first_name(self, site: int) -> str:
        ids = self.scenario.fleet.site_ids
        return ids[site] if ids is not None else f"{SITE_PREFIX}{site + 1:03d}"

    def appliance_id(self, site: int, number: int) -> str:
        """The id of an appliance (from 0); it keeps it when its site is renamed."""
        return (
            f"{self._first_name(site)}-02:00:{site >> 16 & 255:02X}:{site >> 8 & 255:02X}:{site & 255:02X}:{number:02X}"
        )

    def agent_version(self, site: int, number: int, at_ms: int) -> str:
        """The release that an appliance runs at a time."""
        fleet = self.scenario.fleet
        count = fleet.sites * fleet.appliances_per_site
        share = (site * fleet.appliances_per_site + number) / count
        version, passed = fleet.agents[-1].version, 0.0
        for agents in fleet.agents:
            passed += agents.share
            if share < passed - 1e-9:
                version = agents.version
                break
        for upgrade in sorted(fleet.upgrades, key=lambda u: u.day):
            newer = _release(upgrade.version) > _release(version)
            if at_ms >= self.begin_ms + upgrade.day * DAY_MS and newer and share >= 1 - upgrade.share - 1e-9:
                version = upgrade.version
        return version

    def fleet_rows(self, at_ms: int) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of `sites` and `appliances`, the standing rules and imported patterns, at a time."""
        fleet, begins = self.scenario.fleet, self.scenario.begins
        at = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
        sites = [
            {
                "site_id": self.site_id(s, at_ms),
                "name": f"Simulated clinic {s + 1}",
                "healing_tier": "standard",
                "created_at": begins,
            }
            for s in range(fleet.sites)
        ]
        appliances = [
            {
                "appliance_id": self.appliance_id(s, a),
                "site_id": self.site_id(s, at_ms),
                "agent_version": self.agent_version(s, a, at_ms),
                "last_checkin": at,
                "created_at": begins,
            }
            for s in range(fleet.sites)
            for a in range(fleet.appliances_per_site)
        ]
        builtin = {row["rule_id"] for row in _builtin_rules()}
        rules = [
            {
                "rule_id": d.rule.rule_id,
                "incident_pattern": {"incident_type": d.incident_type},
                "runbook_id": d.rule.runbook or d.runbook,
                "platform": d.platform,
                "enabled": d.rule.enabled,
                "created_at": begins,
            }
            for d in self.scenario.drifts
            if d.rule is not None and d.rule.registered and d.rule.rule_id not in builtin
        ]
        patterns = [
            {
                "pattern_id": hashlib.sha256(d.key.encode()).hexdigest()[:16],
                "pattern_signature": f"{d.incident_type}:{d.runbook}",
                "incident_type": d.incident_type,
                "runbook_id": d.runbook,
                "platform": d.platform,
                "occurrences": d.imported_successes,
                "success_count": d.imported_successes,
                "failure_count": 0,
                "status": "pending",
                "first_seen": begins,
                "last_seen": begins,
            }
            for d in self.scenario.drifts
            if d.imported_successes is not None
        ]
        return {"sites": sites, "appliances": appliances, "rules": rules, "patterns": patterns}

    def _standing_rules(self) -> dict[tuple[str, str], ServedRule]:
        """Rules that agents run before any manifest: built-in ones, and those that the scenario has in service."""
        standing = {
            (row["incident_type"], row["platform"]): ServedRule(
                row["rule_id"], row["incident_type"], row["platform"], row["runbook_id"]
            )
            for row in _builtin_rules()
        }
        for drift in self.scenario.drifts:
            rule = drift.rule
            if rule is not None and rule.enabled:
                standing[drift.incident_type, drift.platform] = ServedRule(
                    rule.rule_id, drift.incident_type, drift.platform, rule.runbook or drift.runbook
                )
        return standing

    def serve(self, serving: Serving | None) -> None:
        """From now on appliances run what `serving` says; None: the rules that stand from the beginning."""
        self._serving = serving

    def _chosen(self, what: str, share: float, hosts_a_site: int) -> frozenset[tuple[int, str]]:
        """Choose a share of the hosts, exactly so many, by a hash of their names."""
        if share == 0:
            return frozenset()
        every = [
            (s, name) for s in range(self.scenario.fleet.sites) for names in self._hosts.values() for name in names
        ]
        every.sort(key=lambda host: uniforms(f"{self.seed}|{what}|{host[0]}|{host[1]}")[0])
        return frozenset(every[: round(share * self.scenario.fleet.sites * hosts_a_site)])

    # ------------------------------------------------------------------------------------------------ the clock

    def advance(self, until_ms: int) -> Iterator[Delivery]:
        """Play on until a time (ms since the epoch) and yield what arrives before it, in the order of arrival.

        No new drift begins after the scenario's last day; what is under way still arrives.
        """
        events = self._events
        last = min(until_ms, self.end_ms)
        while events and events[0][0] < last:
            at, number = heapq.heappop(events)
            yield from self._arrived(at)
            following = self._happen(self._streams[number], at)
            if following < self.end_ms:
                heapq.heappush(events, (following, number))
        yield from self._arrived(until_ms)

    def rest(self) -> Iterator[Delivery]:
        """Play to the end and yield all that is left, however late it arrives."""
        yield from self.advance(self.end_ms)
        while self._sent:
            yield from self._arrived(self._sent[0][0] + 1)

    def _arrived(self, before_ms: int) -> Iterator[Delivery]:
        while self._sent and self._sent[0][0] < before_ms:
            delivery = heapq.heappop(self._sent)[2]
            self.truth.deliveries += 1
            if delivery.kind != "replay":
                for replayed in self.scenario.transport.replays:
                    if (
                        self.begin_ms + replayed.day * DAY_MS
                        <= delivery.at_ms
                        < self.begin_ms + (replayed.day + 1) * DAY_MS
                    ):
                        again = delivery.at_ms + (replayed.again - replayed.day) * DAY_MS
                        self._send(replace(delivery, at_ms=again, kind="replay"))
            if delivery.kind == "replay":
                self.truth.replays += 1
            if delivery.code is not None:
                self.truth.invalid[delivery.code] += 1
            yield delivery

    def _send(self, delivery: Delivery) -> None:
        self._sequence += 1
        heapq.heappush(self._sent, (delivery.at_ms, self._sequence, delivery))

    def _start(self, stream: _Stream, per_day: float) -> None:
        u = uniforms(f"{self._label(stream)}|start")
        at = self.begin_ms + int(_gap(u[0], per_day))
        self._streams.append(stream)
        if at < self.end_ms:
            self._events.append((at, len(self._streams) - 1))

    def _label(self, stream: _Stream) -> str:
        drift = self.scenario.drifts[stream.drift]
        host = self._hosts[drift.platform][stream.host]
        return f"{self.seed}|{drift.key}|{stream.site}|{host}|{'s' if stream.synthetic else ''}"

    # ------------------------------------------------------------------------------------------------ an incident

    def _happen(self, stream: _Stream, at_ms: int) -> int:
        """Play one attempt at a time, send its posts, and return when this stream's next one is."""
        drift = self.scenario.drifts[stream.drift]
        label = self._label(stream)
        u = uniforms(f"{label}|{stream.number}")
        if stream.synthetic:
            following = at_ms + int(_gap(u[0], drift.synthetic.per_host_day if drift.synthetic else 1.0))
        else:
            following = at_ms + REST_MS + int(_gap(u[0], drift.per_host_day))
        host = self._hosts[drift.platform][stream.host]
        place = (stream.site, host)
        appliance = stream.host % self.scenario.fleet.appliances_per_site
        appliance_id = self.appliance_id(stream.site, appliance)
        version = self.agent_version(stream.site, appliance, at_ms)
        day = (at_ms - self.begin_ms) / DAY_MS
        served = None if stream.synthetic else self._served(drift, appliance_id)
        other = drift.otherwise is not None and u[1] < drift.otherwise.share
        runbook = drift.runbook
        if served is not None:
            runbook = served.runbook
        elif other and drift.otherwise is not None:
            runbook = drift.otherwise.runbook
        placeholder = runbook.upper().startswith(_PLACEHOLDERS)
        action, capable = (None, True) if placeholder else reports.action_of(runbook, drift.platform, version)
        outcome, reported = self._outcome(stream, drift, served, u, day, place, other=other, capable=capable)
        if not stream.synthetic:
            fleet = self.scenario.fleet
            if place in self._dead:
                following = at_ms + int(fleet.dead_retry_hours * HOUR_MS * (0.8 + 0.4 * u[5]))
            elif place in self._flapping:
                if outcome == "suppressed":
                    stream.came_back = 0
                    following = at_ms + REST_MS
                else:
                    stream.came_back += 1
                    following = at_ms + int(fleet.flap_hours * HOUR_MS * (0.8 + 0.4 * u[5]))
            elif outcome == "success" and u[4] < drift.recurrence_rate:
                following = at_ms + 2 * HOUR_MS + int(18 * HOUR_MS * u[5])
        ahead = 0
        if (
            self.scenario.fleet.clock_ahead_share
            and uniforms(f"{self.seed}|clock|{appliance_id}")[0] < self.scenario.fleet.clock_ahead_share
        ):
            ahead = int(self.scenario.fleet.clock_ahead_minutes * 60_000)
        synthetic = drift.synthetic if stream.synthetic else None
        campaign = self.scenario.campaign or ("chaos-lab" if synthetic and synthetic.mark == "campaign" else None)
        kind = "s" if stream.synthetic else "e"
        identity = f"{self.scenario.name}-{self.seed}-{stream.drift}-{stream.site}-{host}-{kind}{stream.number}"
        attempt = Attempt(
            execution_id=f"{SITE_PREFIX}{identity}",
            incident_id=f"inc-{identity}",
            site_id=self.site_id(stream.site, at_ms),
            appliance_id=appliance_id,
            hostname=f"SIM{stream.site + 1:03d}-{host}",
            platform=drift.platform,
            incident_type=drift.incident_type,
            runbook=runbook,
            level="L2" if served is None else "L1",
            rule_id=None if served is None else served.rule_id,
            action=action,
            agent_version=version,
            started_ms=at_ms + ahead,
            duration_ms=1000 + int(30_000 * u[6]),
            outcome=outcome,
            reported_success=reported,
            pick=u[7],
            campaign=campaign,
            tagged=synthetic is not None and synthetic.mark == "tag",
        )
        stream.number += 1
        key = drift.key if runbook == drift.runbook else drift.model_copy(update={"runbook": runbook}).key
        final = attempt if campaign is None or outcome == "synthetic" else replace(attempt, outcome="synthetic")
        self.truth.count(
            final,
            key,
            self.site_id(stream.site, self.end_ms),
            registered=attempt.rule_id not in self._unregistered,
        )
        self._report(attempt, drift, at_ms, ahead, label)
        return following

    def _served(self, drift: Drift, appliance_id: str) -> ServedRule | None:
        kind = (drift.incident_type, drift.platform)
        if self._serving is None:
            return self._standing.get(kind)
        found = self._serving(appliance_id).get(kind)
        if found is None and drift.rule is not None and not drift.rule.registered:
            return self._standing.get(kind)  # the registry does not know it, so no manifest could withdraw it
        return found

    def _outcome(
        self,
        stream: _Stream,
        drift: Drift,
        served: ServedRule | None,
        u: tuple[float, ...],
        day: float,
        place: tuple[int, str],
        *,
        other: bool,
        capable: bool,
    ) -> tuple[str, bool]:
        """Return what really becomes of an attempt, and whether its last report calls it a success."""
        if stream.synthetic:
            rate = drift.synthetic.success_rate if drift.synthetic else 0.0
            return "synthetic", u[2] < rate
        if not capable:
            return "agent_unsupported", False
        if place in self._dead:
            return "unreachable", False
        limit = self.scenario.fleet.flap_suppression_after
        if place in self._flapping and limit is not None and stream.came_back >= limit:
            return "suppressed", False
        excluded, passed = u[3], 0.0
        for name in ("unreachable", "not_applicable", "escalated", "suppressed"):
            passed += getattr(drift.exclusions, name)
            if excluded < passed:
                return name, False
        extra = uniforms(f"{self._label(stream)}|{stream.number}|outcome")
        if u[2] >= self._rate(stream, drift, served, day, other=other):
            return "failure", extra[0] < drift.silent_failure_rate
        return ("unverified", True) if extra[1] < drift.unverified_rate else ("success", True)

    def _rate(self, stream: _Stream, drift: Drift, served: ServedRule | None, day: float, *, other: bool) -> float:
        share = stream.site / self.scenario.fleet.sites
        rule = drift.rule
        if served is not None and served.runbook.upper().startswith(_PLACEHOLDERS):
            return 0.0  # there is no script
        if served is not None and rule is not None and served.rule_id == rule.rule_id:
            base = drift.success_rate if rule.success_rate is None else rule.success_rate
            return rate_at(base, rule.changes, day, share)
        if other and drift.otherwise is not None:
            forced = served is not None and served.runbook == drift.runbook
            return drift.otherwise.forced_success_rate if forced else drift.otherwise.success_rate
        if share < drift.failing_sites_share:
            return drift.failing_sites_rate
        return rate_at(drift.success_rate, drift.changes, day, share)

    # ------------------------------------------------------------------------------------------------ its reports

    def _report(self, attempt: Attempt, drift: Drift, at_ms: int, ahead_ms: int, label: str) -> None:
        """Send what the agent reports of an attempt, as the network lets it through."""
        transport = self.scenario.transport
        v = uniforms(f"{label}|{attempt.execution_id}|report")
        reported = at_ms + attempt.duration_ms + 1000 + int(4000 * v[0])
        versions = [(reported, attempt, "first")]
        flip = drift.late_flip
        if flip is not None and attempt.outcome == "failure" and not attempt.reported_success and v[1] < flip.share:
            hasty = replace(attempt, outcome="success", reported_success=True)
            later = reported + int(flip.hours * HOUR_MS)
            versions = [(reported, hasty, "first"), (later, attempt, "correction")]
            self.truth.corrections += 1
        for at, version, kind in versions:
            arrives = at + 200 + int(800 * v[2])
            waits = self._outage_end(attempt.appliance_id, arrives)
            if waits is not None:
                arrives = waits + int(60_000 * v[3])
            elif v[4] < transport.late:
                arrives += int(transport.late_hours * HOUR_MS * v[3])
            late = arrives - at > 60_000
            self.truth.late += late
            make = partial(Delivery, execution_id=attempt.execution_id, appliance_id=attempt.appliance_id, late=late)
            body = reports.encode(reports.post_of(version, at + ahead_ms))
            self._send(make(arrives, body, kind=kind))
            if v[5] < transport.duplicates:
                self.truth.duplicates += 1
                self._send(make(arrives + int(6 * HOUR_MS * v[6]), body, kind="duplicate"))
        if v[7] < transport.bad_payloads:
            code, body = reports.malformed(attempt, reported + ahead_ms, self._bad)
            self._bad += 1
            self._send(
                Delivery(
                    reported + 1000,
                    body,
                    f"{attempt.execution_id}-malformed",
                    attempt.appliance_id,
                    "invalid",
                    False,
                    code,
                )
            )

    def _outage_end(self, appliance_id: str, at_ms: int) -> int | None:
        for outage in self.scenario.transport.outages:
            begins = self.begin_ms + outage.day * DAY_MS + int(outage.hour * HOUR_MS)
            ends = begins + int(outage.hours * HOUR_MS)
            if begins <= at_ms < ends and uniforms(f"{self.seed}|outage|{outage.day}|{appliance_id}")[0] < outage.share:
                return ends
        return None


def _gap(u: float, per_day: float) -> float:
    """Return an exponential waiting time in milliseconds, from a number in [0, 1)."""
    return -math.log1p(-u) / per_day * DAY_MS


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))
