"""The aggregates computed a second time, in plain Python over the raw rows, sharing nothing with the SQL models.

Belongs here: what every table of the refresh must hold, written for reading and not for speed. Does not belong here:
writing rows, and any import from the models.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

Row = Mapping[str, Any]
Table = dict[tuple[Any, ...], dict[str, Any]]

CLASSES = ["synthetic", "agent_unsupported", "not_applicable", "unreachable", "escalated", "suppressed"]
SHOWN = ["agent_unsupported", "not_applicable", "unreachable", "escalated", "suppressed", "unverified"]
ADDITIVE = ["executions", "raw_successes", "raw_failures", "synthetic", *SHOWN, "failures", "successes", "refired"]
DAY = dt.timedelta(days=1)


def _like(pattern: str, text: str) -> bool:
    """ILIKE for patterns without a backslash."""
    parts = [".*" if c == "%" else "." if c == "_" else re.escape(c) for c in pattern]
    return re.fullmatch("".join(parts), text, re.IGNORECASE | re.DOTALL) is not None


def _level(row: Row) -> str:
    said = (row["resolution_level"] or "").strip(" ").upper()
    if said in ("L1", "L2", "L3"):
        return said
    if row["rule_id"] or row["runbook_id"].startswith(("L1-", "RB-AUTO-")):
        return "L1"
    return "L2" if row["runbook_id"].startswith("L2-") else "unknown"


def _action_runbook(action: str | None) -> str | None:
    found = re.fullmatch(r"run_(?:windows_|linux_|macos_)?runbook:(.+)", action or "")
    return found[1] if found else None


def _runbook(row: Row, level: str) -> str:
    ran = _action_runbook(row["action"])
    if ran is not None:
        return ran
    if level == "L1" and (row["rule_id"] or "") in ("", row["runbook_id"]):
        return ""
    if row["runbook_id"].startswith("L2-"):
        return _action_runbook(row["runbook_id"][3:]) or str(row["runbook_id"])
    return str(row["runbook_id"])


def _through(aliases: Iterable[Row], name: str, at: dt.datetime, target: str) -> str:
    for alias in aliases:
        begun = alias["valid_from"] is None or alias["valid_from"] <= at
        if alias["alias"] == name and begun and (alias["valid_to"] is None or at < alias["valid_to"]):
            return str(alias[target])
    return name


def _outcome_class(row: Row, class_rules: list[Row]) -> str:
    if row["chaos_campaign_id"] is not None or (row["tags"] or {}).get("synthetic") is True:
        return "synthetic"
    matching = [r["outcome_class"] for r in class_rules if r["enabled"] and _like(r["pattern"], row[r["field"]] or "")]
    if matching:
        return str(min(matching, key=CLASSES.index))
    if not row["success"] or row["verification_passed"] is False:
        return "failure"
    return "unverified" if row["verification_passed"] is None else "success"


def _problem(row: Row) -> str | None:
    at, arrived = row["event_at"], row["created_at"]
    if at > arrived + dt.timedelta(minutes=10) or at < arrived - dt.timedelta(days=730):
        return "skewed_clock"
    if any(not row[name].strip(" ") for name in ("execution_id", "site_id", "hostname", "runbook_id")):
        return "blank_identity"
    if _level(row) == "unknown":
        return "unknown_level"
    ends_early = row["completed_at"] and row["started_at"] and row["completed_at"] < row["started_at"]
    if (row["duration_seconds"] or 0) < 0 or ends_early:
        return "bad_duration"
    if row["status"] == ("failure" if row["success"] else "success"):
        return "contradiction"
    return None


def _read(row: Row, rule_aliases: list[Row], site_aliases: list[Row], class_rules: list[Row]) -> dict[str, Any]:
    level, at = _level(row), row["event_at"]
    named = (row["rule_id"] or row["runbook_id"]) if level == "L1" else ""
    return {
        "execution_id": row["execution_id"],
        "site_id": _through(site_aliases, row["site_id"], at, "site_id"),
        "day": at.astimezone(dt.UTC).date(),
        "level": level,
        "rule_id": _through(rule_aliases, named, at, "rule_id"),
        "incident_type": row["incident_type"] or "unknown",
        "runbook_id": _runbook(row, level),
        "platform": (row["platform"] or "").lower() or "unknown",
        "hostname": row["hostname"],
        "agent_version": "unknown" if row["agent_version"] is None else row["agent_version"],
        "event_at": at,
        "created_at": row["created_at"],
        "success": row["success"],
        "class": _outcome_class(row, class_rules),
        "problem": _problem(row),
    }


def _grouped(rows: Iterable[dict[str, Any]], key: list[str]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in key)].append(row)
    return groups


def _episodes(executions: list[dict[str, Any]]) -> Table:
    drifts = _grouped((e for e in executions if e["class"] != "synthetic"), ["site_id", "hostname", "incident_type"])
    key = ["site_id", "day", "level", "rule_id", "incident_type", "runbook_id", "platform", "hostname"]
    table: Table = {}
    for values, rows in _grouped(executions, key).items():
        for row in rows:
            others = drifts.get((row["site_id"], row["hostname"], row["incident_type"]), [])
            row["came_back"] = any(row["event_at"] < o["event_at"] <= row["event_at"] + DAY for o in others)
        counted = [r for r in rows if r["class"] != "synthetic"]
        rated = [r for r in counted if r["class"] in ("success", "failure")]
        refired = [r for r in rated if r["class"] == "success" and r["came_back"]]
        last = max(rated, key=lambda r: (r["event_at"], r["execution_id"]), default=None)
        healed = not refired and last is not None and last["class"] == "success"
        table[values] = {
            "first_at": min((r["event_at"] for r in counted), default=None),
            "last_at": max((r["event_at"] for r in counted), default=None),
            "executions": len(counted),
            "raw_successes": sum(r["success"] for r in counted),
            "raw_failures": sum(not r["success"] for r in counted),
            "synthetic": len(rows) - len(counted),
            **{name: sum(r["class"] == name for r in rows) for name in SHOWN},
            "failures": sum(r["class"] == "failure" for r in rows),
            "successes": sum(r["class"] == "success" for r in rows),
            "refired": len(refired),
            "outcome": "unrated" if last is None else "success" if healed else "failure",
            "agent_version": "unknown" if last is None else last["agent_version"],
            **dict(zip(key, values, strict=True)),
        }
    return table


def _pattern_key(row: Row) -> str:
    parts = (row["incident_type"], row["runbook_id"], row["platform"])
    return "~".join(part.replace("%", "%25").replace("~", "%7E") for part in parts)


def _rolled_up(episodes: Table, level: str, key: list[str], also: list[str]) -> Table:
    rows = [{**e, "pattern_key": _pattern_key(e)} for e in episodes.values() if e["level"] == level]
    return {
        values: {
            **{name: sum(e[name] for e in group) for name in ADDITIVE},
            "episodes": sum(e["executions"] > 0 for e in group),
            "rated_episodes": sum(e["outcome"] != "unrated" for e in group),
            "successful_episodes": sum(e["outcome"] == "success" for e in group),
            "first_at": min((e["first_at"] for e in group if e["first_at"]), default=None),
            "last_at": max((e["last_at"] for e in group if e["last_at"]), default=None),
            **{name: group[0][name] for name in also},
        }
        for values, group in _grouped(rows, key).items()
    }


KEYS = {
    "episodes": ["site_id", "day", "level", "rule_id", "incident_type", "runbook_id", "platform", "hostname"],
    "rule_daily_stats": ["site_id", "day", "rule_id"],
    "rule_site_stats": ["site_id", "rule_id"],
    "pattern_daily_stats": ["site_id", "day", "pattern_key"],
    "pattern_site_stats": ["site_id", "pattern_key"],
    "telemetry_daily_volume": ["site_id", "day", "level", "agent_version"],
    "telemetry_violations": ["site_id", "day", "execution_id"],
    "l1_rules": ["rule_id"],
}


def expected(connection: sa.Connection, *, sites: Sequence[str] | None = None) -> dict[str, Table]:
    """Compute every table of the refresh from the raw rows, the aliases and the class rules.

    `sites` reads the rows of these sites only (none of them an alias): then only tables of sites are of use.
    """

    def rows(query: str, **values: Any) -> list[Row]:
        return list(connection.execute(sa.text(query), values).mappings())

    bounds = "CASE WHEN isfinite(valid_from) THEN valid_from END AS valid_from, CASE WHEN isfinite(valid_to) THEN valid_to END AS valid_to"
    rule_aliases = rows(f"SELECT alias, rule_id, {bounds} FROM rule_aliases")
    site_aliases = rows(f"SELECT alias, site_id, {bounds} FROM site_aliases")
    class_rules = rows("SELECT * FROM outcome_class_rules")
    some = "" if sites is None else " WHERE site_id = ANY (:sites)"
    raw = rows(f"SELECT * FROM execution_telemetry{some}", **({} if sites is None else {"sites": list(sites)}))
    read = [_read(row, rule_aliases, site_aliases, class_rules) for row in raw]
    executions = [e for e in read if e["problem"] != "skewed_clock"]
    episodes = _episodes(executions)
    pattern = ["incident_type", "runbook_id", "platform"]
    volume = _grouped(executions, KEYS["telemetry_daily_volume"])
    counted = _grouped((e for e in executions if e["level"] == "L1" and e["class"] != "synthetic"), ["rule_id"])
    return {
        "episodes": {k: {c: v for c, v in row.items() if c not in KEYS["episodes"]} for k, row in episodes.items()},
        "rule_daily_stats": _rolled_up(episodes, "L1", KEYS["rule_daily_stats"], []),
        "rule_site_stats": _rolled_up(episodes, "L1", KEYS["rule_site_stats"], []),
        "pattern_daily_stats": _rolled_up(episodes, "L2", KEYS["pattern_daily_stats"], pattern),
        "pattern_site_stats": _rolled_up(episodes, "L2", KEYS["pattern_site_stats"], pattern),
        "telemetry_daily_volume": {
            key: {
                "executions": len(group),
                "raw_successes": sum(e["success"] for e in group),
                "synthetic": sum(e["class"] == "synthetic" for e in group),
                "last_event_at": max((e["event_at"] for e in group if e["class"] != "synthetic"), default=None),
                "last_arrival_at": max((e["created_at"] for e in group if e["class"] != "synthetic"), default=None),
            }
            for key, group in volume.items()
        },
        "telemetry_violations": {
            (e["site_id"], e["day"], e["execution_id"]): {"problem": e["problem"], "created_at": e["created_at"]}
            for e in read
            if e["problem"] is not None
        },
        "l1_rules": {
            (row["rule_id"],): {
                "match_count": len(counted.get((row["rule_id"],), [])),
                "success_count": sum(e["success"] for e in counted.get((row["rule_id"],), [])),
                "failure_count": sum(not e["success"] for e in counted.get((row["rule_id"],), [])),
            }
            for row in rows("SELECT rule_id FROM l1_rules")
        },
    }


def stored(connection: sa.Connection, name: str, columns: Iterable[str]) -> Table:
    """Read a table as `expected` gives it, with these value columns."""
    names = list(columns)
    found = connection.execute(sa.text(f"SELECT {', '.join([*KEYS[name], *names])} FROM {name}")).all()
    width = len(KEYS[name])
    return {tuple(row[:width]): dict(zip(names, row[width:], strict=True)) for row in found}


VALUES = {
    **{
        name: [*ADDITIVE, "episodes", "rated_episodes", "successful_episodes", "first_at", "last_at", *also]
        for name, also in {
            "rule_daily_stats": [],
            "rule_site_stats": [],
            "pattern_daily_stats": ["incident_type", "runbook_id", "platform"],
            "pattern_site_stats": ["incident_type", "runbook_id", "platform"],
        }.items()
    },
    "episodes": [*ADDITIVE, "first_at", "last_at", "outcome", "agent_version"],
    "telemetry_daily_volume": ["executions", "raw_successes", "synthetic", "last_event_at", "last_arrival_at"],
    "telemetry_violations": ["problem", "created_at"],
    "l1_rules": ["match_count", "success_count", "failure_count"],
}
