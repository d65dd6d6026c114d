"""Which runbook fields name no script."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flywheel_pipeline.promotion.runbook_ids import is_placeholder

CATALOGUE = yaml.safe_load((files("flywheel_pipeline.database") / "seeds" / "runbooks.yaml").read_text("utf-8"))


@pytest.mark.parametrize(
    "runbook_id",
    [
        "AUTO-BITLOCKER_STATUS",
        "AUTO-SMB_SIGNING",
        "auto-firewall",
        " AUTO-FIREWALL ",
        "L2-restart_service",
        "ESCALATE",
        "escalate",
        "ESC-001",
        "UNASSIGNED-L1-SSH-001",
        "general",
        "unknown",
        "",
        "   ",
        None,
    ],
)
def test_placeholders_and_pseudo_runbooks_name_no_script(runbook_id):
    assert is_placeholder(runbook_id)


@pytest.mark.parametrize(
    "runbook_id",
    ["RB-WIN-SEC-001", "LIN-SSH-001", "MAC-FV-001", "RB-AUTO-FIREWALL", "GENERAL-001", "UNKNOWN-HOSTS", "ESCALATED"],
)
def test_the_prefix_is_anchored_and_never_a_contains(runbook_id):
    assert not is_placeholder(runbook_id)


def test_no_runbook_of_the_catalogue_is_a_placeholder():
    rows = CATALOGUE if isinstance(CATALOGUE, list) else next(iter(CATALOGUE.values()))
    assert len(rows) == 51
    assert not [row["runbook_id"] for row in rows if is_placeholder(row["runbook_id"])]


@given(st.text(max_size=20))
def test_whatever_stands_before_the_prefix_makes_it_another_name(name):
    if name.strip(" "):
        assert not is_placeholder(f"x{name}AUTO-FIREWALL")
    assert is_placeholder(f"AUTO-{name}")
