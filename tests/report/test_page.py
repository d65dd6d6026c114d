"""The page: whatever an agent sends stands in it as text."""

from __future__ import annotations

import datetime as dt
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.health.attribution import waterfall
from flywheel_pipeline.health.trend import CusumPoint
from flywheel_pipeline.promotion import evalue
from flywheel_pipeline.promotion.bound import ALPHA, band
from flywheel_pipeline.promotion.policy import Cusum
from flywheel_pipeline.report import charts
from flywheel_pipeline.report.causes import attribution_blocks
from flywheel_pipeline.report.page import Chart, Column, Heading, Page, Prose, Section, Table, Tile, percent, render
from flywheel_pipeline.report.snapshot import Period

HOSTILE = (
    "<script>window.pwned=1</script>",
    '"onload="window.pwned=1" x="',
    "'><img src=x onerror=window.pwned=1>",
    "</style></title></svg><svg onload=window.pwned=1>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.pwned=1",
)


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


def page_of(text: str) -> Page:
    """A page with the text in every place that takes one, but the anchors, kinds and tones that are ours."""
    columns = [Column(f"{kind}", text, kind) for kind in ("text", "code", "state", "time", "number")]
    table = Table(columns, [{column.key: text for column in columns}], caption=text, of=2)
    chart = Chart("<svg xmlns='http://www.w3.org/2000/svg'/>", text, text)
    blocks = (table, Table(columns, [], caption=text, empty=text), chart, Prose(text), Heading(text, text))
    return Page(text, text, {text: text}, (Tile(text, text, text),), (Section("a", text, text, blocks),))


def shape(html: str) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(attributes)) for tag, attributes in Elements(html).found]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_no_attribute_and_is_shown_as_it_is(text: str) -> None:
    html = render(page_of(text))
    assert shape(html) == shape(render(page_of("x" * len(text))))
    assert Elements(html).text.count(text) >= 15


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("<>&'\"{}%#/=- \n\u2028\x00abonscript"), min_size=12, max_size=40))
def test_no_text_at_all_changes_the_shape_of_the_page(text: str) -> None:
    assert shape(render(page_of(text))) == shape(render(page_of("x" * len(text))))


def test_the_page_holds_no_script_and_no_address_and_lets_none_in() -> None:
    html = render(page_of("plain"))
    elements = Elements(html)
    assert not [tag for tag, _ in elements.found if tag in ("script", "iframe", "object", "embed", "form", "base")]
    targets = [a[name] or "" for _, a in elements.found for name in ("src", "href") if name in a]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    policy = next(a["content"] or "" for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "url(" not in html
    assert "@import" not in html


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_in_a_chart_stay_text_of_well_formed_svg(text: str) -> None:
    from xml.etree import ElementTree

    steps = waterfall({"failure": (7, 0), "success": (3, 3), "unreachable": (4, 1)})
    for chart in (
        charts.bars([(text, 5, charts.GOOD), ("plain", 9, charts.BLUE)], text, text),
        charts.waterfall(steps, text),
    ):
        elements = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(chart.svg).iter()]  # noqa: S314 (ours)
        assert set(elements) <= {"svg", "g", "path", "rect", "line", "text", "tspan", "defs", "clipPath", "circle"}
        attributes = {name for element in ElementTree.fromstring(chart.svg).iter() for name in element.attrib}  # noqa: S314
        assert not [name for name in attributes if name.lower().startswith("on") or "href" in name]


def test_charts_show_each_figure_they_are_given() -> None:
    steps = waterfall({"failure": (700, 0), "success": (300, 300), "unreachable": (1000, 0)})
    svg = charts.waterfall(steps, "RB-AUTO-X").svg
    assert "15.0 %  (300 of 2,000)" in svg
    assert "30.0 %  (300 of 1,000)" in svg
    day = dt.date(2026, 2, 14)
    empty = {"day": day, "executions": 0, "successes": 0, "so_far": None, "lower": 0.0, "upper": 1.0}
    assert "<svg" in charts.rate_over_time([empty]).svg
    at = dt.datetime(2026, 2, 14, 12, tzinfo=dt.UTC)
    drawn = charts.cusum([CusumPoint(at, 9, 7, 5.125, 6.5)], Cusum(), "RB-AUTO-X")
    for words in ("warns at 3", "leaves service at 6"):
        assert words in drawn.svg
    assert "W 5.12 now, at its highest 6.50 on 2026-02-14" in drawn.alt
    assert "<svg" in charts.volume([{"day": day, "executions": 0, "successes": 0}]).svg


def test_a_rate_over_nothing_is_a_dash_and_a_fraction_is_percent() -> None:
    assert (percent(None), percent(0), percent(0.29996), percent(1.0)) == ("–", "0.0 %", "30.0 %", "100.0 %")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_the_ends_of_the_band_are_where_the_e_value_reaches_its_threshold(successes: int, failures: int) -> None:
    lower, upper = band(successes, failures)
    needed = evalue.threshold(ALPHA / 2)
    if successes + failures == 0:
        assert (lower, upper) == (0.0, 1.0)
        return
    assert 0.0 <= lower <= successes / (successes + failures) <= upper <= 1.0
    for end, s, f in ((lower, successes, failures), (1 - upper, failures, successes)):
        if end > 1e-6:
            assert evalue.log_e(s, f, end * (1 - 1e-6)) >= needed - 1e-3
        if end < s / (s + f) - 1e-6:
            assert evalue.log_e(s, f, end + 1e-6) < needed + 1e-3


def test_the_band_of_a_clean_rule_reaches_a_floor_when_the_gate_at_half_the_alpha_does() -> None:
    for clean in (20, 43, 62, 88):
        lower, _ = band(clean, 0)
        floor = next(f for f in (0.5, 0.6, 0.7, 0.75) if f < lower)
        assert evalue.verdict(clean, 0, floor, ALPHA / 2) == "promote"
        assert evalue.verdict(clean, 0, lower + 1e-4, ALPHA / 2) == "inconclusive"


def test_a_period_that_ends_before_it_begins_is_refused() -> None:
    day = dt.date(2026, 2, 15)
    assert str(Period(day, day)) == "2026-02-15 to 2026-02-15"
    with pytest.raises(UsageError, match="before it begins"):
        Period(day, day - dt.timedelta(days=1))


def test_an_attribution_is_laid_out_with_its_counterfactual_rates() -> None:
    segment = {"words": "agent 1.0.56", "also": ["site a"], "executions": 900, "failures": 640, "hosts": 40}
    rates = {"share": 0.64, "rate": 0.29, "rate_if_fixed": 0.85, "advice": "update the agents there"}
    family = {
        "what": "no TPM",
        "failures": 180,
        "share": 0.18,
        "rate_if_fixed": 0.92,
        "template": HOSTILE[0],
        "advice": "x",
    }
    found = {"sentence": "It fails on agent 1.0.56.", "segments": [{**segment, **rates}], "families": [family]}
    html = render(Page("t", "s", {}, (), (Section("a", "t", "l", attribution_blocks(found)),)))
    text = Elements(html).text
    for shown in (
        "It fails on agent 1.0.56.",
        "agent 1.0.56; the same hosts: site a",
        "64.0 %",
        "85.0 %",
        "92.0 %",
        HOSTILE[0],
    ):
        assert shown in text
    assert attribution_blocks(None) == []
    nothing = attribution_blocks({"sentence": "", "segments": [], "families": []})
    assert "stands out beyond chance" in render(Page("t", "s", {}, (), (Section("a", "t", "l", nothing),)))
