"""Grouping of messages, and the causes they belong to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.health.attribution import ErrorTemplate
from flywheel_pipeline.health.templates import (
    MaskedTemplates,
    MergedTemplates,
    Templates,
    cause_families,
    family_of,
    grouping_accuracy,
    merge,
)

BOTH: list[Templates] = [MaskedTemplates(), MergedTemplates()]


@pytest.mark.parametrize("grouping", BOTH)
def test_causes_that_differ_in_a_plain_word_or_a_code_stay_apart(grouping: Templates) -> None:
    messages = [
        "Phase 'verify' failed",
        "Phase 'remediate' failed",
        "http response error: 401",
        "http response error: 500",
        "ProtectionStatus=0",
        "ProtectionStatus=2",
        "no ssh credentials",
        "no winrm credentials",
    ]
    assert len(set(grouping.of(messages))) == len(messages)


def test_a_word_of_many_values_is_a_variable_and_two_plain_ones_are_not() -> None:
    services = ["spooler", "netlogon", "dns", "time", "update"]
    messages = [f"Service {name} did not start" for name in services]
    assert set(MergedTemplates().of(messages)) == {"Service <*> did not start"}
    assert len(set(MergedTemplates().of(messages[:4]))) == 4
    assert len(set(MaskedTemplates().of(messages))) == 5


def test_a_second_variable_shows_once_the_first_is_one() -> None:
    messages = [f"Queue q_{a} of task_{b} is full" for a in "abc" for b in "xyz"]
    assert set(MergedTemplates().of(messages)) == {"Queue <*> of <*> is full"}


def test_no_message_is_a_group_of_its_own() -> None:
    assert MergedTemplates().of([None, "", "x failed"]) == ["(no message)", "(no message)", "x failed"]


@given(st.lists(st.lists(st.sampled_from(["a", "b1", "c_2", "d", "e/f", "g", "<n>"]), max_size=4).map(" ".join)))
def test_every_template_is_given_its_group_and_grouping_again_changes_nothing_else(templates: list[str]) -> None:
    merged = merge(templates)
    assert set(merged) == set(templates)
    for template, group in merged.items():
        assert len(template.split(" ")) == len(group.split(" "))
        assert all(g in (t, "<*>") for t, g in zip(template.split(" "), group.split(" "), strict=True))
    # Order does not matter.
    assert merge(reversed(templates)) == merged


def error(template: str, outcome_class: str, count: int) -> ErrorTemplate:
    return ErrorTemplate(template, outcome_class, count, 1, 0.0)


def test_the_five_causes_of_the_field_are_told_apart() -> None:
    named = [
        family_of(error(template, outcome_class, 1))[0]
        for template, outcome_class in (
            ("BitLocker Drive Encryption is not available on this edition of Windows", "not_applicable"),
            ("Drive not encrypted - manual intervention required", "escalated"),
            ("Runbook not found: AUTO-BITLOCKER_STATUS. Available: […]", "failure"),
            ("WMI query failed: Invalid namespace", "failure"),
            ("create shell: http response error: 401 - invalid content type", "unreachable"),
        )
    ]
    assert named == ["not_applicable", "escalated", "no_runbook", "missing_component", "unreachable"]


def test_causes_are_ranked_with_the_rate_if_they_and_all_before_were_gone() -> None:
    found = cause_families(
        [error("x", "failure", 10), error("y", "unreachable", 25), error("z", "failure", 5)],
        successes=60,
        executions=100,
    )
    assert [(f.family, f.failures, f.share, f.rate_if_fixed, f.template) for f in found] == [
        ("unreachable", 25, 0.625, 0.85, "y"),
        ("failure", 15, 0.375, 1.0, "x"),
    ]
    assert cause_families([], 1, 1) == []


def test_grouping_accuracy_counts_only_messages_whose_group_is_exactly_their_label() -> None:
    assert grouping_accuracy(["x", "x", "y", "z"], ["a", "a", "b", "c"]) == 1.0
    assert grouping_accuracy(["x", "x", "x", "z"], ["a", "a", "b", "c"]) == 0.25  # merged: both labels are wrong
    assert grouping_accuracy(["x", "y", "z", "z"], ["a", "a", "b", "b"]) == 0.5  # split: the label is wrong
    assert grouping_accuracy([], []) == 1.0
    with pytest.raises(ValueError, match="zip"):
        grouping_accuracy(["x"], [])


def test_the_failure_strings_of_the_field_are_grouped_as_their_causes() -> None:
    """Real forms of messages, with values that vary; labelled by hand."""
    forms = {
        "timeout": "Execution timed out after {n}s",
        "refused": 'create shell: Post "http://10.0.0.{n}:5985/wsman": dial tcp 10.0.0.{n}:5985: connect: connection refused',
        "unauthorized": "create shell: http response error: 401 - invalid content type",
        "forbidden": "create shell: http response error: 403 - invalid content type",
        "dns": "get session: TLS pin check for ws{n}.clinic.local: dial tcp: lookup ws{n}.clinic.local on 10.0.0.1:53: no such host",
        "action 16": "Unknown action: run_windows_runbook:RB-WIN-SEC-016",
        "action 17": "Unknown action: run_windows_runbook:RB-WIN-SEC-017",
        "linux": "Linux target not found: lnx-{n}",
        "wmi": "WMI query failed: 0x8004101{n}",
        "verify": "Phase 'verify' failed",
        "remediate": "Phase 'remediate' failed",
        "status 0": "ProtectionStatus=0",
        "status 2": "ProtectionStatus=2",
        "winrm": "no winrm credentials",
        "ssh": "no ssh credentials",
        "unit": "Failed to start unit-{n}.service on volume v_{n}",
    }
    labelled = [(form.format(n=n), label) for label, form in forms.items() for n in range(10)]
    messages, labels = [m for m, _ in labelled], [label for _, label in labelled]
    assert grouping_accuracy(MergedTemplates().of(messages), labels) == 1.0
