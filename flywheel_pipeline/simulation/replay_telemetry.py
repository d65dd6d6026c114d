"""How the executions of the replay look on the wire: posts in the agents' format, as unreliable as real ones.

Belongs here: ids, times, states and errors of single executions; late, repeated, corrected and disordered
posts. Does not belong here: how many of what (`replay_streams`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from flywheel_pipeline.simulation.replay_fleet import (
    APPLIANCE_OF_SITE,
    FIRST_EVENT,
    HOSTS,
    LAST_EVENT_OF_SITE,
    MORNING_AS_OF,
    OUTAGES_OF_SITE,
    RESOLVER_OF_SITE,
    Host,
    agent_version_at,
    version_number,
)
from flywheel_pipeline.simulation.replay_patterns import PENDING
from flywheel_pipeline.simulation.replay_streams import FAILURES, Portion, Stream, morning_streams

Post = dict[str, Any]

SEED: Final = "flywheel replay 2026-02-15"

#: Every 70th execution was posted again; every fifth of those under a new reported_at.
REPEAT_EVERY: Final = 70
REPEAT_LATER_EVERY: Final = 5

#: Corrected executions: stream and the outcome that holds. Where the second word is False and the third
#: "error", both versions failed and the correction names another error.
CORRECTIONS: Final = (
    ("RB-AUTO-BITLOCKE", True, "outcome"),
    ("RB-AUTO-BITLOCKE", False, "outcome"),
    ("RB-AUTO-BACKUP_S", True, "outcome"),
    ("RB-AUTO-BACKUP_S", False, "outcome"),
    ("RB-AUTO-AUDIT_PO", False, "outcome"),
    ("L1-SSH-001", True, "outcome"),
    ("L1-SUID-001", False, "outcome"),
    ("L1-LIN-SVC-001", False, "error"),
    ("L1-NTP-001", True, "outcome"),
    ("L2 backup_status", True, "outcome"),
    ("L2 prohibited_port:LIN-FW-001", False, "outcome"),
    ("L1-LIN-CRYPTO-001", False, "error"),
)

#: The day's last four executions: pattern signature, host, start.
_EVENING: Final = (
    ("defender_exclusions:RB-WIN-SEC-017", "NVWS02", datetime(2026, 2, 15, 17, 31, 8, tzinfo=UTC)),
    ("registry_run_persistence:RB-WIN-SEC-019", "NVSRV01", datetime(2026, 2, 15, 17, 34, 41, tzinfo=UTC)),
    ("wmi_event_persistence:RB-WIN-SEC-021", "NVWS06", datetime(2026, 2, 15, 17, 36, 27, tzinfo=UTC)),
    ("wmi_event_persistence:RB-WIN-SEC-021", "NVDC01", datetime(2026, 2, 15, 17, 41, 52, tzinfo=UTC)),
)

#: Incident type -> (state with the drift, state without), as the agents report it.
_STATES: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "firewall": (
        {"domain": True, "private": True, "public": False},
        {"domain": True, "private": True, "public": True},
    ),
    "firewall_status": ({"service": "stopped", "profiles_on": 0}, {"service": "running", "profiles_on": 3}),
    "bitlocker_status": (
        {"volume": "C:", "protection_status": 0, "key_protectors": ["Tpm"]},
        {"volume": "C:", "protection_status": 1, "key_protectors": ["Tpm"]},
    ),
    "backup_status": (
        {"last_success_days": 9, "job": "nightly"},
        {"last_success_days": 0, "job": "nightly"},
    ),
    "ssh_config": (
        {"PermitRootLogin": "yes", "PasswordAuthentication": "yes"},
        {"PermitRootLogin": "no", "PasswordAuthentication": "yes"},
    ),
    "audit_policy": (
        {"Logon": "No Auditing", "Policy Change": "Success"},
        {"Logon": "Success and Failure", "Policy Change": "Success and Failure"},
    ),
    "windows_defender": ({"real_time_protection": False}, {"real_time_protection": True}),
    "disk_space": ({"mount": "/", "used_percent": 94}, {"mount": "/", "used_percent": 71}),
    "ntp_sync": ({"synchronised": False, "offset_ms": 4120}, {"synchronised": True, "offset_ms": 3}),
}
_PLAIN_STATES: Final = ({"compliant": False}, {"compliant": True})

_BUNDLED_STREAMS: Final = frozenset({"RB-AUTO-FIREWALL", *(f"L2 {p.signature}" for p in PENDING)})


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Posts in order of arrival, and the evidence bundles that they name."""

    morning_posts: list[Post]
    evening_posts: list[Post]
    evidence_bundles: list[dict[str, Any]]


