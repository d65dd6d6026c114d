"""The report's charts, drawn to SVG by Altair and vl-convert in this process: no browser, no network, no script.

Belongs here: drawing figures that are given. Does not belong here: any figure computed anew. Both libraries take a
second to import, so they are imported when something is drawn.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from flywheel_pipeline.health.attribution import WaterfallStep, percent
from flywheel_pipeline.health.cusum import increments
from flywheel_pipeline.health.trend import CusumPoint
from flywheel_pipeline.promotion.policy import Cusum
from flywheel_pipeline.report.page import Chart

INK, SOFT, GREY, GOOD, BAD, BLUE, AMBER = "#1b2430", "#5c6876", "#cfd6de", "#1f7a53", "#b3382b", "#2b5c9e", "#a8690b"
WIDTH = 930
# A chart is measured here and drawn with the reader's fonts, which may be a fifth wider: labels get room in any.
LABELS = 235
_FONT = "Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"


def _svg(chart: Any) -> str:
    import vl_convert

    configured = (
        chart.configure(background="white", font=_FONT, padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=SOFT,
            titleColor=SOFT,
            titleFontWeight="normal",
            gridColor="#eceff3",
            domainColor="#b9c2cd",
            tickColor="#b9c2cd",
            labelFontSize=11,
            titleFontSize=11,
        )
    )
    # No address is allowed: a chart holds its data.
    return str(vl_convert.vegalite_to_svg(configured.to_dict(), allowed_base_urls=[]))


def _day(value: dt.date) -> str:
    return f"{value.isoformat()}T00:00:00Z"


def _until(value: dt.date) -> str:
    return _day(value + dt.timedelta(days=1))


def _time_axis(*, labels: bool = True) -> Any:
    import altair as alt

    return alt.X(
        "begin:T",
        title=None,
        scale=alt.Scale(type="utc"),
        axis=alt.Axis(
            grid=False,
            tickCount=8,
            format="%Y-%m-%d",
            labelOverlap=True,
            labelSeparation=12,
            labels=labels,
            ticks=labels,
        ),
    )


def volume(days: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw executions by day as bars, those reported as success in green, and their rate above.

    Args:
        days: {day, executions, successes}, in order; at least one.
    """
    import altair as alt

    rows = [
        {
            "begin": _day(d["day"]),
            "end": _until(d["day"]),
            "noon": f"{d['day'].isoformat()}T12:00:00Z",
            "executions": int(d["executions"]),
            "successes": int(d["successes"]),
            "rate": d["successes"] / d["executions"] if d["executions"] else None,
        }
        for d in days
    ]
    base = alt.Chart(alt.InlineData(values=rows))
    x = _time_axis()
    zero = alt.datum(0)
    every = base.mark_rect(color=GREY, stroke="white", strokeWidth=0.5).encode(
        x=x, x2="end:T", y=alt.Y("executions:Q", title="executions a day", axis=alt.Axis(tickCount=4)), y2=zero
    )
    green = base.mark_rect(color=GOOD, stroke="white", strokeWidth=0.5).encode(
        x=x, x2="end:T", y="successes:Q", y2=zero
    )
    line = base.mark_line(color=BLUE, strokeWidth=1.4, point=alt.OverlayMarkDef(size=16, color=BLUE)).encode(
        x=alt.X("noon:T", title=None, scale=alt.Scale(type="utc"), axis=None),
        y=alt.Y("rate:Q", title="success rate", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", tickCount=3)),
    )
    chart = alt.vconcat(
        line.properties(width=WIDTH, height=70), (every + green).properties(width=WIDTH, height=130), spacing=8
    ).resolve_scale(x="shared")
    first, last = days[0]["day"], days[-1]["day"]
    total = sum(int(d["executions"]) for d in days)
    return Chart(
        _svg(chart),
        f"{total:,} executions by day from {first} to {last}, with those reported as success and their rate.",
        "Executions by UTC day of event time (all levels, without synthetic ones); green: reported as success. Above, their rate.",
    )


def _labels() -> Any:
    """The labels of bars, on the left, in the order that each row gives itself."""
    import altair as alt

    return alt.Y(
        "label:N",
        sort=alt.EncodingSortField("order", order="ascending"),
        title=None,
        axis=alt.Axis(
            domain=False,
            ticks=False,
            labelFontSize=12,
            labelColor=INK,
            labelLimit=320,
            labelPadding=8,
            minExtent=LABELS,
        ),
    )


def bars(rows: Sequence[tuple[str, int, str]], alt_text: str, caption: str) -> Chart:
    """Draw a bar per (label, count, colour), in the order given, the count at its end."""
    import altair as alt

    values = [
        {"order": i, "label": label, "n": n, "text": f"{n:,}", "colour": colour}
        for i, (label, n, colour) in enumerate(rows)
    ]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        y=_labels(),
        x=alt.X("n:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1.15 * max(1, *(n for _, n, _ in rows))])),
    )
    bar = base.mark_bar(height=alt.RelativeBandSize(0.72)).encode(color=alt.Color("colour:N", scale=None))
    text = base.mark_text(align="left", dx=5, fontSize=12, color=INK).encode(text="text:N")
    return Chart(_svg((bar + text).properties(width=640, height=26 * len(values))), alt_text, caption)


def waterfall(steps: Sequence[WaterfallStep], rule_id: str) -> Chart:
    """Draw the way from the raw rate to the adjusted one: a bar per step, successes in green, the rate at its end."""
    import altair as alt

    values = [
        {
            "order": i,
            "label": step.label if not step.removed else f"without {step.label.replace('_', ' ')}",
            "executions": step.executions,
            "successes": step.successes,
            "text": f"{percent(step.rate)}  ({step.successes:,} of {step.executions:,})",
        }
        for i, step in enumerate(steps)
    ]
    base = alt.Chart(alt.InlineData(values=values)).encode(y=_labels())
    scale = alt.Scale(domain=[0, 1.5 * max(1, steps[0].executions)])
    x = alt.X("executions:Q", title=None, axis=None, scale=scale)
    every = base.mark_bar(color=GREY, height=alt.RelativeBandSize(0.7)).encode(x=x)
    green = base.mark_bar(color=GOOD, height=alt.RelativeBandSize(0.7)).encode(
        x=alt.X("successes:Q", title=None, axis=None)
    )
    text = base.mark_text(align="left", dx=5, fontSize=12, color=INK).encode(x=x, text="text:N")
    return Chart(
        _svg((every + green + text).properties(width=640, height=26 * len(values))),
        f"From the raw to the adjusted success rate of {rule_id}: "
        + "; ".join(f"{v['label']} {v['text']}" for v in values),
        "From the raw rate to that of what the rule could fix, one outcome class taken out after the other; green: reported as success.",
    )


def cusum(points: Sequence[CusumPoint], c: Cusum, rule_id: str) -> Chart:
    """Draw W over the days: where it stood at the end of each, its highest as a bar, and the policy's two limits.

    Args:
        points: by day, in order; at least one.
        c: the limits.
        rule_id: the rule, for those who do not see the chart.
    """
    import altair as alt

    rows = [{"begin": p.at.isoformat(), "w": round(p.w, 4), "peak": round(p.w_peak, 4)} for p in points]
    top = 1.12 * max(c.quarantine_at, *(p.w_peak for p in points))
    y = alt.Scale(domain=[0, top])
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=_time_axis())
    peaks = base.mark_bar(color=GREY, width=max(1, min(14, 600 // len(rows)))).encode(
        y=alt.Y("peak:Q", title="CUSUM W", scale=y, axis=alt.Axis(tickCount=5))
    )
    line = base.mark_line(color=INK, strokeWidth=1.6, point=alt.OverlayMarkDef(size=14, color=INK)).encode(
        y=alt.Y("w:Q", scale=y)
    )
    limits = [
        (c.warn_at, f"- - warns at {c.warn_at:g}", AMBER, 0),
        (c.quarantine_at, f"- - leaves service at {c.quarantine_at:g}", BAD, 110),
    ]
    drawn = peaks
    for limit, text, colour, shift in limits:
        one = alt.Chart(alt.InlineData(values=[{"limit": limit, "text": text}]))
        # The words stand above the chart: beside their lines they would be hidden where W towers above both.
        drawn += one.mark_rule(color=colour, strokeDash=[5, 3], strokeWidth=1.2).encode(y=alt.Y("limit:Q", scale=y))
        drawn += one.mark_text(align="left", baseline="bottom", color=colour, fontSize=11).encode(
            x=alt.value(shift), y=alt.value(-4), text="text:N"
        )
    highest = max(points, key=lambda p: p.w_peak)
    return Chart(
        _svg((drawn + line).properties(width=WIDTH, height=170)),
        f"CUSUM of {rule_id} from {points[0].at:%Y-%m-%d} to {points[-1].at:%Y-%m-%d}: W {points[-1].w:.2f} now, at its "
        f"highest {highest.w_peak:.2f} on {highest.at:%Y-%m-%d}; it warns at {c.warn_at:g} and leaves service at "
        f"{c.quarantine_at:g}.",
        f"Line: W after the last episode of a day; bars: its highest that day. An episode that held moves W by "
        f"{increments(c)[0]:+.2f}, one that failed by {increments(c)[1]:+.2f}, never below zero: the evidence that the rate "
        f"fell from {c.good:.0%} to {c.bad:.0%}. A straight climb is a rule that fails as often as ever; a bend is a change.",
    )


def rate_over_time(days: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw a rule's rate: a point per day (its size the executions), the rate so far, and its band.

    Args:
        days: {day, executions, successes, so_far, lower, upper}, in order; rates are fractions, so_far null over nothing.
    """
    import altair as alt

    rows = [
        {
            "begin": f"{d['day'].isoformat()}T12:00:00Z",
            "rate": d["successes"] / d["executions"] if d["executions"] else None,
            "executions": int(d["executions"]),
            "so_far": d["so_far"],
            "lower": d["lower"],
            "upper": d["upper"],
        }
        for d in days
    ]
    source = alt.Chart(alt.InlineData(values=rows))
    base = source.encode(x=_time_axis(labels=False))
    scale = alt.Scale(domain=[0, 1])
    axis = alt.Axis(format="%", tickCount=5)
    area = base.mark_area(color=BLUE, opacity=0.16, line={"color": BLUE, "strokeWidth": 0.6}).encode(
        y=alt.Y("lower:Q", title="success rate", scale=scale, axis=axis), y2="upper:Q"
    )
    line = base.mark_line(color=BLUE, strokeWidth=2).encode(y=alt.Y("so_far:Q", scale=scale))
    points = base.mark_circle(color=INK, opacity=0.55).encode(
        y=alt.Y("rate:Q", scale=scale), size=alt.Size("executions:Q", scale=alt.Scale(range=[8, 120]), legend=None)
    )
    below = source.mark_bar(color=GREY, width=max(1, min(14, 600 // len(rows)))).encode(
        x=_time_axis(), y=alt.Y("executions:Q", title="executions", axis=alt.Axis(tickCount=2))
    )
    chart = alt.vconcat(
        (area + line + points).properties(width=WIDTH, height=210), below.properties(width=WIDTH, height=50), spacing=8
    ).resolve_scale(x="shared")
    return Chart(
        _svg(chart),
        f"Success rate by day from {days[0]['day']} to {days[-1]['day']} with the rate of episodes so far and its band.",
        "Points: reported success rate of a day's executions, larger where there were more. Line: rate of rated episodes so far, "
        "with the band that holds at every look together with 95 % probability (the e-value that promotes and rejects). "
        "Episodes are the evidence: what was not rated is in the points and not in the line.",
    )
