"""An attribution in words: the sentence of an alert, the Markdown of a materialization, the JSON that is kept.

Belongs here: words and forms. Does not belong here: any figure that is not in the attribution. Everything here is
redacted already, so it may be shown to the whole fleet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flywheel_pipeline.health.attribution import (
    MAX_PLOT_BYTES,
    percent,
    plot_waterfall,
    waterfall_markdown,
)
from flywheel_pipeline.health.redaction import WITHHELD
from flywheel_pipeline.promotion.plain import plain
from flywheel_pipeline.sql_models.metadata import escape_markdown, markdown_table, png_uri

if TYPE_CHECKING:
    from flywheel_pipeline.health.segments import Condition, Segment
    from flywheel_pipeline.health.why import Attribution

SENTENCE_CAUSES = 3
CONCENTRATED = 0.3  # of all failures on dead hosts: then they are worth a sentence
FLAPPING = 0.2  # of all fixes that did not hold

_WORDS = {"agent_version": "agent", "hardware": "hardware", "os": "", "site": "site"}
_ADVICE = {
    "agent_version": "update the agents there, or withhold the rule from this release",
    "hardware": "narrow the rule to other hardware, or let the runbook report not applicable there",
    "os": "narrow the rule to other systems, or give these a runbook that fits",
    "site": "look at this site: access, credentials, policies that revert the fix",
    "time": "find what changed then",
}


def condition_words(condition: Condition) -> str:
    """One condition: `agent 1.0.56`, `hardware vm-no-tpm`, `Windows 10`, `since 2026-01-05`."""
    if condition.dimension in ("on", "since", "until"):
        return f"{condition.dimension} {condition.value}"
    word = _WORDS[condition.dimension]
    if condition.value == WITHHELD and not word:
        word = "system"
    return f"{word} {condition.value}".strip()


def segment_words(conditions: Sequence[Condition]) -> str:
    """All conditions of a segment: `Windows 10 since 2026-01-05`, `agent 1.0.56 with site a`, `all hosts until 2026-01-24`."""
    times = [condition_words(c) for c in conditions if c.dimension in ("on", "since", "until")]
    things = [condition_words(c) for c in conditions if c.dimension not in ("on", "since", "until")]
    if [c.dimension for c in conditions] == ["since", "until"]:
        return f"all hosts from {conditions[0].value} to {conditions[1].value}"
    return " ".join([" with ".join(things), *times]).strip() if things else f"all hosts {' '.join(times)}"


def segment_advice(segment: Segment) -> str:
    """What to do about a segment; where time is one of its conditions, that too."""
    kinds = [c.dimension if c.dimension in _WORDS else "time" for c in segment.conditions]
    timed = "time" in kinds
    thing = next((kind for kind in ("agent_version", "hardware", "os", "site") if kind in kinds), None)
    if thing is None:
        return _ADVICE["time"]
    return f"find what changed then, or {_ADVICE[thing]}" if timed else _ADVICE[thing]


def causes_sentence(attribution: Attribution) -> str:
    """The causes in one or two sentences, empty where none stands out; it follows `failing_rules.describe`."""
    parts = []
    if attribution.segments:
        named = [
            f"{segment_words(s.conditions)} ({percent(s.share)} of failures, {percent(s.rate_if_fixed)} if fixed: {segment_advice(s)})"
            for s in attribution.segments[:SENTENCE_CAUSES]
        ]
        parts.append(f"It fails on {'; then on '.join(named)}.")
    change = attribution.change
    if change is not None:
        joined = f", within a day of: {change.events[0].what}" if change.events else ""
        parts.append(
            f"Its rate went from {percent(change.before)} to {percent(change.after)} on {change.day.isoformat()}{joined}."
        )
    spread = attribution.concentration
    if spread.dead_hosts and spread.share_of_dead >= CONCENTRATED:
        parts.append(
            f"{spread.dead_hosts} host{'' if spread.dead_hosts == 1 else 's'} that never succeeded make"
            f"{'s' if spread.dead_hosts == 1 else ''} {percent(spread.share_of_dead)} of the failures "
            f"({percent(spread.rate_without_dead)} without them): look at these hosts before the rule."
        )
    flaps = attribution.flapping
    if flaps.share is not None and flaps.hosts and flaps.share >= FLAPPING:
        parts.append(
            f"{percent(flaps.share)} of its fixes did not hold for a day ({flaps.hosts} flapping hosts): find what reverts them."
        )
    if attribution.suggestion is not None:
        kept = attribution.suggestion
        parts.append(
            f"Without {' and without '.join(segment_words(c) for c in kept.exclude)} it succeeds in {percent(kept.rate)} "
            f"(at least {percent(kept.lower_bound)}) on {kept.sites} sites held out of the search."
        )
    return " ".join(parts)


def sentence(attribution: Attribution) -> str:
    """What fails, then where, since when and on which hosts: what an alert says of the causes."""
    return f"{families_sentence(attribution)} {causes_sentence(attribution)}".strip()


def families_sentence(attribution: Attribution) -> str:
    """The causes by what failed, ranked, in one sentence; empty where there is but one, which the rates name already."""
    if len(attribution.families) < 2:
        return ""
    named = [f"{f.what} ({percent(f.share)})" for f in attribution.families[:5]]
    return f"Causes, most failures first: {'; '.join(named)}."


def as_json(attribution: Attribution) -> dict[str, Any]:
    """The attribution as JSON types, with its words beside the figures."""
    document: dict[str, Any] = plain(attribution)
    for shown, segment, step in zip(document["segments"], attribution.segments, attribution.segment_steps, strict=True):
        shown["words"] = segment_words(segment.conditions)
        shown["advice"] = segment_advice(segment)
        shown["error_step"] = plain(step)
    del document["segment_steps"]
    if attribution.suggestion is not None:
        document["suggestion"]["words"] = [segment_words(c) for c in attribution.suggestion.exclude]
    document["sentence"] = sentence(attribution)
    return document


def segment_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The segments of a kept answer as rows to print."""
    return [
        {
            "cause": s["words"] + (f" (the same hosts: {', '.join(s['also'])})" if s["also"] else ""),
            "executions": s["executions"],
            "failures": s["failures"],
            "hosts": s["hosts"],
            "sites": s["sites"],
            "of failures": percent(s["share"]),
            "rate there": percent(s["rate"]),
            "rule's rate if fixed": percent(s["rate_if_fixed"]),
            "mostly at step": ""
            if s["error_step"] is None
            else f"{s['error_step']['step']} ({percent(s['error_step']['share'])})",
            "what to do": s["advice"],
        }
        for s in document["segments"]
    ]