@dataclass(slots=True)
class _Attempt:
    """One execution and what the network did to its post. `arrival` only orders; no post holds it."""

    stream: str
    site_id: str
    execution: dict[str, Any]
    reported_at: datetime
    arrival: datetime

    def post(self, execution: dict[str, Any] | None = None, reported_at: datetime | None = None) -> Post:
        return {
            "site_id": self.site_id,
            "reported_at": _stamp(reported_at or self.reported_at),
            "execution": dict(self.execution if execution is None else execution),
        }


def _stamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _hex(text: str, length: int) -> str:
    return hashlib.sha256(f"{SEED} {text}".encode()).hexdigest()[:length]


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _events(portion: Portion, rng: random.Random) -> Iterator[tuple[Host, datetime]]:
    """Spread a portion over its hosts and its time; the counts by host differ by one at most."""
    base, extra = divmod(portion.count, len(portion.hosts))
    for position, hostname in enumerate(portion.hosts):
        host = HOSTS[hostname]
        count = base + (position < extra)
        since = portion.since or FIRST_EVENT
        until = min(portion.until or LAST_EVENT_OF_SITE[host.site_id], LAST_EVENT_OF_SITE[host.site_id])
        for n in range(count):
            place = (n + 0.5 + portion.jitter * (rng.random() - 0.5)) / count
            offset_ms = int((until - since) / timedelta(milliseconds=1) * place)
            yield host, since + timedelta(milliseconds=offset_ms)


def _verified(stream: Stream, release: int, rng: random.Random) -> bool | None:
    """Return what the verification of a success says: mostly true, sometimes missing, rarely false."""
    roll = rng.random()
    if stream.always_verified:
        return True
    if roll < (0.22 if release < 31 else 0.05):
        return None
    return roll < 0.9975


def _execution(
    stream: Stream,
    host: Host,
    started: datetime,
    failure_name: str | None,
    serial: int,
    rng: random.Random,
    bundles: list[dict[str, Any]],
) -> tuple[dict[str, Any], datetime]:
    """Build one execution in the agents' format; return it with its completion time."""
    failure = None if failure_name is None else FAILURES[failure_name]
    version = agent_version_at(host.site_id, started)
    release = version_number(version)
    seconds = round(_between(rng, *(stream.seconds if failure is None else failure.seconds)), 3)
    completed = started + timedelta(seconds=seconds)
    drifted, healthy = _STATES.get(stream.incident_type, _PLAIN_STATES)
    name = f"{stream.name} {serial}"

    execution: dict[str, Any] = {
        "execution_id": f"exec-{started:%Y%m%d}-{_hex(name, 16)}",
        "incident_id": f"INC-{started:%Y%m%d}-{_hex(f'incident {name}', 8)}",
    }
    if release >= 44:
        execution["appliance_id"] = APPLIANCE_OF_SITE[host.site_id]
    execution |= _identity(stream, release)
    execution |= {
        "hostname": host.hostname,
        "platform": host.platform,
        "incident_type": stream.incident_type,
        "agent_version": version,
        "started_at": _stamp(started),
        "completed_at": _stamp(completed),
        "duration_seconds": seconds,
        "resolution_level": stream.level,
        "retry_count": 0,
        "state_before": drifted,
    }
    if failure is None:
        verified = _verified(stream, release, rng)
        execution |= {
            "success": True,
            "status": "success",
            "verification_passed": verified,
            "state_after": drifted if verified is False else healthy,
            "error_message": None,
            "failure_type": None,
            "error_step": None,
        }
    else:
        execution |= {
            "success": False,
            "status": failure.status,
            "verification_passed": failure.verified,
            "state_after": drifted if failure.verified is False else None,
            "error_message": failure.message.format(
                host=host.hostname,
                ip=host.ip,
                dns=RESOLVER_OF_SITE[host.site_id],
                runbook=stream.runbook_id,
                incident_type=stream.incident_type,
            ),
            "failure_type": failure.failure_type,
            "error_step": failure.step,
        }
        if failure.manual is not None:
            execution["manual_intervention_needed"] = failure.manual
        if failure_name in ("unauthorized", "refused", "timeout", "host_unknown"):
            execution["retry_count"] = 1 + int(rng.random() * 3)
    execution |= _level_fields(stream, failure is None, rng)
    if failure is None and release >= 31 and stream.name in _BUNDLED_STREAMS:
        bundle = _bundle(execution, host, started, completed, drifted, healthy)
        execution["evidence_bundle_id"] = bundle["bundle_id"]
        bundles.append(bundle)
    return execution, completed


