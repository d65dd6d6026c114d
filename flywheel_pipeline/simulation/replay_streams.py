"""What happened in the replay, as numbers: which rule met which outcome on which hosts, how often.

Belongs here: the composition that adds up to the golden figures. Does not belong here: how an execution looks
on the wire (`replay_telemetry`) and who reports it (`replay_fleet`).
"""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import yaml

from flywheel_pipeline.simulation.replay_fleet import HOSTS, NORTH
from flywheel_pipeline.simulation.replay_patterns import PENDING

Level = Literal["L1", "L2", "L3"]


@dataclass(frozen=True, slots=True)
class Failure:
    """One way in which an execution fails, in the agents' own words.

    `message` may use {host}, {ip}, {dns}, {runbook} and {incident_type}. `status` is the agent's word, `step`
    the number of the failing step, `verified` what the verification said (None: it did not run).
    """

    message: str
    failure_type: str | None
    seconds: tuple[float, float]
    status: str = "failure"
    step: int | None = None
    verified: bool | None = None
    manual: bool | None = None


FAILURES: Final = {
    "no_tpm": Failure(
        "A compatible Trusted Platform Module (TPM) Security Device cannot be found on this computer. "
        "(Exception from HRESULT: 0x8028400F)",
        "environment_difference",
        (1.5, 4.0),
        step=1,
    ),
    "edition": Failure(
        "BitLocker Drive Encryption is not available on this edition of Windows (Windows 10 Home)",
        "environment_difference",
        (1.2, 3.0),
        step=1,
    ),
    "not_encrypted": Failure(
        "Drive not encrypted - manual intervention required",
        "runbook_insufficient",
        (2.0, 6.0),
        step=2,
        manual=True,
    ),
    "placeholder": Failure(
        "Runbook not found: AUTO-BITLOCKER_STATUS. Available: [RB-WIN-AV-001 RB-WIN-BACKUP-001 "
        "RB-WIN-SEC-001 RB-WIN-SEC-002 RB-WIN-SEC-005 RB-WIN-SVC-001]",
        "not_found",
        (0.01, 0.05),
    ),
    "no_volumes": Failure("No encryptable volumes found", "environment_difference", (1.5, 4.0), step=1),
    "wmi": Failure(
        "WMI query failed: Invalid namespace root\\cimv2\\Security\\MicrosoftVolumeEncryption",
        "script_error",
        (1.0, 5.0),
        step=1,
    ),
    "protection_off": Failure(
        "ProtectionStatus=0", "runbook_insufficient", (4.0, 14.0), status="partial", step=3, verified=False
    ),
    "verify": Failure(
        "Phase 'verify' failed", "runbook_insufficient", (4.0, 25.0), status="partial", step=3, verified=False
    ),
    "unauthorized": Failure(
        "{runbook} phase remediate failed: create shell: http response error: 401 - invalid content type",
        "auth_failure",
        (0.2, 1.5),
        step=1,
    ),
    "refused": Failure(
        'create shell: Post "http://{ip}:5985/wsman": dial tcp {ip}:5985: connect: connection refused',
        "network_error",
        (0.1, 3.0),
        step=1,
    ),
    "timeout": Failure("Execution timed out after 60s", "timeout", (60.0, 60.4), step=2),
    "unknown_action": Failure("Unknown action: run_windows_runbook:{runbook}", "unknown", (0.001, 0.01)),
    "no_windows_target": Failure("No Windows target available", "not_found", (0.001, 0.02)),
    "no_winrm": Failure("no winrm credentials", "no_credentials", (0.001, 0.02)),
    "no_ssh": Failure("no ssh credentials", "no_credentials", (0.001, 0.02)),
    "linux_target": Failure("Linux target not found: {host}", "not_found", (0.001, 0.02)),
    "host_unknown": Failure(
        "get session: TLS pin check for {host}: dial tcp: lookup {host} on {dns}: no such host",
        "network_error",
        (0.05, 5.0),
    ),
    "flapping": Failure("Persistent flap suppression active for {incident_type}", None, (0.001, 0.01)),
    "backup_store": Failure(
        "The backup storage location is not available. (0x80780119)",
        "external_dependency",
        (20.0, 90.0),
        step=2,
    ),
}


@dataclass(frozen=True, slots=True)
class Portion:
    """`count` executions of one outcome, spread evenly over hosts and over [since, until).

    `failure` is a key of `FAILURES`; None is a success. `jitter` is the width, in mean gaps of a host, of the
    window in which each execution falls: the shortest gap is 1 - jitter of the mean.
    """

    count: int
    hosts: tuple[str, ...]
    failure: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    jitter: float = 0.8


