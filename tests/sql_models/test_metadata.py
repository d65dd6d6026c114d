"""Values from the database, numpy and models become values that Dagster metadata takes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import math
import pathlib
import re
import uuid
from decimal import Decimal
from html.parser import HTMLParser

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flywheel_pipeline.sql_models.metadata import as_metadata, markdown_table, unlinked


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Count:
    rule_id: str
    rate: Decimal | None


CASES = {
    "null": (None, None),
    "bool": (True, True),
    "numpy bool": (np.bool_(False), False),
    "numpy int": (np.int64(7), 7),
    "numpy float": (np.float64(0.5), 0.5),
    "numpy float32": (np.float32(0.5), 0.5),
    "numpy string": (np.str_("a"), "a"),
    "numpy array": (np.array([1, 2]), [1, 2]),
    "pandas series": (pd.Series([1.5, 2.5]), [1.5, 2.5]),
    "not a number": (math.nan, "nan"),
    "infinity": (np.float64("inf"), "inf"),
    "whole decimal": (Decimal("12.00"), 12),
    "decimal": (Decimal("0.25"), 0.25),
    "decimal NaN": (Decimal("NaN"), "NaN"),
    "date": (dt.date(2026, 2, 15), "2026-02-15"),
    "time stamp": (dt.datetime(2026, 2, 15, 1, tzinfo=dt.UTC), "2026-02-15T01:00:00+00:00"),
    "pandas time stamp": (pd.Timestamp("2026-02-15", tz="UTC"), "2026-02-15T00:00:00+00:00"),
    "duration": (dt.timedelta(minutes=1), 60.0),
    "uuid": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "path": (pathlib.Path("a/b"), "a/b"),
    "bytes": (b"\x00\xff", "00ff"),
    "set": ({"b", "a"}, ["a", "b"]),
    "tuple": ((1, Decimal(2)), [1, 2]),
    "enum": (Colour.RED, "red"),
    "dataclass": (Count("R", Decimal("0.5")), {"rule_id": "R", "rate": 0.5}),
    "nested": ({dt.date(2026, 1, 1): [{"n": np.int32(1)}]}, {"2026-01-01": [{"n": 1}]}),
}


@pytest.mark.parametrize("case", CASES)
def test_dagster_takes_the_coerced(case: str) -> None:
    given_value, expected = CASES[case]
    plain = as_metadata(given_value)
    assert plain == expected
    assert type(plain) is type(expected)
    dg.MaterializeResult(metadata={"value": plain})
    dg.AssetMaterialization("a", metadata={"value": plain})
    json.dumps(plain, allow_nan=False)


def test_dagster_values_pass_as_they_are() -> None:
    markdown = dg.MetadataValue.md("| a |")
    assert as_metadata(markdown) is markdown
    assert as_metadata(dg.TableSchema(columns=[])) == dg.TableSchema(columns=[])


def test_a_value_that_nobody_can_read_is_an_error() -> None:
    with pytest.raises(TypeError, match="object"):
        as_metadata(object())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.decimals() | st.dates() | st.uuids(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
        max_leaves=10,
    )
)
def test_whatever_goes_in_json_comes_out(value: object) -> None:
    json.dumps(as_metadata(value), allow_nan=False)


def test_a_table_shows_rows_escapes_bars_and_cuts_long_cells() -> None:
    table = markdown_table([{"rule": "a|b", "rate": 0.30000001, "note": None}, {"rule": "x\ny" * 200, "rate": 3057.25}])
    lines = table.split("\n")
    assert lines[0] == "| rule | rate | note |"
    assert lines[1] == "|---|---|---|"
    assert lines[2] == "| a\\|b | 0.3 |  |"
    assert lines[3].startswith("| x yx y")
    assert "…" in lines[3]
    assert "3057.2" in lines[3]
    assert len(lines) == 4


def test_a_table_without_rows_says_so() -> None:
    assert markdown_table([]) == "no rows"


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.pwned=1</script>",
        "<img src=x onerror=window.pwned=1>",
        "[free](http://evil.example)",
        "![x](http://evil.example/pixel.png)",
        "<http://evil.example>",
        "**bold** `code` # head",
        "a | b",
        "&lt;script&gt;",
        "\\<script>",
    ],
)
def test_hostile_text_in_a_cell_is_shown_as_it_is(text: str) -> None:
    found, words = rendered(markdown_table([{"error": text}]))
    assert found == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert text in "".join(words)


#: What micromark-extension-gfm-autolink-literal and mdast-util-gfm-autolink-literal make a link of, the first in the
#: source, the second in every text that came of it, once entities and escapes are resolved; and Dagster's log its lines.
AUTOLINK = re.compile(r"[a-z]+://[-.\w]|www\.[-.\w]|[-.\w+]@[-\w]", re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        "https://evil.example/pay?now=1#x",
        "HTTP://EVIL.EXAMPLE",
        "ftp://evil.example",
        "http://10.2.3.1",
        "www.evil.example",
        "see:(WwW.evil.example)",
        "a.b+c@evil.example",
        "mailto:a@evil.example and xmpp:a@evil.example/x",
        "a@b@evil.example",
        "https\\://evil.example",
        "https&#58;//evil.example",
        "www&period;evil.example",
        "https://www.a@evil.example",
    ],
)
def test_an_address_in_a_text_is_shown_and_is_no_link(text: str) -> None:
    table = markdown_table([{"error": text}])
    found, words = rendered(table)
    assert found == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert text in "".join(words)
    assert [part for part in (table, *words) if AUTOLINK.search(part)] == []
    assert not AUTOLINK.search(unlinked(text))
    assert len(unlinked(text)) == len(text)


def test_a_sentence_without_addresses_reads_as_it_is() -> None:
    sentence = (
        "RB-AUTO-BITLOCKE succeeded in 917 of 3,057 executions (30.0 %); the www is not concerned. See `flywheel why`."
    )
    assert unlinked(sentence) == sentence
    assert unlinked("<hex> in [x](y)") == "‹hex› in [x] (y)"


def rendered(markdown: str) -> tuple[list[str], list[str]]:
    """Tags and texts of the page that Markdown makes."""
    found: list[str] = []
    words: list[str] = []
    page = HTMLParser(convert_charrefs=True)
    page.handle_starttag = lambda tag, _: found.append(tag)  # type: ignore[method-assign]
    page.handle_data = words.append  # type: ignore[method-assign]
    page.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    page.close()
    return found, words