def family_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The causes by what failed as rows to print."""
    return [
        {
            "cause": f["what"],
            "failures": f["failures"],
            "of failures": percent(f["share"]),
            "rule's rate if gone": percent(f["rate_if_fixed"]),
            "most frequent error": f["template"],
            "what to do": f["advice"],
        }
        for f in document["families"]
    ]


def markdown(attribution: Attribution) -> str:
    """The whole answer as Markdown, for the materialization of `failure_attribution`."""
    a, document = attribution, as_json(attribution)
    parts = [
        f"### {escape_markdown(a.rule_id)}: {percent(a.rate)} of {a.executions:,} executions, {a.first_day} to {a.last_day}",
        escape_markdown(sentence(a)) or "No site, release, hardware, system or time stands out beyond chance.",
        "**Where it fails**\n\n" + markdown_table(segment_rows(document), longest_cell=200),
        "**What fails**\n\n" + markdown_table(family_rows(document), longest_cell=200),
        "**From the raw to the adjusted rate**\n\n" + waterfall_markdown(a.steps),
        "**Errors**\n\n"
        + markdown_table(
            [
                {"error": e.template, "class": e.outcome_class, "failures": e.count, "hosts": e.hosts}
                for e in a.templates[:10]
            ],
            longest_cell=200,
        ),
        *(f"**{title}**\n\n{escape_markdown(words)}" for title, words in _spread(a)),
    ]
    return "\n\n".join(parts)


def spread_lines(attribution: Attribution) -> list[str]:
    """Since when, on which hosts, at which step, and the narrower condition: a line or more each."""
    return [f"{title}: {words}" for title, words in _spread(attribution)]


def _spread(a: Attribution) -> list[tuple[str, str]]:
    steps = ", ".join(f"step {'unknown' if s.step is None else s.step}: {s.failures:,}" for s in a.error_steps[:8])
    return [
        ("Since when", _change_words(a)),
        ("On which hosts", _hosts_words(a)),
        ("At which step", steps or "no failures"),
        ("A narrower condition", _suggestion_words(a)),
    ]


def _change_words(a: Attribution) -> str:
    if a.change is None:
        return "No single day stands out beyond chance."
    change = a.change
    words = (
        f"{change.day.isoformat()}: {percent(change.before)} of {change.executions_before:,} executions before, "
        f"{percent(change.after)} of {change.executions_after:,} since (p {change.p_value:.3f})."
    )
    events = "".join(f"\n- {event.day.isoformat()} {event.what}" for event in change.events[:10])
    return words + (
        f" Within a day of it:\n{events}" if events else " No upgrade, policy or ledger event within a day."
    )


def _hosts_words(a: Attribution) -> str:
    c, f = a.concentration, a.flapping
    words = (
        f"{c.failing_hosts:,} of {c.hosts:,} hosts failed; {c.hosts_for_half:,} make half of the failures. "
        f"{c.dead_hosts:,} never succeeded in five tries or more: {percent(c.share_of_dead)} of the failures, "
        f"{percent(c.rate_without_dead)} without them. "
    )
    held = "no data" if f.share is None else percent(f.share)
    return words + f"{held} of the fixes did not hold for a day; {f.hosts:,} hosts flap."


def _suggestion_words(a: Attribution) -> str:
    s = a.suggestion
    if s is None:
        return f"None: {a.no_suggestion}."
    return (
        f"Without {' and without '.join(segment_words(c) for c in s.exclude)}: {percent(s.rate)} (at least "
        f"{percent(s.lower_bound)}) of {s.executions:,} executions on {s.hosts:,} hosts of {s.sites:,} sites held out of the "
        f"search, against {percent(s.rate_before)} as it is; {percent(s.kept)} of the executions remain."
    )


def plots(attribution: Attribution) -> dict[str, str]:
    """The two plots as `data:` URIs of at most 30 KB each: `waterfall` and `rate` over time with its change."""
    return {
        "waterfall": plot_waterfall(attribution.steps, f"{attribution.rule_id}: from raw to adjusted rate"),
        "rate": plot_rate(attribution),
    }


def plot_rate(attribution: Attribution) -> str:
    """Draw the daily success rate, the executions behind it, and the change if there is one, as a PNG `data:` URI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s: not at import
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Numbers, since matplotlib's own stubs know no dates.
    days: list[float] = [float(date2num(d.day)) for d in attribution.days]  # type: ignore[no-untyped-call]
    volume = axes.twinx()
    volume.bar(days, [d.executions for d in attribution.days], color="#d7dbe0", width=0.9)
    volume.set_ylabel("executions a day", fontsize=7)
    volume.tick_params(labelsize=7)
    axes.set_zorder(volume.get_zorder() + 1)
    axes.patch.set_visible(False)
    rates = [100 * d.successes / d.executions for d in attribution.days]
    axes.plot(days, rates, color="#2f7d5b", linewidth=1.4, marker="o", markersize=2.2)
    change = attribution.change
    if change is not None:
        at = float(date2num(change.day)) - 0.5  # type: ignore[no-untyped-call]
        axes.axvline(at, color="#b3402a", linewidth=1.2, linestyle="--")
        axes.hlines(100 * change.before, days[0], at, color="#b3402a", linewidth=1)
        axes.hlines(100 * change.after, at, days[-1], color="#b3402a", linewidth=1)
        what = change.events[0].what if change.events else "the rate changed"
        axes.text(at, 103, f"{change.day.isoformat()}: {what}", fontsize=6.5, color="#b3402a", va="bottom", ha="center")
    axes.set_ylim(0, 102)
    axes.set_ylabel("success, %", fontsize=7)
    locator = AutoDateLocator(maxticks=8)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.tick_params(labelsize=7)
    axes.set_title(f"{attribution.rule_id}: success rate by day", fontsize=9, loc="left", pad=14)
    return png_uri(figure, MAX_PLOT_BYTES)