@dataclass(frozen=True, slots=True)
class Stream:
    """Everything one L1 rule, one L2 choice or one kind of escalation did.

    `rule_id` is empty beyond L1. `always_verified`: no success lacks its verification.
    """

    name: str
    level: Level
    incident_type: str
    platform: str
    runbook_id: str
    portions: tuple[Portion, ...]
    rule_id: str = ""
    always_verified: bool = False
    seconds: tuple[float, float] = (3.0, 35.0)


def _at(month: int, day: int, hour: int = 0) -> datetime:
    return datetime(2026, month, day, hour, tzinfo=UTC)


SERVERS: Final = ("NVDC01", "NVSRV01", "NVSRV02", "LFDC01", "LFSRV01", "LFSRV02")
HEALTHY_WINDOWS: Final = (
    *("NVWS01", "NVWS02", "NVWS03", "NVWS04", "NVWS06"),
    *("LFWS01", "LFWS02", "LFWS03", "LFWS05"),
    *SERVERS,
)
HEALTHY_LINUX: Final = ("nv-linux-01", "nv-backup-01", "lf-linux-01", "lf-linux-02")

#: Where a kind of failure happens: a handful of dead hosts is behind most unreachable rows.
_DEAD_HOSTS: Final = {
    "unauthorized": ("LFWS04",),
    "refused": ("LFWS06",),
    "linux_target": ("lf-lab-01",),
    "host_unknown": ("lf-lab-01",),
    "no_ssh": ("lf-lab-01",),
}

#: L2 came to the sites with the agents that know `run_runbook:`.
_L2_SINCE: Final = _at(1, 26, 12)

#: The pending patterns were seen since then.
_PENDING_SINCE: Final = _at(2, 4)

# Built-in rules: successes, failures, and the kinds of failure by weight. The four rules named in the figures
# of 2026-02-15 come first; the other rows add up to the 8,694 executions that the old counters did not know.
_WINDOWS_KINDS: Final = {
    "unauthorized": 30,
    "refused": 15,
    "verify": 25,
    "timeout": 10,
    "no_windows_target": 8,
    "flapping": 7,
    "no_winrm": 5,
}
_LINUX_KINDS: Final = {
    "verify": 40,
    "linux_target": 20,
    "host_unknown": 12,
    "no_ssh": 13,
    "timeout": 8,
    "flapping": 7,
}
_BUILTIN: Final[dict[str, tuple[int, int, dict[str, int]]]] = {
    "L1-LIN-CRYPTO-001": (0, 729, {"verify": 94, "timeout": 3, "linux_target": 3}),
    "L1-SSH-001": (447, 119, {"linux_target": 45, "host_unknown": 25, "no_ssh": 15, "verify": 15}),
    "L1-SUID-001": (381, 375, {"flapping": 45, "verify": 42, "linux_target": 8, "timeout": 5}),
    "L1-LIN-SVC-001": (199, 129, _LINUX_KINDS),
    "L1-FIREWALL-001": (1240, 38, _WINDOWS_KINDS),
    "L1-FIREWALL-002": (402, 11, _WINDOWS_KINDS),
    "L1-DEFENDER-001": (688, 72, _WINDOWS_KINDS),
    "L1-BITLOCKER-001": (96, 118, {"not_encrypted": 50, "no_volumes": 20, "unauthorized": 20, "verify": 10}),
    "L1-SMB1-001": (158, 21, _WINDOWS_KINDS),
    "L1-SMB-SIGNING-001": (274, 33, _WINDOWS_KINDS),
    "L1-SCREENLOCK-001": (211, 96, {"unknown_action": 62, "unauthorized": 20, "verify": 18}),
    "L1-SVC-DNS-001": (226, 14, _WINDOWS_KINDS),
    "L1-SVC-NETLOGON-001": (187, 23, _WINDOWS_KINDS),
    "L1-PERSIST-TASK-001": (143, 19, _WINDOWS_KINDS),
    "L1-NTP-001": (391, 27, _LINUX_KINDS),
    "L1-SERVICE-001": (318, 41, _LINUX_KINDS),
    "L1-DISK-001": (164, 52, _LINUX_KINDS),
    "L1-LIN-AUDIT-001": (352, 64, _LINUX_KINDS),
    "L1-LIN-KERN-001": (283, 49, _LINUX_KINDS),
    "L1-LIN-CRON-001": (196, 31, _LINUX_KINDS),
    "L1-LIN-FW-001": (225, 52, _LINUX_KINDS),
}

