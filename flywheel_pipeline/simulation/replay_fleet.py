"""The fleet of the replay: two sites, their appliances, hosts and agent releases over time.

Belongs here: who reported, from where, and with which agent release. Does not belong here: what was reported
(`replay_telemetry`) and what had been promoted (`replay_patterns`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

#: Clock of the replay before and after the day's last four executions.
MORNING_AS_OF: Final = datetime(2026, 2, 15, 6, 0, tzinfo=UTC)
EVENING_AS_OF: Final = datetime(2026, 2, 15, 18, 0, tzinfo=UTC)

#: First event of the replay.
FIRST_EVENT: Final = datetime(2026, 1, 10, tzinfo=UTC)

NORTH: Final = "north-valley-dental"
LAKE: Final = "lakeside-family-clinic"

APPLIANCE_OF_SITE: Final = {
    NORTH: f"{NORTH}-84:3A:5B:91:B6:61",
    LAKE: f"{LAKE}-7C:D3:0A:7C:55:18",
}

#: No morning event of a site starts at or after this: the longest execution still ends before the morning's
#: clock. The appliance of Lakeside has been off since the evening before.
LAST_EVENT_OF_SITE: Final = {
    NORTH: datetime(2026, 2, 15, 5, 25, tzinfo=UTC),
    LAKE: datetime(2026, 2, 14, 21, 0, tzinfo=UTC),
}

#: Resolver of each site, as it stands in the agents' error messages.
RESOLVER_OF_SITE: Final = {NORTH: "192.168.88.1:53", LAKE: "10.20.4.1:53"}


def _day(month: int, day: int, hour: int = 0, minute: int = 0) -> datetime:
    return datetime(2026, month, day, hour, minute, tzinfo=UTC)


#: Agent releases by site: (from this time on, release). `run_runbook:` came with 1.0.44-era builds,
#: `run_windows_runbook:` with 1.0.70.
RELEASES_OF_SITE: Final[dict[str, tuple[tuple[datetime, str], ...]]] = {
    NORTH: (
        (_day(1, 1), "1.0.18"),
        (_day(1, 14, 9), "1.0.23"),
        (_day(1, 20, 9), "1.0.31"),
        (_day(1, 26), "1.0.44"),
        (_day(2, 3, 9), "1.0.49"),
        (_day(2, 9, 9), "1.0.56"),
    ),
    LAKE: (
        (_day(1, 1), "1.0.22"),
        (_day(1, 18, 9), "1.0.35"),
        (_day(1, 25), "1.0.46"),
        (_day(2, 5, 9), "1.0.62"),
        (_day(2, 13, 6), "1.0.70"),
        (_day(2, 14, 8), "1.0.74"),
    ),
}

#: Times without a network: what ended in one of them was posted at its end, at most an hour late.
OUTAGES_OF_SITE: Final[dict[str, tuple[tuple[datetime, datetime], ...]]] = {
    NORTH: (
        (_day(1, 15, 13, 5), _day(1, 15, 14, 0)),
        (_day(1, 22, 2, 20), _day(1, 22, 3, 15)),
        (_day(2, 1, 16, 40), _day(2, 1, 17, 30)),
        (_day(2, 11, 8, 10), _day(2, 11, 9, 5)),
    ),
    LAKE: (
        (_day(1, 19, 9, 10), _day(1, 19, 10, 5)),
        (_day(2, 3, 18, 0), _day(2, 3, 18, 50)),
        (_day(2, 10, 22, 30), _day(2, 10, 23, 20)),
    ),
}


@dataclass(frozen=True, slots=True)
class Host:
    """One machine that an appliance watches."""

    hostname: str
    site_id: str
    platform: str
    ip: str
    role: str


def _hosts() -> dict[str, Host]:
    rows = [
        *((f"NVWS0{n}", NORTH, "windows", f"192.168.88.{20 + n}", "workstation") for n in range(1, 7)),
        ("NVDC01", NORTH, "windows", "192.168.88.10", "domain controller"),
        ("NVSRV01", NORTH, "windows", "192.168.88.11", "server"),
        ("NVSRV02", NORTH, "windows", "192.168.88.12", "server"),
        ("NVLAB01", NORTH, "windows", "192.168.88.61", "lab VM without a TPM"),
        ("NVLAB02", NORTH, "windows", "192.168.88.62", "lab VM without a TPM"),
        ("nv-linux-01", NORTH, "linux", "192.168.88.40", "Linux VM"),
        ("nv-backup-01", NORTH, "linux", "192.168.88.41", "backup server"),
        *((f"LFWS0{n}", LAKE, "windows", f"10.20.4.{30 + n}", "workstation") for n in range(1, 7)),
        ("LFDC01", LAKE, "windows", "10.20.4.10", "domain controller"),
        ("LFSRV01", LAKE, "windows", "10.20.4.11", "server"),
        ("LFSRV02", LAKE, "windows", "10.20.4.12", "server"),
        ("lf-linux-01", LAKE, "linux", "10.20.4.50", "Linux VM"),
        ("lf-linux-02", LAKE, "linux", "10.20.4.51", "Linux VM"),
        ("lf-lab-01", LAKE, "linux", "10.20.4.90", "lab VM, switched off in January"),
    ]
    return {row[0]: Host(*row) for row in rows}


HOSTS: Final = _hosts()


def agent_version_at(site_id: str, at: datetime) -> str:
    """Return the agent release of a site's appliance at a time.

    Raises:
        KeyError: the site is not one of the replay's two.
    """
    releases = RELEASES_OF_SITE[site_id]
    version = releases[0][1]
    for since, release in releases:
        if at >= since:
            version = release
    return version


def version_number(agent_version: str) -> int:
    """Return the last part of a `1.0.N` release as a number, to compare releases of the replay."""
    return int(agent_version.rsplit(".", 1)[1])


def site_rows() -> list[dict[str, Any]]:
    """Return the rows of `sites` (two)."""
    return [
        {
            "site_id": NORTH,
            "name": "North Valley Dental",
            "healing_tier": "full_coverage",
            "status": "active",
            "created_at": _day(1, 2, 15),
        },
        {
            "site_id": LAKE,
            "name": "Lakeside Family Clinic",
            "healing_tier": "standard",
            "status": "active",
            "created_at": _day(1, 5, 15),
        },
    ]


def appliance_rows() -> list[dict[str, Any]]:
    """Return the rows of `appliances` (two): one online with 1.0.56, one off since the evening before."""
    return [
        {
            "appliance_id": APPLIANCE_OF_SITE[NORTH],
            "site_id": NORTH,
            "agent_version": agent_version_at(NORTH, MORNING_AS_OF),
            "last_checkin": MORNING_AS_OF - timedelta(minutes=2),
            "status": "online",
            "created_at": _day(1, 2, 16),
        },
        {
            "appliance_id": APPLIANCE_OF_SITE[LAKE],
            "site_id": LAKE,
            "agent_version": agent_version_at(LAKE, MORNING_AS_OF),
            "last_checkin": LAST_EVENT_OF_SITE[LAKE] + timedelta(hours=1),
            "status": "offline",
            "created_at": _day(1, 5, 16),
        },
    ]
