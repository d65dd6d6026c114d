"""The replay of 2026-02-15: all that the pipeline needs to live that day again, from morning to evening.

Belongs here: the assembled replay, its golden figures and its NDJSON form. Does not belong here: loading it
into a database (the ordinary intake does that) or judging it (the pipeline does).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from flywheel_pipeline.simulation.replay_fleet import EVENING_AS_OF, MORNING_AS_OF, appliance_rows, site_rows
from flywheel_pipeline.simulation.replay_patterns import (
    CROSSING_PATTERNS,
    HELD_PATTERNS,
    pattern_rows,
    rule_rows,
)
from flywheel_pipeline.simulation.replay_telemetry import Post, build_telemetry

__all__ = [
    "CROSSING_PATTERNS",
    "EVENING_AS_OF",
    "GOLDEN",
    "GOLDEN_MORNING",
    "HELD_PATTERNS",
    "MORNING_AS_OF",
    "Replay",
    "build_replay",
    "write_ndjson",
]

_TOP_RULES: Final = [
    {"rule_id": "RB-AUTO-BITLOCKE", "matches": 3057, "successes": 917, "failures": 2140},
    {"rule_id": "RB-AUTO-BACKUP_S", "matches": 260, "successes": 146, "failures": 114},
    {"rule_id": "RB-AUTO-FIREWALL", "matches": 166, "successes": 166, "failures": 0},
    {"rule_id": "RB-AUTO-AUDIT_PO", "matches": 24, "successes": 16, "failures": 8},
    {"rule_id": "RB-AUTO-SSH_CONF", "matches": 20, "successes": 20, "failures": 0},
]

#: The golden table in the evening, in the form of `flywheel status --json`. `l1_promoted` and `l1_builtin`
#: split the L1 rows by the source of their rule; top rules stand by matches, their rate is raw successes /
#: matches.
GOLDEN: Final[dict[str, Any]] = {
    "telemetry": {
        "rows": 13_135,
        "l1": 12_221,
        "not_l1": 914,
        "successful": 8_745,
        "unresolved": 0,
        "l1_promoted": 3_527,
        "l1_builtin": 8_694,
    },
    "patterns": {"total": 56, "promoted": 46, "pending": 10, "rejected": 0},
    "rules": {"promoted": 20, "enabled": 9, "quarantined": 11, "builtin": 21},
    "top_rules": _TOP_RULES,
    "builtin_rules": [
        {"rule_id": "L1-LIN-CRYPTO-001", "matches": 729, "successes": 0, "failures": 729},
        {"rule_id": "L1-SSH-001", "matches": 566, "successes": 447, "failures": 119},
        {"rule_id": "L1-SUID-001", "matches": 756, "successes": 381, "failures": 375},
        {"rule_id": "L1-LIN-SVC-001", "matches": 328, "successes": 199, "failures": 129},
    ],
}

#: The same in the morning, before any decision: all 17 rules stand enabled.
GOLDEN_MORNING: Final[dict[str, Any]] = {
    **GOLDEN,
    "telemetry": {**GOLDEN["telemetry"], "rows": 13_131, "not_l1": 910, "successful": 8_741},
    "patterns": {"total": 56, "promoted": 43, "pending": 13, "rejected": 0},
    "rules": {"promoted": 17, "enabled": 17, "quarantined": 0, "builtin": 21},
}


@dataclass(frozen=True, slots=True)
class Replay:
    """The day of 2026-02-15 as rows and posts.

    `sites`, `appliances`, `patterns`, `rules` and `evidence_bundles` are rows of the tables of those names
    (`rules`: of `l1_rules`), generated columns left out. Posts are in the agents' format and in order of
    arrival; an execution_id may come several times, and the version with the latest reported_at holds.
    """

    morning_as_of: datetime
    evening_as_of: datetime
    sites: list[dict[str, Any]]
    appliances: list[dict[str, Any]]
    patterns: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    evidence_bundles: list[dict[str, Any]]
    morning_posts: list[Post]
    evening_posts: list[Post]


def build_replay() -> Replay:
    """Build the replay. Deterministic: no clock, no database, no network; two builds are equal."""
    telemetry = build_telemetry()
    sightings: dict[str, list[tuple[datetime, str]]] = {}
    for post in telemetry.morning_posts:
        execution = post["execution"]
        signature = execution.get("pattern_signature")
        if signature is not None:
            seen = (datetime.fromisoformat(execution["started_at"]), execution["incident_id"])
            sightings.setdefault(signature, []).append(seen)
    return Replay(
        morning_as_of=MORNING_AS_OF,
        evening_as_of=EVENING_AS_OF,
        sites=site_rows(),
        appliances=appliance_rows(),
        patterns=pattern_rows(sightings),
        rules=rule_rows(),
        evidence_bundles=telemetry.evidence_bundles,
        morning_posts=telemetry.morning_posts,
        evening_posts=telemetry.evening_posts,
    )


def write_ndjson(path: Path, posts: Iterable[Mapping[str, Any]]) -> int:
    """Write posts as NDJSON, one post a line in UTF-8; return how many. An existing file is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for post in posts:
            file.write(json.dumps(post, ensure_ascii=False, separators=(",", ":")))
            file.write("\n")
            count += 1
    return count
