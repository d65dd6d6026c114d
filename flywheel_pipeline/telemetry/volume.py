"""How much telemetry a source sends, held against the same weekday of the last four weeks.

Belongs here: the bound and the question. Does not belong here: whether anything arrived at all (`quality`).
"""

from __future__ import annotations

import datetime as dt
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import sqlalchemy as sa

from flywheel_pipeline.quality import Finding

WEEKS: Final = 4
AT_LEAST_WEEKS: Final = 3
#: Executions a day; below that a source is judged by freshness alone: Poisson noise of 20 is +-9 at 2 sigma.
AT_LEAST: Final = 20
SPREADS: Final = 4.0
#: Nobody wants to be woken for less than half or more than double, however steady a source was.
FACTOR: Final = 2.0
#: A day is judged two hours after its end: agents queue up to 60 minutes.
SETTLED_AFTER: Final = dt.timedelta(hours=2)

Verdict = Literal["usual", "low", "high", "not judged"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The volume that is usual for a source: its median, and what would be too little or too much."""

    median: float
    low: float
    high: float


def usual(history: Sequence[int | None]) -> Bounds | None:
    """Bounds from the same weekday of the weeks before (None: the source did not exist yet); None: too little known.

    Robust: the median of the weeks, so that one outage or one burst among them moves nothing. The spread is that of
    a Poisson count (the root of the median), or of the weeks themselves (1.4826 x the median absolute deviation) where
    they scatter more.
    """
    known = [count for count in history if count is not None]
    if len(known) < AT_LEAST_WEEKS:
        return None
    median = float(statistics.median(known))
    if median < AT_LEAST:
        return None
    deviation = 1.4826 * statistics.median(abs(count - median) for count in known)
    spread = SPREADS * max(math.sqrt(median), deviation)
    return Bounds(median, min(median - spread, median / FACTOR), max(median + spread, median * FACTOR))


def judge(observed: int, history: Sequence[int | None]) -> Verdict:
    """Whether a day's count is usual. Silence of a source that never was silent is low, however wide the bounds are."""
    bounds = usual(history)
    if bounds is None:
        return "not judged"
    if observed < bounds.low or (observed == 0 and min(c for c in history if c is not None) > 0):
        return "low"
    return "high" if observed > bounds.high else "usual"


_BY_SOURCE = """
SELECT CASE WHEN grouping(agent_version) = 0 THEN 'agent' WHEN grouping(site_id) = 0 THEN 'site'
            WHEN grouping(level) = 0 THEN 'tier' ELSE 'fleet' END AS dimension,
  coalesce(level, site_id, agent_version, 'all') AS name,
  min(day) AS first_day, {counts}
FROM telemetry_daily_volume
WHERE executions > synthetic AND day <= :day0
GROUP BY GROUPING SETS ((), (level), (site_id), (agent_version))
"""
_COUNTS = ", ".join(
    f"coalesce(sum(executions - synthetic) FILTER (WHERE day = :day{week}), 0)::bigint AS week{week}"
    for week in range(WEEKS + 1)
)
# Everything that the sites of a release report, whatever release they run today.
_SITES_OF_RELEASES = """
SELECT s.agent_version AS name, {counts}
FROM (
  SELECT DISTINCT agent_version, site_id FROM telemetry_daily_volume
  WHERE agent_version = ANY(:releases) AND day = ANY(:days) AND executions > synthetic
) AS s
JOIN telemetry_daily_volume AS v ON v.site_id = s.site_id AND v.day = ANY(:days)
GROUP BY s.agent_version
"""
_ORDER = ("fleet", "tier", "agent", "site")


def volume_is_usual(connection: sa.Connection, now: dt.datetime) -> Finding:
    """On the last full day each tier, site and agent release sent about as much as on that weekday before.

    A release that falls or rises only because its sites moved between releases is an upgrade: the volume of its sites
    is usual then, and it is counted as such and no offender.
    """
    day = (now - SETTLED_AFTER).astimezone(dt.UTC).date() - dt.timedelta(days=1)
    days = {f"day{week}": day - dt.timedelta(weeks=week) for week in range(WEEKS + 1)}
    found = connection.execute(sa.text(_BY_SOURCE.format(counts=_COUNTS)), days).mappings().all()
    rows = [row for row in found if row["first_day"] is not None]  # the fleet has a row over nothing, too

    def history(row: Any, first_day: dt.date) -> list[int | None]:
        return [
            int(row[f"week{week}"]) if day - dt.timedelta(weeks=week) >= first_day else None
            for week in range(1, WEEKS + 1)
        ]

    judged, unusual = 0, []
    for row in rows:
        past = history(row, row["first_day"])
        verdict = judge(int(row["week0"]), past)
        judged += verdict != "not judged"
        if verdict in ("low", "high"):
            unusual.append((row, verdict, past))
    releases = {row["name"]: row for row, _verdict, _past in unusual if row["dimension"] == "agent"}
    upgraded = set()
    if releases:
        for total in connection.execute(
            sa.text(_SITES_OF_RELEASES.format(counts=_COUNTS)),
            {**days, "releases": list(releases), "days": list(days.values())},
        ).mappings():
            first_day = releases[total["name"]]["first_day"]
            if judge(int(total["week0"]), history(total, first_day)) == "usual":
                upgraded.add(total["name"])
    offenders = []
    for row, verdict, past in unusual:
        if row["dimension"] == "agent" and row["name"] in upgraded:
            continue
        bounds = usual(past)
        offenders.append(
            {
                "source": row["dimension"],
                "name": row["name"],
                "verdict": verdict,
                "executions": int(row["week0"]),
                "usually": bounds.median if bounds else None,
                "same weekday before": ", ".join("-" if count is None else str(count) for count in past),
            }
        )
    offenders.sort(key=lambda o: (_ORDER.index(o["source"]), -abs(o["executions"] - o["usually"]), o["name"]))
    low = sum(o["verdict"] == "low" for o in offenders)
    sentence = f"On {day:%A} {day} all {judged} tiers, sites and releases sent what they usually do."
    if not judged:
        sentence = (
            f"Nothing to compare {day:%A} {day} with: no source has three such weekdays of {AT_LEAST} executions."
        )
    if offenders:
        first = offenders[0]
        sentence = (
            f"On {day:%A} {day} {len(offenders)} of {judged} sources sent too much or too little, {low} of them too little; "
            f"first {first['source']} {first['name']}: {first['executions']:,} executions, usually {first['usually']:,.0f}."
        )
    fleet = next((row for row in rows if row["dimension"] == "fleet"), None)
    return Finding(
        passed=not offenders,
        sentence=sentence,
        observed=f"{len(offenders)} of {judged} sources",
        required=f"within {SPREADS:g} spreads and a factor of {FACTOR:g} of the median of {WEEKS} such weekdays",
        offenders=len(offenders),
        sample=offenders[:20],
        figures={
            "unusual_sources": len(offenders),
            "too_little": low,
            "judged_sources": judged,
            "upgraded_releases": len(upgraded),
            "executions_of_the_day": None if fleet is None else int(fleet["week0"]),
        },
    )
