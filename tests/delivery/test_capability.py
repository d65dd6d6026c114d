from __future__ import annotations

import json

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel_pipeline.delivery.capability import (
    ARGUMENT,
    FIRST_VERSION,
    ActionError,
    AgentVersion,
    MalformedAction,
    MissingArgument,
    UnexpectedArgument,
    UnknownForm,
    action_for,
    parse_action,
    parse_version,
    served_action,
    supports,
)
from flywheel_pipeline.errors import UsageError

numbers = st.integers(0, 999_999)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("1.0.70", AgentVersion(1, 0, 70)),
        (" v1.0.56 ", AgentVersion(1, 0, 56)),
        ("1.0.71-rc1", AgentVersion(1, 0, 71, final=False)),
        ("1.0.71+build.5", AgentVersion(1, 0, 71)),
        ("1.0.9", AgentVersion(1, 0, 9)),
    ],
)
def test_an_agent_version_is_read(text: str, version: AgentVersion) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", [None, "", "unknown", "1.0", "1.0.x", "1.0.70.2", "١.٠.٧٠", "1.0.70 beta", "-1.0.7"])
def test_what_is_no_version_is_unknown(text: str | None) -> None:
    assert parse_version(text) is None


@given(numbers, numbers, numbers, numbers)
def test_versions_compare_by_number_and_not_by_text(major: int, minor: int, patch: int, other: int) -> None:
    one, two = parse_version(f"{major}.{minor}.{patch}"), parse_version(f"{major}.{minor}.{other}")
    assert one is not None
    assert two is not None
    assert (one < two) == (patch < other)


def test_a_pre_release_comes_before_its_release_and_lacks_what_the_release_brings() -> None:
    assert not supports("1.0.70-rc1", "run_windows_runbook:RB-WIN-SEC-016").ok
    assert supports("1.0.70", "run_windows_runbook:RB-WIN-SEC-016").ok


@pytest.mark.parametrize(
    ("version", "action", "ok"),
    [
        ("1.0.56", "run_windows_runbook:RB-WIN-SEC-016", False),
        ("1.0.69", "run_windows_runbook:RB-WIN-SEC-016", False),
        ("1.0.70", "run_windows_runbook:RB-WIN-SEC-016", True),
        ("1.0.74", "run_windows_runbook:RB-WIN-SEC-016", True),
        ("1.0.68", "run_linux_runbook:LIN-SSH-001", False),
        ("1.0.69", "run_linux_runbook:LIN-SSH-001", True),
        ("1.0.43", "run_runbook:RB-WIN-SEC-016", False),
        ("1.0.44", "run_runbook:RB-WIN-SEC-016", True),
        ("1.0.18", "escalate", True),
        ("1.0.18", "alert:disk", False),
    ],
)
def test_an_agent_can_do_what_its_release_brought(version: str, action: str, ok: bool) -> None:
    assert supports(version, action).ok is ok


@pytest.mark.parametrize("form", sorted(FIRST_VERSION))
@pytest.mark.parametrize("version", [None, "", "unknown", "newest"])
def test_an_unknown_version_is_capable_of_nothing(form: str, version: str | None) -> None:
    action = form if form == "escalate" else f"{form}:x"
    answer = supports(version, action)
    assert not answer.ok
    assert "cannot be read" in answer.reason


def test_what_an_agent_reports_outranks_its_version() -> None:
    assert supports("1.0.18", "run_windows_runbook:X", ["run_windows_runbook"]).ok
    assert not supports("1.0.74", "run_windows_runbook:X", ["run_runbook"]).ok
    assert not supports("1.0.74", "run_windows_runbook:X", []).ok
    assert supports(None, "run_windows_runbook:X", ["run_windows_runbook:"]).ok


@pytest.mark.parametrize("report", [{"run_runbook": True}, "run_runbook", [1], 7, True])
def test_an_unreadable_report_of_capabilities_counts_as_none(report: object) -> None:
    answer = supports("1.0.74", "run_runbook:X", report)
    assert not answer.ok
    assert "not a list" in answer.reason


@pytest.mark.parametrize(
    "action",
    [
        "",
        "reboot",
        "run_windows_runbook",
        "run_windows_runbook:",
        "run_runbook: ",
        "escalate:now",
        "RUN_RUNBOOK:X",
        ":X",
    ],
)
def test_an_action_outside_the_grammar_is_refused(action: str) -> None:
    with pytest.raises(UsageError):
        parse_action(action)


def test_an_argument_may_hold_colons_and_spaces_inside() -> None:
    assert parse_action("restart_service:Windows Time").argument == "Windows Time"
    assert parse_action("alert:a:b").argument == "a:b"


@pytest.mark.parametrize(
    ("runbook_id", "platform", "action"),
    [
        ("RB-WIN-SEC-016", "windows", "run_windows_runbook:RB-WIN-SEC-016"),
        ("LIN-SSH-001", "linux", "run_linux_runbook:LIN-SSH-001"),
        ("MAC-FV-001", "macos", "run_runbook:MAC-FV-001"),
    ],
)
def test_each_platform_has_its_action(runbook_id: str, platform: str, action: str) -> None:
    assert action_for(runbook_id, platform) == action


