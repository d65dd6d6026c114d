"""A rule over time: its success rate with its bound, and its CUSUM with the policy's limits, as figures and as a plot.

Belongs here: reading both for one rule, and the picture in the Dagster UI. Does not belong here: the CUSUM itself
(`cusum.py` and its models), deciding, and the charts of the report (`report/charts.py`), which draw the same figures.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.health.cusum import FLEET, w_of_runs
from flywheel_pipeline.promotion.bound import band
from flywheel_pipeline.promotion.policy import Cusum
from flywheel_pipeline.sql_models.metadata import png_uri

MAX_PLOT_BYTES = 30_000
BOUNDS = 10  # points of the plot's bound: each costs a millisecond or two
_ORDER = "first_at, site_id, hostname, incident_type, day, runbook_id, platform"  # that of cusum_steps


@dataclass(frozen=True)
class CusumPoint:
    """W over the whole fleet within one span (an hour or a day): after its last episode, and at its highest."""

    at: dt.datetime
    episodes: int
    failures: int
    w: float
    w_peak: float


@dataclass(frozen=True)
class RateDay:
    """A rule on one day, all versions: executions and reported successes, rated episodes and those that held."""

    day: dt.date
    executions: int
    successes: int
    rated: int
    healed: int


def cusum_by_day(connection: sa.Connection, rule_id: str, c: Cusum) -> list[CusumPoint]:
    """Walk every rated episode of the rule's version since it entered service, and return W by day.

    Of a rule in service those episodes count that its CUSUM looks at (`rule_episodes`), so that the last W is that of
    `rule_cusum`, whose sums begin at a checkpoint. Of a rule out of service there are no such episodes any more: all of
    its version count, those after it left included.
    """
    rows = connection.execute(
        sa.text(
            f"""
            WITH walked AS (
              SELECT e.day, e.failed, e.first_at, e.site_id, e.hostname, e.incident_type, e.runbook_id, e.platform
              FROM rule_episodes AS e WHERE e.rule_id = :id AND e.counts
              UNION ALL
              SELECT e.day, e.outcome = 'failure', e.first_at, e.site_id, e.hostname, e.incident_type, e.runbook_id, e.platform
              FROM l1_rules AS r
              CROSS JOIN LATERAL (
                SELECT min(v.occurred_at) AS since FROM rule_events AS v
                WHERE v.rule_id = r.rule_id AND v.rule_version = r.rule_version AND v.to_state IN ('canary', 'ring', 'fleet')
              ) AS v
              JOIN episodes AS e
                ON e.level = 'L1' AND e.rule_id = r.rule_id AND e.first_at >= v.since AND e.outcome <> 'unrated'
              WHERE r.rule_id = :id AND NOT r.enabled
            )
            SELECT day, string_agg(CASE WHEN failed THEN '1' ELSE '0' END, '' ORDER BY {_ORDER}) AS failed
            FROM walked GROUP BY day ORDER BY day
            """  # noqa: S608 (our own column names)
        ),
        {"id": rule_id},
    ).all()
    if not rows:
        return []
    import numpy as np  # not at import: the code location has no need of it

    failed = np.frombuffer("".join(row.failed for row in rows).encode(), dtype=np.uint8) == ord("1")
    w = w_of_runs(failed[np.newaxis, :], c)[0]
    points, begin = [], 0
    for row in rows:
        end = begin + len(row.failed)
        points.append(
            CusumPoint(
                dt.datetime.combine(row.day, dt.time(12), dt.UTC),
                end - begin,
                int(failed[begin:end].sum()),
                float(w[end - 1]),
                float(w[begin:end].max()),
            )
        )
        begin = end
    return points


def cusum_by_hour(connection: sa.Connection, rule_id: str, policy_hash: str) -> list[CusumPoint]:
    """Return W by hour since the rule's checkpoint, from `cusum_steps`: days to read, not years."""
    return [
        CusumPoint(row.at, row.episodes, row.failures, row.w, row.w_peak)
        for row in connection.execute(
            sa.text(
                """
                SELECT date_trunc('hour', first_at, 'UTC') AS at, count(*) AS episodes,
                       count(*) FILTER (WHERE failed) AS failures,
                       (array_agg(w ORDER BY nth DESC))[1] AS w, max(w) AS w_peak
                FROM cusum_steps
                WHERE policy_hash = :policy AND rule_id = :id AND scope_kind = 'fleet' AND scope_value = :fleet
                GROUP BY 1 ORDER BY 1
                """
            ),
            {"policy": policy_hash, "id": rule_id, "fleet": FLEET},
        )
    ]