def _identity(stream: Stream, release: int) -> dict[str, Any]:
    """Return what names rule, runbook and action; releases before 1.0.70 put all of it into runbook_id."""
    form = "run_linux_runbook" if stream.platform == "linux" else "run_windows_runbook"
    pseudo = stream.runbook_id.startswith(("AUTO-", "ESC"))
    if release >= 70:
        identity: dict[str, Any] = {"runbook_id": stream.runbook_id}
        if stream.rule_id:
            identity["rule_id"] = stream.rule_id
        identity["action"] = "escalate" if stream.level == "L3" else f"{form}:{stream.runbook_id}"
        if pseudo and stream.level == "L2":
            del identity["action"]  # the report named neither
        return identity
    if stream.level == "L1":
        return {"runbook_id": stream.rule_id}
    return {"runbook_id": stream.runbook_id if pseudo else f"L2-run_runbook:{stream.runbook_id}"}


def _level_fields(stream: Stream, succeeded: bool, rng: random.Random) -> dict[str, Any]:
    """Return the fields that only one level fills: the model's word on L2, the human's on L3."""
    if stream.level == "L1":
        return {"confidence": 1.0}
    if stream.level == "L2":
        return {
            "confidence": round(_between(rng, 0.82, 0.98), 2),
            "cost_usd": round(_between(rng, 0.0006, 0.0021), 6),
            "input_tokens": int(_between(rng, 900, 2100)),
            "output_tokens": int(_between(rng, 90, 320)),
            "pattern_signature": f"{stream.incident_type}:{stream.runbook_id}",
            "reasoning": f"{stream.incident_type} drifted; {stream.runbook_id} restores the baseline.",
        }
    return {
        "manual_intervention_needed": True,
        "human_feedback": "closed by the help desk" if succeeded else "needs a visit: the drive must be encrypted",
    }


def _bundle(
    execution: dict[str, Any],
    host: Host,
    started: datetime,
    completed: datetime,
    drifted: dict[str, Any],
    healthy: dict[str, Any],
) -> dict[str, Any]:
    """Return the row of `evidence_bundles` that proves a healed drift."""
    return {
        "bundle_id": f"CB-{started:%Y-%m-%d}-{_hex('bundle ' + execution['execution_id'], 8)}",
        "appliance_id": APPLIANCE_OF_SITE[host.site_id],
        "incident_id": execution["incident_id"],
        "check_type": execution["incident_type"],
        "outcome": "success",
        "pre_state": drifted,
        "post_state": healthy,
        "actions_taken": [
            {"step": "remediate", "host": host.hostname},
            {"step": "verify", "host": host.hostname},
        ],
        "timestamp_start": started,
        "timestamp_end": completed,
        "created_at": completed + timedelta(seconds=2),
    }


def _reported(site_id: str, completed: datetime, rng: random.Random) -> datetime:
    """Return when the agent managed to post: at once, after an outage, or after retries of <= 55 minutes."""
    delay = _between(rng, 0.4, 20.0)
    for begin, end in OUTAGES_OF_SITE[site_id]:
        if begin <= completed < end:
            return end + timedelta(seconds=round(delay, 3))
    if rng.random() < 0.01:
        delay += _between(rng, 300.0, 3300.0)
    latest = MORNING_AS_OF - timedelta(seconds=30)
    return min(completed + timedelta(seconds=round(delay, 3)), latest)


def build_telemetry() -> Telemetry:
    """Build all posts of the replay and the evidence bundles that they name.

    Deterministic: no clock, and every stream draws from its own seeded source, so a change of one leaves the
    others as they are. Final outcomes (latest reported_at per execution_id) add up to the golden figures.
    """
    bundles: list[dict[str, Any]] = []
    attempts: list[_Attempt] = []
    of_stream: dict[str, list[_Attempt]] = {}
    for stream in morning_streams():
        rng = random.Random(f"{SEED} {stream.name}")  # noqa: S311 - sample data, not a secret
        serial = 0
        mine = of_stream.setdefault(stream.name, [])
        for portion in stream.portions:
            for host, started in _events(portion, rng):
                execution, completed = _execution(stream, host, started, portion.failure, serial, rng, bundles)
                reported = _reported(host.site_id, completed, rng)
                # Four in a hundred overtake each other between the queue and the intake.
                delay = _between(rng, 60.0, 3000.0) if rng.random() < 0.04 else 0.0
                mine.append(
                    _Attempt(stream.name, host.site_id, execution, reported, reported + timedelta(seconds=delay))
                )
                serial += 1
        attempts.extend(mine)

    arrivals = [(attempt.arrival, attempt.post()) for attempt in attempts]
    corrected = _correct(of_stream, arrivals)
    _repeat(attempts, corrected, arrivals)
    arrivals.sort(key=lambda arrival: arrival[0])
    return Telemetry([post for _, post in arrivals], _evening_posts(), bundles)