def test_an_unknown_platform_has_no_action() -> None:
    with pytest.raises(UsageError, match="no platform"):
        action_for("RB-WIN-SEC-016", "solaris")


def test_an_older_agent_gets_the_older_form_of_the_same_runbook() -> None:
    assert served_action("RB-WIN-SEC-016", "windows", "1.0.56").action == "run_runbook:RB-WIN-SEC-016"
    assert served_action("RB-WIN-SEC-016", "windows", "1.0.70").action == "run_windows_runbook:RB-WIN-SEC-016"


def test_an_agent_too_old_for_either_form_gets_none_and_both_reasons_are_given() -> None:
    answer = served_action("RB-WIN-SEC-016", "windows", "1.0.30")
    assert not answer.ok
    assert answer.action == ""
    assert "1.0.70" in answer.reason
    assert "1.0.44" in answer.reason


@given(
    st.one_of(st.none(), st.builds("1.0.{}".format, st.integers(0, 99)), st.text(max_size=8)),
    st.sampled_from(["windows", "linux", "macos"]),
    st.one_of(st.none(), st.lists(st.sampled_from(sorted(FIRST_VERSION)))),
)
def test_no_action_is_ever_served_that_the_agent_does_not_support(
    version: str | None, platform: str, capabilities: list[str] | None
) -> None:
    answer = served_action("RB-1", platform, version, capabilities)
    assert answer.ok == bool(answer.action)
    if answer.ok:
        assert supports(version, answer.action, capabilities).ok
        assert parse_action(answer.action).argument == "RB-1"


@pytest.mark.parametrize(
    ("runbook_id", "platform"), [("RB-1", "unknown"), ("RB-1", ""), ("", "windows"), ("a\nb", "linux")]
)
def test_what_cannot_be_put_into_an_action_is_served_to_nobody(runbook_id: str, platform: str) -> None:
    answer = served_action(runbook_id, platform, "1.0.74")
    assert not answer.ok
    assert answer.reason


@pytest.mark.parametrize(
    ("action", "error", "hint"),
    [
        ("", MalformedAction, "form:argument"),
        (" escalate", MalformedAction, "form:argument"),
        ("run_runbook:X\nescalate", MalformedAction, "one line"),
        ("run_runbook: X", MalformedAction, "run_runbook:X without"),
        ("Run-Runbook:X", MalformedAction, "Write run_runbook"),
        ("reboot:now", UnknownForm, "run_windows_runbook"),
        (":X", UnknownForm, "The forms are"),
        ("restart_service", MissingArgument, "the name of a service"),
        ("alert:", MissingArgument, "what to alert of"),
        ("escalate:", UnexpectedArgument, "without a colon"),
        ("escalate:now", UnexpectedArgument, "escalate alone"),
    ],
)
def test_each_way_to_break_the_grammar_has_its_error_and_says_what_to_write(
    action: str, error: type[ActionError], hint: str
) -> None:
    with pytest.raises(error) as refused:
        parse_action(action)
    assert type(refused.value) is error
    assert hint in str(refused.value.hint)


@given(
    st.text(max_size=30) | st.builds("{}{}{}".format, st.sampled_from(sorted(FIRST_VERSION)), st.just(":"), st.text())
)
def test_every_text_is_an_action_that_is_spelled_back_or_a_typed_error(text: str) -> None:
    try:
        found = parse_action(text)
    except ActionError:
        return
    assert found.form in FIRST_VERSION
    assert text == (found.form if found.argument is None else f"{found.form}:{found.argument}")


def test_a_form_that_the_agent_refused_is_served_no_more_whatever_it_claims() -> None:
    current = served_action("RB-1", "windows", "1.0.74", refused=["run_windows_runbook"])
    assert current.action == "run_runbook:RB-1"
    reporting = served_action("RB-1", "windows", "1.0.74", ["run_windows_runbook"], ["run_windows_runbook"])
    assert not reporting.ok
    assert "although it reports the form" in reporting.reason
    assert not served_action("RB-1", "windows", "1.0.74", refused=["run_windows_runbook", "run_runbook"]).ok
    assert served_action("RB-1", "windows", "1.0.74", refused=["escalate"]).action == "run_windows_runbook:RB-1"


versions = st.one_of(
    st.none(),
    st.sampled_from(["", "unknown", "1.0.69", "1.0.70-rc1", " v1.0.70 ", "1.0.44+b", "1.0"]),
    st.text("1.0v- ", max_size=8),
)
reports = st.one_of(
    st.none(),
    st.lists(st.sampled_from([*sorted(FIRST_VERSION), "run_runbook:", "x"]), max_size=3),
    st.just([1]),
    st.just({}),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(versions, reports, st.sampled_from(sorted(FIRST_VERSION)))
def test_the_database_reads_claims_as_this_room_does(
    engine: sa.Engine, version: str | None, report: object, form: str
) -> None:
    action = form if ARGUMENT[form] is None else f"{form}:x"
    here = supports(version, action, report)
    with engine.connect() as connection:
        there = connection.execute(
            sa.text("SELECT flywheel_claims(:version, CAST(:report AS jsonb), :form)"),
            {"version": version, "report": None if report is None else json.dumps(report), "form": form},
        ).scalar_one()
    assert there == (("version" if report is None else "report") if here.ok else None)
