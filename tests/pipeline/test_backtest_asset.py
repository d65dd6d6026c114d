"""The backtest as an asset: legacy against standard on the day's history and on fleets of known truth."""

from __future__ import annotations

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.promotion.backtest_asset import policy_backtest


def test_the_backtest_shows_legacy_promoting_what_standard_does_not_and_changes_nothing(played_copy: sa.Engine) -> None:
    with played_copy.connect() as connection:
        before = connection.exec_driver_sql("SELECT count(*), max(event_id) FROM rule_events").one()
    url = played_copy.url.render_as_string(hide_password=False)
    definitions = build_defs(resources={"database": FlywheelDatabase(url=url)})
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [policy_backtest],
            instance=instance,
            resources=definitions.resources,
            selection=[policy_backtest],
            run_config={"ops": {"policy_backtest": {"config": {"policies": ["legacy", "standard"], "runs": 10}}}},
        )
    (materialization,) = result.asset_materializations_for_node("policy_backtest")
    shown = {key: value.value for key, value in materialization.metadata.items()}
    # The three of the day, and the three that legacy had reasons to promote before.
    assert (shown["patterns"], shown["served_by_legacy"], shown["served_by_standard"]) == (16, 6, 0)
    assert str(shown["plot"]).startswith("![promotions by true success rate](data:image/png;base64,")
    assert len(str(shown["plot"])) < 60_000
    assert "every site 85%" in str(shown["fleets"])
    with played_copy.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*), max(event_id) FROM rule_events").one() == before
