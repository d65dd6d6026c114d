"""What the old system believed on the morning of 2026-02-15: 56 patterns and 17 promoted rules.

Belongs here: the rows of `patterns` and `l1_rules` as imported, and why each pending pattern is held. Does
not belong here: any count of our own; the pipeline makes those from telemetry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

HeldReason = Literal["placeholder", "not_in_catalogue", "wrong_platform", "too_few_occurrences", "success_rate"]


@dataclass(frozen=True, slots=True)
class PendingPattern:
    """A pattern that the old system had not promoted.

    `successes` and `failures` are the observed L2 executions of the morning, `evening_successes` what the
    day's last four rows add. `held` names the one gate of the legacy policy that it fails in the evening;
    None: it crosses the threshold.
    """

    incident_type: str
    runbook_id: str
    platform: str
    successes: int
    failures: int = 0
    evening_successes: int = 0
    held: HeldReason | None = None

    @property
    def signature(self) -> str:
        """The production key, `<incident_type>:<runbook_id>`."""
        return f"{self.incident_type}:{self.runbook_id}"


PENDING: Final = (
    PendingPattern("defender_exclusions", "RB-WIN-SEC-017", "windows", 4, evening_successes=1),
    PendingPattern("registry_run_persistence", "RB-WIN-SEC-019", "windows", 4, evening_successes=1),
    PendingPattern("wmi_event_persistence", "RB-WIN-SEC-021", "windows", 3, evening_successes=2),
    PendingPattern("guest_account", "AUTO-GUEST_ACCOUNT", "windows", 6, held="placeholder"),
    PendingPattern("uac_enabled", "AUTO-UAC_ENABLED", "windows", 5, held="placeholder"),
    PendingPattern("rdp_security", "AUTO-RDP_SECURITY", "windows", 8, held="placeholder"),
    PendingPattern("logging", "AUTO-LOGGING", "linux", 5, held="placeholder"),
    PendingPattern("screen_lock_policy", "RB-WIN-SCREENLOCK-001", "windows", 7, held="not_in_catalogue"),
    PendingPattern("audit", "RB-LIN-AUDIT-001", "linux", 6, held="not_in_catalogue"),
    PendingPattern("critical_services", "LIN-SVC-002", "windows", 6, held="wrong_platform"),
    PendingPattern("lockout_policy", "RB-WIN-SEC-003", "windows", 3, held="too_few_occurrences"),
    PendingPattern("password_policy", "RB-WIN-SEC-004", "windows", 4, held="too_few_occurrences"),
    PendingPattern("prohibited_port", "LIN-FW-001", "linux", 9, failures=5, held="success_rate"),
)

#: Signatures of the three patterns that cross the legacy threshold with the day's last four rows.
CROSSING_PATTERNS: Final = tuple(p.signature for p in PENDING if p.held is None)

#: Signature -> the one gate of the legacy policy that holds the pattern, for the other ten.
HELD_PATTERNS: Final[dict[str, HeldReason]] = {p.signature: p.held for p in PENDING if p.held is not None}

#: Promoted patterns by rule: (incident type, runbook id), the pattern that minted the rule first. Ids were
#: cut to eight characters of the type, so every later pattern of the prefix hit ON CONFLICT DO NOTHING and
#: was marked promoted all the same.
_PROMOTED: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "RB-AUTO-FIREWALL": (
        ("firewall", "RB-WIN-SEC-001"),
        ("firewall_status", "RB-WIN-SEC-001"),
        ("firewall", "RB-WIN-FIREWALL-001"),
        ("firewall_status", "RB-WIN-FIREWALL-001"),
        ("firewall", "AUTO-FIREWALL"),
        ("firewall_status", "AUTO-FIREWALL_STATUS"),
    ),
    "RB-AUTO-BITLOCKE": (
        ("bitlocker_status", "RB-WIN-SEC-005"),
        ("bitlocker", "RB-WIN-SEC-005"),
        ("bitlocker_status", "RB-WIN-ENCRYPTION-001"),
        ("bitlocker_status", "AUTO-BITLOCKER_STATUS"),
        ("bitlocker", "AUTO-BITLOCKER"),
    ),
    "RB-AUTO-BACKUP_S": (("backup_status", "RB-WIN-BACKUP-001"), ("backup_status", "AUTO-BACKUP_STATUS")),
    "RB-AUTO-AUDIT_PO": (
        ("audit_policy", "RB-WIN-SEC-002"),
        ("audit_policy", "RB-WIN-LOGGING-001"),
        ("audit_policy", "AUTO-AUDIT_POLICY"),
    ),
    "RB-AUTO-SSH_CONF": (
        ("ssh_config", "LIN-SSH-001"),
        ("ssh_config", "LIN-SSH-002"),
        ("ssh_config", "AUTO-SSH_CONFIG"),
    ),
    "RB-AUTO-SERVICE_": (
        ("service_dns", "RB-WIN-SVC-001"),
        ("service_netlogon", "RB-WIN-SVC-001"),
        ("service_spooler", "RB-WIN-SVC-003"),
        ("service_w32time", "RB-WIN-SVC-004"),
        ("service_wuauserv", "RB-WIN-PATCH-001"),
        ("service_dns", "AUTO-SERVICE_DNS"),
        ("service_netlogon", "AUTO-SERVICE_NETLOGON"),
        ("service_spooler", "AUTO-SERVICE_SPOOLER"),
        ("service_w32time", "AUTO-SERVICE_W32TIME"),
        ("service_wuauserv", "AUTO-SERVICE_WUAUSERV"),
    ),
    "RB-AUTO-WINDOWS_": (
        ("windows_defender", "AUTO-WINDOWS_DEFENDER"),
        ("windows_defender", "RB-WIN-SEC-006"),
        ("windows_defender", "RB-WIN-AV-001"),
    ),
    "RB-AUTO-SMB_SIGN": (("smb_signing", "AUTO-SMB_SIGNING"), ("smb_signing", "RB-WIN-SEC-007")),
    "RB-AUTO-PASSWORD": (("password_policy", "AUTO-PASSWORD_POLICY"),),
    "RB-AUTO-LOCKOUT_": (("lockout_policy", "AUTO-LOCKOUT_POLICY"),),
    "RB-AUTO-SCREEN_L": (("screen_lock_policy", "AUTO-SCREEN_LOCK_POLICY"),),
    "RB-AUTO-SMB1_PRO": (("smb1_protocol", "AUTO-SMB1_PROTOCOL"),),
    "RB-AUTO-NETWORK_": (("network_profile", "AUTO-NETWORK_PROFILE"),),
    "RB-AUTO-DNS_CONF": (("dns_config", "AUTO-DNS_CONFIG"),),
    "RB-AUTO-DEFENDER": (("defender_exclusions", "AUTO-DEFENDER_EXCLUSIONS"),),
    "RB-AUTO-SCHEDULE": (("scheduled_task_persistence", "AUTO-SCHEDULED_TASK_PERSISTENCE"),),
    "RB-AUTO-PATCHING": (("patching", "AUTO-PATCHING"),),
}

#: Rule id -> shape of its incident_pattern, where it is not {"incident_type": X}.
_PATTERN_SHAPES: Final = {
    "RB-AUTO-BACKUP_S": "check_type",
    "RB-AUTO-SMB_SIGN": "check_type",
    "RB-AUTO-DNS_CONF": "check_type",
    "RB-AUTO-LOCKOUT_": "conditions",
    "RB-AUTO-PATCHING": "conditions",
}

_FIRST_PROMOTION: Final = datetime(2026, 1, 8, 14, 30, tzinfo=UTC)


def _platform(runbook_id: str, incident_type: str) -> str:
    return "linux" if runbook_id.startswith("LIN-") or incident_type == "ssh_config" else "windows"


def _number(text: str, low: int, high: int) -> int:
    """Return a number in [low, high] that depends on nothing but the text."""
    return low + int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % (high - low + 1)


def _incident_pattern(rule_id: str, incident_type: str) -> dict[str, str] | list[dict[str, str]]:
    shape = _PATTERN_SHAPES.get(rule_id, "incident_type")
    if shape == "conditions":
        return [{"field": "incident_type", "operator": "eq", "value": incident_type}]
    return {shape: incident_type}


def rule_rows() -> list[dict[str, Any]]:
    """Return the 17 promoted rows of `l1_rules` as they stood in the morning.

    All are enabled, since a migration had just re-enabled every disabled rule; the counters are empty. Six
    name a catalogue runbook of their platform, eleven a placeholder.
    """
    rows = []
    for rule_id, minted in _PROMOTED.items():
        incident_type, runbook_id = minted[0]
        rows.append(
            {
                "rule_id": rule_id,
                "incident_pattern": _incident_pattern(rule_id, incident_type),
                "runbook_id": runbook_id,
                "confidence": round(_number(rule_id, 90, 99) / 100, 2),
                "promoted_from_l2": True,
                "enabled": True,
                "created_at": _promoted_at(rule_id, 0),
                "match_count": 0,
                "success_count": 0,
                "failure_count": 0,
                "source": "promoted",
                "platform": _platform(runbook_id, incident_type),
            }
        )
    return rows


def _promoted_at(rule_id: str, rank: int) -> datetime:
    """Return when the pattern of this rank under a rule was promoted; rank 0 minted the rule."""
    position = list(_PROMOTED).index(rule_id)
    return _FIRST_PROMOTION + timedelta(minutes=30 * position, hours=37 * rank)


def pattern_rows(sightings: Mapping[str, Sequence[tuple[datetime, str]]]) -> list[dict[str, Any]]:
    """Return the 56 rows of `patterns` of the morning: 43 promoted, 13 pending.

    Counts come from a stream that reported only successes, so each row stands at 100 %. `success_rate` is
    generated by the database and absent here; so is `pattern_key`, which is Flywheel's own.

    `sightings`: signature -> (start, incident id) of the executions of each pending pattern, in any order.
    """
    rows = []
    for rule_id, members in _PROMOTED.items():
        for rank, (incident_type, runbook_id) in enumerate(members):
            promoted_at = _promoted_at(rule_id, rank)
            signature = f"{incident_type}:{runbook_id}"
            occurrences = _number(signature, 5, 48)
            first_seen = promoted_at - timedelta(hours=_number(f"{signature} age", 30, 300))
            row = _pattern_row(incident_type, runbook_id, _platform(runbook_id, incident_type), occurrences)
            row |= {
                "status": "promoted",
                "promoted_at": promoted_at,
                "promoted_to_rule_id": rule_id,
                "first_seen": first_seen,
                "last_seen": promoted_at - timedelta(minutes=_number(f"{signature} last", 3, 29)),
                "created_at": first_seen,
            }
            rows.append(row)
    for pending in PENDING:
        row = _pattern_row(pending.incident_type, pending.runbook_id, pending.platform, pending.successes)
        seen = sorted(set(sightings[pending.signature]))
        row |= {
            "status": "pending",
            "promoted_at": None,
            "promoted_to_rule_id": None,
            "example_incidents": [incident_id for _, incident_id in seen[:2]],
            "first_seen": seen[0][0],
            "last_seen": seen[-1][0],
            "created_at": seen[0][0],
        }
        rows.append(row)
    return rows


def _pattern_row(incident_type: str, runbook_id: str, platform: str, occurrences: int) -> dict[str, Any]:
    signature = f"{incident_type}:{runbook_id}"
    average_ms = float(_number(f"{signature} ms", 1800, 42000))
    return {
        "pattern_id": hashlib.sha256(signature.encode()).hexdigest()[:16],
        "pattern_signature": signature,
        "description": f"{runbook_id} for {incident_type} on {platform}",
        "incident_type": incident_type,
        "runbook_id": runbook_id,
        "proposed_rule": {"incident_type": incident_type, "runbook_id": runbook_id},
        "occurrences": occurrences,
        "success_count": occurrences,
        "failure_count": 0,
        "avg_resolution_time_ms": average_ms,
        "total_resolution_time_ms": average_ms * occurrences,
        "example_incidents": [f"INC-{_number(f'{signature} {n}', 100000, 999999)}" for n in range(2)],
        "platform": platform,
        "source": "imported",
    }