def rate_by_day(
    connection: sa.Connection, rule_id: str, *, since: dt.date | None = None, until: dt.date | None = None
) -> list[RateDay]:
    """Return the rule's days, in order, from `rule_daily_stats`; both ends of the period included, None is open."""
    return [
        RateDay(row.day, row.executions, row.successes, row.rated, row.healed)
        for row in connection.execute(
            sa.text(
                """
                SELECT day, sum(executions)::bigint AS executions, sum(raw_successes)::bigint AS successes,
                       sum(rated_episodes)::bigint AS rated, sum(successful_episodes)::bigint AS healed
                FROM rule_daily_stats
                WHERE rule_id = :id AND (CAST(:since AS date) IS NULL OR day >= CAST(:since AS date))
                  AND (CAST(:until AS date) IS NULL OR day <= CAST(:until AS date))
                GROUP BY day ORDER BY day
                """
            ),
            {"id": rule_id, "since": since, "until": until},
        )
    ]


def alarm_state(w_peak: float, c: Cusum) -> str:
    """Return `alarmed`, `warned` or `calm`: which of the policy's limits the highest W reached."""
    return "alarmed" if w_peak >= c.quarantine_at else "warned" if w_peak >= c.warn_at else "calm"


def plot_trend(title: str, days: Sequence[RateDay], points: Sequence[CusumPoint], c: Cusum) -> str:
    """Draw rate and CUSUM one above the other, as a PNG `data:` URI of at most 30 KB.

    Above: the reported rate of each day, the rate of rated episodes so far, and its lower bound (95 %, at every look).
    Below: the highest W of each hour, with the limits at which it warns and at which a scope leaves service.

    Args:
        title: of the picture.
        days: at least one.
        points: W; may be empty.
        c: the limits.
    """
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num  # 0.3 s: not at import
    from matplotlib.figure import Figure

    # Margins by hand: a layout engine would draw it twice.
    figure = Figure(figsize=(6.4, 3.6))
    above, below = figure.add_axes((0.08, 0.5, 0.9, 0.36)), figure.add_axes((0.08, 0.12, 0.9, 0.26))
    at: list[float] = [float(date2num(d.day)) + 0.5 for d in days]  # type: ignore[no-untyped-call]
    above.plot(
        at,
        [100 * d.successes / d.executions if d.executions else float("nan") for d in days],
        "o",
        color="#8a94a0",
        markersize=2.6,
        label="as reported, by day",
    )
    rated = healed = 0
    so_far: list[float] = []
    counts: list[tuple[int, int]] = []
    for day in days:
        rated, healed = rated + day.rated, healed + day.healed
        so_far.append(100 * healed / rated if rated else float("nan"))
        counts.append((healed, rated - healed))
    above.plot(at, so_far, color="#2b5c9e", linewidth=1.6, label="of episodes, so far")
    places = sorted({round(i * (len(days) - 1) / max(1, BOUNDS - 1)) for i in range(BOUNDS)})
    above.plot(
        [at[i] for i in places],
        [100 * band(*counts[i])[0] for i in places],
        color="#2b5c9e",
        linewidth=0.9,
        linestyle="--",
        label="at least",
    )
    above.set_ylim(0, 104)
    above.set_ylabel("success, %", fontsize=7)
    above.legend(fontsize=6.5, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.99))
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    for limit, colour, what in ((c.warn_at, "#d08a1d", "warns"), (c.quarantine_at, "#b3382b", "leaves service")):
        below.axhline(limit, color=colour, linewidth=0.9, linestyle="--", label=f"{what} at {limit:g}")
    if points:
        hours: list[float] = [float(date2num(p.at)) for p in points]  # type: ignore[no-untyped-call]
        below.plot(
            hours, [p.w_peak for p in points], color="#1b2430", linewidth=1.4, marker="o", markersize=2, label="CUSUM W"
        )
    below.set_ylim(0, 1.15 * max(c.quarantine_at, *(p.w_peak for p in points), 0.0))
    below.set_ylabel("CUSUM W", fontsize=7)
    below.legend(fontsize=6.5, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.99))
    for axes in (above, below):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        locator = AutoDateLocator(maxticks=8)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=axes is below))  # type: ignore[no-untyped-call]
        axes.xaxis.get_offset_text().set_fontsize(7)
    below.set_xlim(above.get_xlim())
    return png_uri(figure, MAX_PLOT_BYTES)


def so_far(days: Sequence[RateDay]) -> list[dict[str, Any]]:
    """Return each day with the rate of episodes so far and its band: what `report.charts.rate_over_time` draws."""
    rated = healed = 0
    found = []
    for day in days:
        rated, healed = rated + day.rated, healed + day.healed
        lower, upper = band(healed, rated - healed)
        found.append(
            {
                "day": day.day,
                "executions": day.executions,
                "successes": day.successes,
                "so_far": healed / rated if rated else None,
                "lower": lower,
                "upper": upper,
            }
        )
    return found
