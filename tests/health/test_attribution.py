from __future__ import annotations

import base64
import random
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.health.attribution import (
    ADVICE,
    EXCLUDED_CLASSES,
    MAX_PLOT_BYTES,
    NO_MESSAGE,
    RATED_CLASSES,
    error_templates,
    mask,
    percent,
    plot_waterfall,
    waterfall,
    waterfall_markdown,
)

CLASSES = [*EXCLUDED_CLASSES, *RATED_CLASSES]


@pytest.mark.parametrize(
    ("message", "template"),
    [
        (
            "Unknown action: run_windows_runbook:RB-WIN-SEC-016",
            "Unknown action: run_windows_runbook:RB-WIN-SEC-016",
        ),
        ("Drive not encrypted - manual intervention required",) * 2,
        (
            "Runbook not found: AUTO-BITLOCKER_STATUS. Available: [LIN-SSH-001 LIN-SSH-002]",
            "Runbook not found: AUTO-BITLOCKER_STATUS. Available: […]",
        ),
        ("No encryptable volumes found", "No encryptable volumes found"),
        ("ProtectionStatus=0", "ProtectionStatus=0"),
        ("Phase 'verify' failed", "Phase 'verify' failed"),
        (
            "create shell: http response error: 401 - invalid content type",
            "create shell: http response error: 401 - invalid content type",
        ),
        ("Execution timed out after 60s", "Execution timed out after <n>s"),
        ("No Windows target available", "No Windows target available"),
        ("Linux target not found: lnx-backup", "Linux target not found: <host>"),
        (
            "get session: TLS pin check for ws01.clinic.local: dial tcp: lookup ws01.clinic.local "
            "on 192.168.88.1:53: no such host",
            "get session: TLS pin check for <host>: dial tcp: lookup <host> on <ip>: no such host",
        ),
        ("no ssh credentials", "no ssh credentials"),
        (
            "Persistent flap suppression active for bitlocker_status",
            "Persistent flap suppression active for bitlocker_status",
        ),
        (
            "dial tcp 192.168.88.244:5985: connect: connection refused",
            "dial tcp <ip>: connect: connection refused",
        ),
        ("WMI query failed: 0x80041010 on DESKTOP-A1B2C3", "WMI query failed: <hex> on <host>"),
        ("", NO_MESSAGE),
        (None, NO_MESSAGE),
        ("\n  \n second line\nthird", "second line"),
    ],
)
def test_the_messages_of_production_have_these_templates(message: str | None, template: str) -> None:
    assert mask(message) == template


@pytest.mark.parametrize(
    "secret",
    [
        "jane.doe@clinic.example",
        "S-1-5-21-3623811015-3361044348-30300820-1013",
        "CLINIC\\jdoe",
        r"C:\Users\jdoe\AppData",
        r"\\FILESRV\home\jdoe",
        "/home/jdoe/.ssh/id_rsa",
        "fe80::1ff:fe23:4567:890a",
        "2001:db8:0:0:0:0:2:1",
        "00:1a:2b:3c:4d:5e",
        "https://portal.clinic.example/x?token=abc",
        "NVDC01",
        "reception-3.clinic.lan",
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "username=jdoe",
        "user 'jdoe'",
        "for user jdoe",
    ],
)
def test_what_names_a_person_or_a_host_leaves_no_trace(secret: str) -> None:
    template = mask(f"step failed: {secret} refused")
    for word in (
        "jdoe",
        "jane",
        "clinic",
        "NVDC",
        "reception",
        "3623811015",
        "db8",
        "4567",
        "1a:2b",
        "token",
        "4f89",
    ):
        assert word not in template
    assert template.startswith("step failed: ")
    assert template.endswith(" refused")


def test_known_hosts_are_masked_in_any_case_and_with_their_domain() -> None:
    hosts = ["front-desk", "front-desk-2", "", "it"]
    assert mask("FRONT-DESK is down, front-desk-2.corp too; it hangs, visit", hosts) == (
        "<host> is down, <host> too; <host> hangs, visit"
    )


def test_causes_that_differ_in_a_status_code_or_a_runbook_stay_apart() -> None:
    assert mask("http response error: 401") != mask("http response error: 500")
    assert mask("Runbook not found: AUTO-A") != mask("Runbook not found: AUTO-B")
    assert mask("TLS 1.2 refused") == "TLS 1.2 refused"


def test_ordinary_words_are_no_hosts() -> None:
    for text in (
        "System.Net.WebException: no such host",
        "No route to host",
        "user not found",
        "account disabled",
        "UTF-8 expected, AES-256 offered",
        "Get-BitLockerVolume: access denied",
        "Class::Method",
        "resume :: done",
    ):
        assert mask(text) == text


@given(st.text(max_size=300))
def test_masking_a_template_changes_nothing(message: str) -> None:
    template = mask(message)
    assert mask(template) == template
    assert 0 < len(template) <= 200


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.ip_addresses(v=4), st.ip_addresses(v=4))
def test_messages_that_differ_in_numbers_and_addresses_share_a_template(
    n: int, m: int, one: object, two: object
) -> None:
    assert mask(f"host {one}:5985 gave up after {n} tries") == mask(f"host {two}:5985 gave up after {m} tries")