def _correct(of_stream: dict[str, list[_Attempt]], arrivals: list[tuple[datetime, Post]]) -> set[str]:
    """Give the chosen executions an earlier version with another outcome; return their execution ids.

    The final version keeps its content under a later reported_at. Every third final version arrives before
    the first one, and after every other third the first one is posted once more, unchanged.
    """
    corrected: set[str] = set()
    position_of = {post["execution"]["execution_id"]: n for n, (_, post) in enumerate(arrivals)}
    for number, (stream, succeeded, kind) in enumerate(CORRECTIONS):
        candidates = [a for a in of_stream[stream] if a.execution["success"] is succeeded]
        attempt = candidates[len(candidates) * 2 // 5]
        execution_id = attempt.execution["execution_id"]
        if execution_id in corrected:
            raise ValueError(f"{execution_id} is corrected twice")
        corrected.add(execution_id)
        first = attempt.post(_first_version(attempt.execution, kind))
        final_at = attempt.reported_at + timedelta(minutes=7 + 4 * number)
        final = attempt.post(reported_at=final_at)
        position = position_of[execution_id]
        match number % 3:
            case 0:
                arrivals[position] = (final_at, final)
                arrivals.append((final_at + timedelta(minutes=1), first))
            case 1:
                arrivals[position] = (attempt.reported_at, first)
                arrivals.append((final_at, final))
                arrivals.append((final_at + timedelta(minutes=2), attempt.post(first["execution"])))
            case _:
                arrivals[position] = (attempt.reported_at, first)
                arrivals.append((final_at, final))
    return corrected


def _first_version(final: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return what the agent had reported before it knew better."""
    first = dict(final)
    if final["success"] or kind == "error":
        timeout = FAILURES["timeout"]
        first |= {
            "success": False,
            "status": "failure",
            "verification_passed": None,
            "state_after": None,
            "error_message": timeout.message,
            "failure_type": timeout.failure_type,
            "error_step": timeout.step,
        }
    else:
        healthy = _STATES.get(final["incident_type"], _PLAIN_STATES)[1]
        first |= {
            "success": True,
            "status": "success",
            "verification_passed": None,
            "state_after": healthy,
            "error_message": None,
            "failure_type": None,
            "error_step": None,
        }
    return first


def _repeat(attempts: list[_Attempt], corrected: set[str], arrivals: list[tuple[datetime, Post]]) -> None:
    """Post every 70th execution once more: mostly byte for byte, sometimes under a new reported_at."""
    repeats = 0
    for attempt in attempts[::REPEAT_EVERY]:
        if attempt.execution["execution_id"] in corrected:
            continue
        repeats += 1
        later = attempt.reported_at + timedelta(minutes=3 + repeats % 50)
        renewed = repeats % REPEAT_LATER_EVERY == 0 and later < MORNING_AS_OF
        new_time = later if renewed else attempt.reported_at
        arrivals.append((later, attempt.post(reported_at=new_time)))


def _evening_posts() -> list[Post]:
    """Return the posts of the day's last four executions; their evidence bundles had not arrived yet."""
    by_signature = {pattern.signature: pattern for pattern in PENDING}
    rng = random.Random(f"{SEED} evening")  # noqa: S311 - sample data, not a secret
    posts = []
    for serial, (signature, hostname, started) in enumerate(_EVENING):
        pattern, host = by_signature[signature], HOSTS[hostname]
        stream = Stream(
            f"evening {signature}",
            "L2",
            pattern.incident_type,
            pattern.platform,
            pattern.runbook_id,
            (),
            always_verified=True,
        )
        execution, completed = _execution(stream, host, started, None, serial, rng, [])
        reported = completed + timedelta(seconds=round(_between(rng, 0.4, 20.0), 3))
        posts.append({"site_id": host.site_id, "reported_at": _stamp(reported), "execution": execution})
    return posts
