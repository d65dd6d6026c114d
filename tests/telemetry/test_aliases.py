"""Aliases of rules and sites on a real database."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from posts import NOW, post, rows, scalar

from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.telemetry.aliases import Alias, add_rule_alias, add_site_alias, list_aliases
from flywheel_pipeline.telemetry.intake import post_execution

MARCH = datetime(2026, 3, 1, tzinfo=UTC)
APRIL = datetime(2026, 4, 1, tzinfo=UTC)
WHO = {"actor": "jane", "reason": "renamed"}


def test_an_alias_is_listed_with_who_and_why(engine: sa.Engine):
    with engine.begin() as connection:
        add_rule_alias(connection, "RB-AUTO-BITLOCK", "RB-AUTO-BITLOCKE", MARCH, **WHO)
        add_site_alias(connection, "site-old", "site-new", **WHO)
        (rule,) = list_aliases(connection, "rule")
        (site,) = list_aliases(connection, "site")
    assert isinstance(rule, Alias)
    assert (rule.alias, rule.target, rule.valid_from, rule.valid_to) == (
        "RB-AUTO-BITLOCK",
        "RB-AUTO-BITLOCKE",
        MARCH,
        None,
    )
    assert (rule.actor, rule.reason) == ("jane", "renamed")
    assert (site.kind, site.alias, site.target, site.valid_from) == ("site", "site-old", "site-new", None)


def test_saying_the_same_alias_again_changes_nothing(engine: sa.Engine):
    with engine.begin() as connection:
        first = add_site_alias(connection, "site-old", "site-new", MARCH, APRIL, **WHO)
        again = add_site_alias(connection, "site-old", "site-new", MARCH, APRIL, **WHO)
    assert first == again
    assert scalar(engine, "SELECT count(*) FROM site_aliases") == 1


def test_one_alias_means_one_thing_at_a_time_but_may_change_hands(engine: sa.Engine):
    with engine.begin() as connection:
        add_rule_alias(connection, "R-OLD", "R-1", None, MARCH, **WHO)
        add_rule_alias(connection, "R-OLD", "R-2", MARCH, None, **WHO)
        with pytest.raises(UsageError, match="already holds"):
            add_rule_alias(connection, "R-OLD", "R-3", APRIL, None, **WHO)
        with pytest.raises(UsageError, match="chain"):
            add_rule_alias(connection, "R-OLDER", "R-OLD", **WHO)
        assert len(list_aliases(connection, "rule")) == 2


@pytest.mark.parametrize(
    ("alias", "target", "times", "who"),
    [
        (" ", "R-1", (None, None), WHO),
        ("R-0", "", (None, None), WHO),
        ("R-1", "R-1", (None, None), WHO),
        ("R-0", "R-1", (APRIL, MARCH), WHO),
        ("R-0", "R-1", (datetime(2026, 3, 1), None), WHO),  # noqa: DTZ001 - that is the point
        ("R-0", "R-1", (None, None), {"actor": "", "reason": "renamed"}),
        ("R-0", "R-1", (None, None), {"actor": "jane", "reason": " "}),
    ],
)
def test_an_alias_without_sense_is_refused_in_a_sentence(
    engine: sa.Engine,
    alias: str,
    target: str,
    times: tuple[datetime | None, datetime | None],
    who: dict[str, str],
):
    with engine.begin() as connection, pytest.raises(UsageError) as refusal:
        add_rule_alias(connection, alias, target, *times, **who)
    assert refusal.value.message.endswith(".")
    assert scalar(engine, "SELECT count(*) FROM rule_aliases") == 0


def test_an_alias_touches_the_cells_it_reattributes_and_rewrites_no_row(engine: sa.Engine):
    post_execution(engine, post(site_id="site-old"), received_at=NOW)
    before = rows(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM touched_cells"))
        add_site_alias(connection, "site-old", "site-new", **WHO)
    assert rows(engine) == before
    assert scalar(engine, "SELECT count(DISTINCT site_id) FROM touched_cells") == 2


def test_a_correction_under_the_sites_new_name_is_the_same_execution(engine: sa.Engine):
    post_execution(engine, post(site_id="site-old"), received_at=NOW)
    renamed = post(site_id="site-new", reported=5, success=False, status="failure")
    assert post_execution(engine, renamed, received_at=NOW).reason_code == "conflicting_identity"
    with engine.begin() as connection:
        add_site_alias(connection, "site-old", "site-new", **WHO)
    assert post_execution(engine, renamed, received_at=NOW).outcome == "corrected"
    row = rows(engine)["exec-1"]
    assert (row["site_id"], row["success"]) == ("site-old", False)