@given(st.ip_addresses(v=6).filter(int))  # the unspecified address :: names nothing
def test_any_ipv6_address_is_masked(address: object) -> None:
    assert mask(f"dial {address} failed") == "dial <ip> failed"
    assert mask(f"dial [{address}]:443 failed: {address}.") == "dial [<ip>]:<n> failed: <ip>."
    assert mask(f"{address}: refused, then {address}") == "<ip>: refused, then <ip>"


failures = st.lists(
    st.tuples(
        st.sampled_from(CLASSES),
        st.sampled_from([None, "timed out after 60s", "timed out after 90s", "401", "on ws-a", "on ws-b", "other"]),
        st.sampled_from(["ws-a", "ws-b", "vm-c"]),
        st.integers(1, 50),
    ),
    max_size=20,
)


@given(failures, st.randoms(use_true_random=False))
def test_templates_add_up_whatever_the_order_and_grouping(
    rows: list[tuple[str, str | None, str, int]], rng: random.Random
) -> None:
    found = error_templates(rows)
    assert sum(e.count for e in found) == sum(row[3] for row in rows)
    assert sum(e.share for e in found) == pytest.approx(1.0 if rows else 0.0)
    assert [e.count for e in found] == sorted((e.count for e in found), reverse=True)
    one_by_one = [(c, m, h, 1) for c, m, h, n in rows for _ in range(n)]
    rng.shuffle(one_by_one)
    assert error_templates(one_by_one) == found


def test_templates_count_distinct_hosts_and_mask_them_in_each_others_messages() -> None:
    found = error_templates([("failure", "lost ws-b", "ws-a", 2), ("failure", "lost ws-a", "ws-b", 3)])
    assert [(e.template, e.count, e.hosts, e.share) for e in found] == [("lost <host>", 5, 2, 1.0)]


counts = st.dictionaries(
    st.sampled_from(CLASSES),
    st.integers(0, 5000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
)


@given(counts)
def test_a_waterfall_loses_nothing_and_ends_at_failure_and_success(
    by_class: dict[str, tuple[int, int]],
) -> None:
    steps = waterfall(by_class)
    assert steps[0].executions == sum(n for n, _ in by_class.values())
    assert steps[0].executions - sum(s.removed for s in steps) == steps[-1].executions
    assert steps[-1].executions == sum(by_class.get(c, (0, 0))[0] for c in RATED_CLASSES)
    assert steps[-1].successes == sum(by_class.get(c, (0, 0))[1] for c in RATED_CLASSES)
    for step in steps:
        assert (step.rate is None) == (step.executions == 0)
        assert step.rate is None or step.rate == step.successes / step.executions


def test_the_bitlocker_waterfall_goes_from_thirty_percent_upwards() -> None:
    steps = waterfall(
        {
            "agent_unsupported": (600, 0),
            "not_applicable": (500, 0),
            "unreachable": (400, 0),
            "escalated": (340, 0),
            "failure": (300, 0),
            "success": (917, 917),
        }
    )
    assert steps[0].rate == 917 / 3057
    assert [s.label for s in steps] == [
        "all executions",
        "agent_unsupported",
        "not_applicable",
        "unreachable",
        "escalated",
    ]
    rates = [s.rate for s in steps if s.rate is not None]
    assert rates == sorted(rates)
    assert rates[-1] == 917 / 1217


def test_a_rate_over_nothing_is_null_and_says_so() -> None:
    assert waterfall({})[0].rate is None
    assert waterfall({"unreachable": (5, 0)})[-1].rate is None
    assert percent(None) == "no data"
    assert "no data" in waterfall_markdown(waterfall({"unreachable": (5, 0)}))


def test_impossible_counts_and_unknown_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown outcome class: cosmic_rays"):
        waterfall({"cosmic_rays": (1, 0)})
    with pytest.raises(ValueError, match="failure: 2 successes of 1"):
        waterfall({"failure": (1, 2)})


def test_there_is_advice_for_every_outcome_class() -> None:
    assert set(ADVICE) == set(CLASSES)


def test_the_plot_is_a_png_of_at_most_thirty_kilobytes() -> None:
    uri = plot_waterfall(waterfall({c: (1000 + i, i) for i, c in enumerate(CLASSES)}), "RB-AUTO-BITLOCKE")
    assert len(uri) <= MAX_PLOT_BYTES == 30 * 1024
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    image = base64.b64decode(data, validate=True)
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert width > 300
    assert height > 150


def test_the_plot_of_no_data_can_be_drawn_and_of_no_steps_cannot() -> None:
    assert plot_waterfall(waterfall({}), "empty").startswith("data:image/png")
    with pytest.raises(ValueError, match="first step"):
        plot_waterfall([], "nothing")


def test_importing_health_does_not_import_matplotlib() -> None:
    code = "import sys, flywheel_pipeline.health.failing_rules; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
