"""The contract alone: no database."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posts import NOW, SITE, failed, line, post

from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.telemetry.contract import (
    COLUMNS,
    LINE_LIMIT_BYTES,
    MADE_COLUMNS,
    ParsedRow,
    Reject,
    parse_line,
)


def parse(value: Any, **options: Any) -> ParsedRow | Reject:
    raw = value if isinstance(value, bytes) else line(value)
    return parse_line(raw, 7, **{"received_at": NOW, **options})


def accepted(value: Any, **options: Any) -> dict[str, Any]:
    parsed = parse(value, **options)
    assert isinstance(parsed, ParsedRow), parsed
    return dict(zip(COLUMNS, parsed.values, strict=True))


def refused(value: Any, **options: Any) -> Reject:
    parsed = parse(value, **options)
    assert isinstance(parsed, Reject), parsed
    return parsed


def test_the_contract_covers_every_column_that_the_database_does_not_make():
    declared = {column.name for column in execution_telemetry.c}
    assert set(COLUMNS) == declared - MADE_COLUMNS
    assert len(COLUMNS) == len(set(COLUMNS))


def test_a_post_becomes_a_row_with_its_line_number():
    parsed = parse(post("exec-9"))
    assert isinstance(parsed, ParsedRow)
    assert (parsed.line_number, parsed.execution_id) == (7, "exec-9")
    row = accepted(post("exec-9"))
    assert row["site_id"] == SITE
    assert row["started_at"] == datetime(2026, 2, 15, 9, tzinfo=UTC)
    assert row["duration_seconds"] == 42.5
    assert json.loads(row["executed_steps"]) == ["resume", "verify"]
    assert row["error_message"] is None


def test_rule_runbook_and_action_stay_apart():
    row = accepted(post(rule_id="RB-AUTO-BITLOCKE", runbook_id="RB-WIN-SEC-005", action="run_runbook:RB-WIN-SEC-005"))
    assert (row["rule_id"], row["runbook_id"]) == ("RB-AUTO-BITLOCKE", "RB-WIN-SEC-005")
    assert row["action"] == "run_runbook:RB-WIN-SEC-005"


def test_a_post_that_arrives_now_is_dated_by_our_clock_and_one_from_a_file_by_its_report():
    assert accepted(post(), live=True)["created_at"] == NOW
    assert accepted(post())["created_at"] == datetime(2026, 2, 15, 10, tzinfo=UTC)
    ahead = NOW + timedelta(minutes=5)
    assert accepted({**post(), "reported_at": ahead.isoformat()})["created_at"] == NOW


def test_older_agents_send_no_appliance():
    old = post()
    del old["execution"]["appliance_id"]
    assert accepted(old)["appliance_id"] == "unknown"
    assert accepted(post(appliance_id=None))["appliance_id"] == "unknown"
    assert accepted(post(appliance_id=""))["appliance_id"] == "unknown"


def test_a_time_without_an_offset_is_utc():
    assert accepted(post(started_at="2026-02-15T09:00:00"))["started_at"] == datetime(2026, 2, 15, 9, tzinfo=UTC)
    assert accepted(post(started_at="2026-02-15T08:00:00-01:00"))["started_at"].utctimetuple()[3] == 9


def test_flat_json_is_the_same_row():
    flat = {"site_id": SITE, "reported_at": post()["reported_at"], **post()["execution"]}
    assert accepted(flat) == accepted(post())


def test_a_flat_row_whose_text_says_execution_is_still_flat():
    flat = {"site_id": SITE, **post(failure_type="execution")["execution"]}
    assert accepted(flat)["failure_type"] == "execution"


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"colour": "red"}, "unknown_field", "execution.colour"),
        ({"success": "true"}, "wrong_type", "execution.success must be true or false: 'true'"),
        ({"success": 1}, "wrong_type", "execution.success"),
        ({"success": None}, "missing_field", "execution.success is null"),
        ({"duration_seconds": "5"}, "wrong_type", "execution.duration_seconds"),
        ({"duration_seconds": -1}, "out_of_range", "execution.duration_seconds"),
        ({"retry_count": 1.5}, "wrong_type", "execution.retry_count"),
        ({"retry_count": True}, "wrong_type", "execution.retry_count"),
        ({"retry_count": 2**31}, "out_of_range", "execution.retry_count"),
        ({"input_tokens": 10**40}, "out_of_range", "execution.input_tokens"),
        ({"confidence": 95}, "out_of_range", "execution.confidence"),
        ({"cost_usd": 10**6}, "out_of_range", "execution.cost_usd"),
        ({"started_at": 1771146000}, "wrong_type", "execution.started_at"),
        ({"started_at": "yesterday"}, "wrong_type", "execution.started_at"),
        ({"hostname": 12}, "wrong_type", "execution.hostname must be a text: 12"),
        ({"hostname": " \t"}, "missing_field", "hostname is blank"),
        ({"hostname": "h" * 256}, "too_long", "execution.hostname"),
        ({"runbook_id": None}, "missing_field", "execution.runbook_id"),
        ({"execution_id": None}, "missing_execution_id", "execution.execution_id is null"),
        ({"execution_id": ""}, "missing_execution_id", "execution.execution_id is blank"),
        ({"resolution_level": "L9"}, "unknown_value", "execution.resolution_level"),
        ({"resolution_level": None, "runbook_id": "RB-WIN-SEC-005"}, "missing_field", "resolution_level"),
        ({"status": "failure"}, "contradiction", "success is true and status is 'failure'"),
        ({"tags": {"a": float("nan")}}, "out_of_range", "execution.tags"),
        ({"confidence": float("inf")}, "out_of_range", "execution.confidence"),
        ({"completed_at": "2026-02-15T08:59:59Z"}, "ends_before_start", "completed_at"),
    ],
)
def test_a_broken_field_is_named_with_its_value(change: dict[str, Any], code: str, named: str):
    reject = refused(post(**change))
    assert reject.reason_code == code
    assert named in reject.reason
    assert len(reject.reason) < 1_000


def test_a_post_that_names_two_sites_is_refused():
    twice = post()
    twice["execution"]["site_id"] = SITE
    assert accepted(twice)["site_id"] == SITE
    twice["execution"]["site_id"] = "elsewhere"
    assert refused(twice).reason_code == "conflicting_identity"
    assert "'elsewhere'" in refused(twice).reason


def test_a_missing_execution_id_is_the_reason_even_where_more_is_missing():
    empty = refused({"site_id": SITE, "reported_at": NOW.isoformat(), "execution": {}})
    assert empty.reason_code == "missing_execution_id"
    assert "execution.execution_id is missing" in empty.reason
    assert refused({}).reason_code == "missing_execution_id"


def test_a_post_must_say_when_it_was_reported():
    undated = post()
    del undated["reported_at"]
    assert refused(undated) == Reject("missing_field", "reported_at is missing")


@pytest.mark.parametrize("name", ["started_at", "completed_at"])
def test_the_future_begins_ten_minutes_after_arrival(name: str):
    fields = {"started_at": None, "completed_at": None}
    edge = NOW + timedelta(minutes=10)
    accepted(post(**{**fields, name: edge.isoformat()}), live=True)
    late = refused(post(**{**fields, name: (edge + timedelta(seconds=1)).isoformat()}), live=True)
    assert late.reason_code == "future_event"
    assert name in late.reason


def test_a_report_from_the_future_is_parked_since_it_would_win_over_every_correction():
    ahead = {**post(), "reported_at": "2027-02-15T10:00:00Z"}
    assert refused(ahead).reason_code == "future_event"
    assert "reported_at" in refused(ahead).reason


def test_an_execution_that_starts_after_its_own_report_is_parked():
    assert refused(post(started_at="2026-02-15T10:11:00Z", completed_at=None)).reason_code == "future_event"


@pytest.mark.parametrize("when", ["1970-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "2024-02-15T11:59:59Z"])
def test_what_is_older_than_two_years_is_parked(when: str):
    assert refused(post(started_at=when)).reason_code == "too_old"


def test_two_years_ago_to_the_second_is_accepted():
    assert accepted(post(started_at="2024-02-16T12:00:00Z"))["started_at"].year == 2024


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"not json", "invalid_json"),
        (b"[" * 5_000, "invalid_json"),
        (b"[]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
        (line(post()).replace(b"NVDC01", b"NV\xffDC"), "invalid_utf8"),
        (line(post()).replace(b"NVDC01", b"NV\x00DC"), "nul_character"),
        (line(post(error_message="a\ud800b")), "invalid_json"),
        (b"x" * (LINE_LIMIT_BYTES + 1), "line_too_long"),
    ],
)
def test_bytes_that_are_no_json_text_are_refused(raw: bytes, code: str):
    assert refused(raw).reason_code == code


def test_the_last_line_cut_short_is_called_truncated():
    cut = line(post())[:-20]
    assert refused(cut, complete=False).reason_code == "truncated"
    assert refused(cut).reason_code == "invalid_json"
    accepted(line(post()), complete=False)
    assert refused(post(colour="red"), complete=False).reason_code == "unknown_field"


@pytest.mark.parametrize(
    "fields", [{"error_message": "a\0b"}, {"tags": {"k\0": 1}}, {"state_after": [{"deep": ["\0"]}]}]
)
def test_an_escaped_nul_character_is_refused_wherever_it_stands(fields: dict[str, Any]):
    reject = refused(post(**fields))
    assert reject.reason_code == "nul_character"
    assert next(iter(fields)) in reject.reason


def test_a_backslash_before_u0000_is_plain_text():
    assert accepted(post(error_message=r"C:\u0000"))["error_message"] == r"C:\u0000"


def test_a_line_of_exactly_the_limit_is_read():
    padding = LINE_LIMIT_BYTES - len(line(post(error_message="")))
    assert accepted(post(error_message="x" * padding))["error_message"] == "x" * padding
    assert refused(post(error_message="x" * (padding + 1))).reason_code == "line_too_long"


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise(raw: bytes):
    assert isinstance(parse(raw), Reject)


@given(st.dictionaries(st.sampled_from(COLUMNS), _anything, max_size=6))
def test_no_values_make_it_raise(fields: dict[str, Any]):
    whole = post()
    whole["execution"].update(fields)
    parsed = parse(whole)
    assert isinstance(parsed, ParsedRow | Reject)
    if isinstance(parsed, Reject):
        assert parsed.reason_code
        assert parsed.reason


def test_a_correction_is_a_post_like_any_other():
    assert accepted(failed())["success"] is False


def test_a_nul_byte_is_refused_by_name_wherever_it_stands():
    raw = line(post())
    for place in range(len(raw) + 1):
        reject = refused(raw[:place] + b"\x00" + raw[place:])
        assert (reject.reason_code, reject.reason) == ("nul_character", f"byte {place + 1} is a NUL character")
