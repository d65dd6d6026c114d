"""What names a host or a person leaves no site, in whatever field it was reported."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.health import report
from flywheel_pipeline.health.attribution import known_hosts
from flywheel_pipeline.health.redaction import WITHHELD, public_value
from flywheel_pipeline.health.why import why

HOSTS = ["FRONT-DESK", "WS-01", "janes-mac", "x"]


@pytest.mark.parametrize(
    ("dimension", "value"),
    [
        ("os", "Windows 10"),
        ("os", "Windows Server 2022"),
        ("os", "Ubuntu 22.04.3 LTS"),
        ("os", "macOS 14.5"),
        ("hardware", "vm-no-tpm"),
        ("hardware", "Dell OptiPlex 7090"),
        ("hardware", "laptop"),
        ("agent_version", "1.0.56"),
        ("agent_version", "v1.0.56-rc1"),
        ("site", "site-a"),
        ("since", "2026-01-05"),
    ],
)
def test_what_a_condition_is_about_may_leave(dimension: str, value: str) -> None:
    assert public_value(dimension, value, known_hosts(HOSTS)) == value


@pytest.mark.parametrize("dimension", ["os", "hardware", "agent_version"])
@pytest.mark.parametrize(
    "value",
    [
        "FRONT-DESK",
        "laptop of front-desk",
        "Jane's MacBook",
        "Dr. Meyer laptop",
        "laptop for jdoe",
        "jane.doe@clinic.example",
        "CLINIC\\jdoe",
        r"C:\Users\jdoe",
        "/home/jdoe/x",
        "10.1.2.3",
        "fe80::1ff:fe23:4567:890a",
        "00:1a:2b:3c:4d:5e",
        "reception.clinic.lan",
        "https://evil.example/x",
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
        "![x](https://evil.example/x.png)",
        "<script>alert(1)</script>",
        "a | b",
        "`rm -rf`",
        "line\nbreak",
        "right\u202eto left",
        "x" * 61,
    ],
)
def test_what_names_a_host_or_a_person_or_breaks_a_page_is_withheld(dimension: str, value: str) -> None:
    assert public_value(dimension, value, known_hosts(HOSTS)) == WITHHELD


@given(st.sampled_from(HOSTS), st.text(" ,;()", max_size=3), st.text(" ,;()", max_size=3))
def test_a_known_host_is_withheld_wherever_it_stands(host: str, before: str, after: str) -> None:
    for spelled in (host, host.lower(), host.upper()):
        assert public_value("hardware", f"vm {before}{spelled}{after}", known_hosts(HOSTS)) == WITHHELD


SECRETS = ("FRONT-DESK-", "meyer", "jdoe", "clinic.lan", "10.20.30", "4567")


@pytest.fixture
def conn(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection, connection.begin() as transaction:
        yield connection
        transaction.rollback()


def test_an_answer_names_no_host_whatever_agents_reported(conn: sa.Connection) -> None:
    conn.execute(
        sa.text(
            """
            INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, platform, incident_type,
              agent_version, started_at, success, verification_passed, resolution_level, error_message, error_step, tags)
            SELECT 'h' || n, 'site-' || n % 4, 'L1-FIREWALL-001', 'FRONT-DESK-' || n % 40, 'windows', 'firewall',
              CASE WHEN n % 40 < 12 THEN 'build for jdoe' ELSE '1.0.74' END, :now - n * interval '1 hour',
              n % 40 >= 12, CASE WHEN n % 40 >= 12 THEN true END, 'L1',
              'Dr. Meyer (CLINIC\\jdoe) at front-desk-' || n % 40 || '.clinic.lan [see](https://x.clinic.lan/' || n
                || ') from 10.20.30.' || n % 40 || ' | fe80::1ff:fe23:4567:' || n,
              2, jsonb_build_object('hardware', CASE WHEN n % 40 < 12 THEN 'Dr. Meyer laptop' ELSE 'desktop' END,
                'os', CASE WHEN n % 40 < 12 THEN '![a](https://x.clinic.lan)' ELSE 'Windows 11' END)
            FROM generate_series(1, 800) AS n
            """
        ),
        {"now": dt.datetime(2026, 2, 15, tzinfo=dt.UTC)},
    )
    found = why(conn, "L1-FIREWALL-001")
    assert found.segments, "the planted release is a cause"
    assert found.segments[0].conditions[0].value == WITHHELD
    page = report.markdown(found)
    for text in (json.dumps(report.as_json(found)), page, report.sentence(found), *report.spread_lines(found)):
        for secret in SECRETS:
            assert secret.lower() not in text.lower(), secret
    # The bracket of a link is escaped, so the page shows it as text.
    assert "\\[see]" in page
    assert re.search(r"(?<!\\)\[[^\]]*\]\(", page) is None
