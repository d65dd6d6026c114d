"""The backtest as a Dagster asset: every night, what each policy would have done with the history there is.

Belongs here: running the backtest and showing it. Does not belong here: the backtest itself (`backtest.py` for fleets of
known truth, `history.py` for the database).
"""

import base64
import time

import dagster as dg
from pydantic import Field

from flywheel_pipeline.aggregates.batches import open_batch
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.materialized import data_lag
from flywheel_pipeline.promotion.policy import load_policy, policy_names
from flywheel_pipeline.sql_models.assets import PREVIEW_ROWS
from flywheel_pipeline.sql_models.metadata import markdown_table

TRUE_RATES = (0.70, 0.80, 0.85, 0.90, 0.95, 0.98)


class BacktestConfig(dg.Config):
    """Which policies are replayed (empty: all there are), and on how many simulated fleets for each true rate."""

    policies: list[str] = Field(default=[], description="names of policies; empty: all")
    runs: int = 40
    seed: int = 1


@dg.asset(
    group_name="promotion",
    deps=["pattern_evidence", "pattern_candidates"],
    description=(
        "What each policy would have promoted, and how often wrongly: history replayed a look a day, and simulated fleets "
        "of known truth. Materialized at night and on demand; it decides nothing and changes nothing."
    ),
    owners=["team:data-platform"],
    kinds={"python", "postgres"},
)
def policy_backtest(
    context: dg.AssetExecutionContext, database: FlywheelDatabase, config: BacktestConfig
) -> dg.MaterializeResult[None]:
    """Replay history and simulated fleets through the policies."""
    begun = time.monotonic()
    # Imported here: numpy and matplotlib have no place on the minute path.
    from flywheel_pipeline.promotion import backtest
    from flywheel_pipeline.promotion.history import backtest_history

    chosen = [load_policy(name) for name in config.policies or policy_names()]
    with database.engine.begin() as connection:
        batch = open_batch(connection, context.run.run_id)
    with database.engine.connect() as connection:
        replayed = backtest_history(connection, batch, chosen)
    plans = [backtest.even_fleet(rate) for rate in TRUE_RATES]
    simulated = backtest.compare_on_fleets(
        chosen,
        [*plans, backtest.dead_sites(), backtest.giant_site()],
        backtest.ideal_facts(),
        runs=config.runs,
        seed=config.seed,
    )
    even = {plan.name for plan in plans}
    image = backtest.plot([row for row in simulated if row["fleet"] in even])
    served = [row for row in replayed if row["served_day"]]
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    return dg.MaterializeResult(
        metadata={
            "plot": dg.MetadataValue.md(f"![promotions by true success rate]({uri})"),
            "fleets": dg.MetadataValue.md(
                markdown_table(simulated, ["fleet", "policy", "promoted", "false_promotion", "median_episodes", "runs"])
            ),
            "history": dg.MetadataValue.md(
                markdown_table(
                    served[:50],
                    [
                        "pattern",
                        "policy",
                        "served_day",
                        "fleet_day",
                        "episodes_before",
                        "later_failures",
                        "later_episodes",
                    ],
                )
            ),
            "preview": dg.MetadataValue.md(markdown_table(simulated[:PREVIEW_ROWS])),
            "dagster/row_count": len(simulated),
            **data_lag(batch),
            "duration_seconds": round(time.monotonic() - begun, 3),
            "patterns": len({row["pattern"] for row in replayed}),
            **{f"served_by_{p.name}": sum(row["policy"] == p.name for row in served) for p in chosen},
        }
    )