#: Hosts of a built-in rule where it does not run on all healthy hosts of its platform. The hosts of
#: RB-AUTO-FIREWALL and RB-AUTO-SSH_CONF are kept free of other work on their incident type.
_BUILTIN_HOSTS: Final = {
    "L1-FIREWALL-001": ("NVSRV02", "LFSRV02", "NVLAB01", "NVLAB02", "NVDC01"),
    "L1-SSH-001": ("nv-linux-01", "lf-linux-01"),
    "L1-SVC-DNS-001": ("NVDC01", "LFDC01"),
    "L1-DISK-001": ("nv-linux-01", "nv-backup-01", "lf-linux-01"),
}


def split(total: int, weights: dict[str, int]) -> dict[str, int]:
    """Share `total` out by weights, by largest remainder; ties go to the first. The shares add up to it."""
    weight_sum = sum(weights.values())
    shares = {name: total * weight // weight_sum for name, weight in weights.items()}
    rest = total - sum(shares.values())
    by_remainder = sorted(weights, key=lambda name: -(total * weights[name] % weight_sum))
    for name in by_remainder[:rest]:
        shares[name] += 1
    return shares


@functools.cache
def builtin_rules() -> dict[str, tuple[str, str, str]]:
    """Return rule id -> (incident type, platform, runbook id) of the built-in rules, from the seed."""
    seed = importlib.resources.files("flywheel_pipeline.database").joinpath("seeds/builtin_rules.yaml")
    return {
        r["rule_id"]: (r["incident_type"], r["platform"], r["runbook_id"])
        for r in yaml.safe_load(seed.read_text("utf-8"))
    }


def _builtin_streams() -> list[Stream]:
    streams = []
    for rule_id, (successes, failures, kinds) in _BUILTIN.items():
        incident_type, platform, runbook_id = builtin_rules()[rule_id]
        everywhere = HEALTHY_WINDOWS if platform == "windows" else HEALTHY_LINUX
        hosts = _BUILTIN_HOSTS.get(rule_id, everywhere)
        portions = [Portion(successes, hosts)] if successes else []
        for kind, count in split(failures, kinds).items():
            where = _DEAD_HOSTS.get(kind, hosts)
            since: datetime | None = None
            if kind == "unknown_action":  # North still runs agents before 1.0.70
                where = tuple(h for h in everywhere if HOSTS[h].site_id == NORTH)
                since = _at(1, 26)
            if count:
                portions.append(Portion(count, where, kind, since))
        streams.append(Stream(rule_id, "L1", incident_type, platform, runbook_id, tuple(portions), rule_id))
    return streams


def _promoted_streams() -> list[Stream]:
    """Return the five promoted rules with executions: 3,527 rows, 1,265 raw successes."""
    firewall_hosts = ("NVWS01", "NVWS02", "NVWS04", "NVWS06", "LFWS01", "LFWS02", "LFWS03", "LFWS05")
    backup_hosts = ("NVSRV01", "NVDC01", "LFSRV01")
    policy_window = (_at(1, 18), _at(1, 25))
    able = ("NVWS01", "NVWS02", "NVWS03", "NVWS04", "NVWS06", "LFWS01", "LFWS02", "LFWS03", "LFWS05")
    return [
        Stream(
            "RB-AUTO-FIREWALL",
            "L1",
            "firewall",
            "windows",
            "RB-WIN-SEC-001",
            # Eight hosts drift every second day and stay healed for more than a day; NVWS03 flaps.
            (Portion(140, firewall_hosts, jitter=0.45), Portion(26, ("NVWS03",))),
            "RB-AUTO-FIREWALL",
            always_verified=True,
        ),
        Stream(
            "RB-AUTO-SSH_CONF",
            "L1",
            "ssh_config",
            "linux",
            "LIN-SSH-001",
            (Portion(20, ("nv-backup-01", "lf-linux-02")),),
            "RB-AUTO-SSH_CONF",
            always_verified=True,
        ),
        Stream(
            "RB-AUTO-AUDIT_PO",
            "L1",
            "audit_policy",
            "windows",
            "RB-WIN-SEC-002",
            (
                Portion(16, ("NVWS01", "NVWS02", "NVSRV01", "LFWS01", "LFWS02", "LFSRV01", "NVDC01", "LFDC01")),
                # Group policy reverts the fix on these: the runbook's own fault, so under `standard` it is refuted.
                Portion(8, ("NVWS06", "LFWS03", "LFWS04"), "verify"),
            ),
            "RB-AUTO-AUDIT_PO",
        ),
        Stream(
            "RB-AUTO-BACKUP_S",
            "L1",
            "backup_status",
            "windows",
            "RB-WIN-BACKUP-001",
            (
                Portion(146, backup_hosts),
                Portion(50, backup_hosts, "verify"),
                Portion(34, ("NVSRV01",), "backup_store"),
                Portion(20, ("LFSRV01",), "unauthorized"),
                Portion(10, ("NVDC01",), "flapping"),
            ),
            "RB-AUTO-BACKUP_S",
            seconds=(300.0, 1500.0),
        ),
        Stream(
            "RB-AUTO-BITLOCKE",
            "L1",
            "bitlocker_status",
            "windows",
            "RB-WIN-SEC-005",
            (
                Portion(217, able, until=policy_window[0]),
                Portion(700, able, since=policy_window[1]),
                # 1. hosts that cannot do it
                Portion(540, ("NVLAB01", "NVLAB02"), "no_tpm"),
                Portion(220, ("LFWS06",), "edition"),
                # 2. an unencrypted drive: the runbook only resumes a suspended volume
                Portion(520, ("NVWS05", "NVSRV02"), "not_encrypted"),
                # 3. the rule pointed at a placeholder for a week
                Portion(350, able, "placeholder", *policy_window),
                # 4. missing cmdlet or volume
                Portion(90, ("NVLAB02",), "no_volumes"),
                Portion(80, ("LFSRV02",), "wmi"),
                Portion(70, ("NVWS04",), "protection_off"),
                Portion(50, ("LFWS05",), "verify"),
                # 5. unreachable hosts
                Portion(110, ("LFWS04",), "unauthorized"),
                Portion(70, ("LFWS06",), "refused"),
                Portion(40, ("NVSRV02",), "timeout"),
            ),
            "RB-AUTO-BITLOCKE",
        ),
    ]


def _l2_streams() -> list[Stream]:
    """Return the L2 executions of the morning: 895 rows, of which 890 raw successes."""
    streams = [
        Stream(
            "L2 firewall",
            "L2",
            "firewall",
            "windows",
            "RB-WIN-SEC-001",
            (Portion(710, ("NVDC01", "NVSRV01", "LFDC01", "LFSRV01", "NVLAB01"), since=_L2_SINCE),),
        ),
        Stream(
            "L2 backup_status",
            "L2",
            "backup_status",
            "windows",
            "RB-WIN-BACKUP-001",
            (Portion(100, ("LFDC01", "LFSRV02", "NVSRV02"), since=_L2_SINCE),),
            seconds=(300.0, 1500.0),
        ),
        Stream(
            "L2 windows_defender",
            "L2",
            "windows_defender",
            "windows",
            "RB-WIN-SEC-006",
            (Portion(10, ("NVLAB01", "NVLAB02"), since=_L2_SINCE),),
        ),
    ]
    for pattern in PENDING:
        if pattern.platform == "windows":
            hosts: tuple[str, ...] = ("NVWS02", "LFWS02", "NVSRV01", "LFSRV01", "NVWS06")
        else:
            hosts = ("nv-linux-01", "lf-linux-01", "nv-backup-01")
        portions = [Portion(pattern.successes, hosts, since=_PENDING_SINCE, jitter=0.5)]
        if pattern.failures:
            portions.append(Portion(pattern.failures, hosts, "verify", since=_PENDING_SINCE))
        streams.append(
            Stream(
                f"L2 {pattern.signature}",
                "L2",
                pattern.incident_type,
                pattern.platform,
                pattern.runbook_id,
                tuple(portions),
                always_verified=True,
            )
        )
    return streams


def _l3_streams() -> list[Stream]:
    """Return the escalations to a human: 15 rows; the agents called five of them a success."""
    return [
        Stream(
            "L3 bitlocker_status",
            "L3",
            "bitlocker_status",
            "windows",
            "ESCALATE",
            (Portion(10, ("NVWS05", "NVSRV02"), "not_encrypted", since=_L2_SINCE),),
        ),
        Stream(
            "L3 backup_status",
            "L3",
            "backup_status",
            "windows",
            "ESC-BACKUP",
            (Portion(5, ("NVSRV01", "LFSRV01"), since=_L2_SINCE),),
        ),
    ]


def morning_streams() -> list[Stream]:
    """Return all that happened before the day's last four executions: 13,131 rows, 8,741 raw successes."""
    return [*_promoted_streams(), *_builtin_streams(), *_l2_streams(), *_l3_streams()]
