"""What materializations of any room say alike: how old the newest data are, and plots that are drawn when they change.

Belongs here: what one step of a run leaves for the next ones, and what is read back from the event log. Does not belong
here: any figure of a room.

The steps of a run share one process (`in_process_executor`), so what was found in one is at hand in the next; in another
process it is read again, or not said.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import dagster as dg

from flywheel_pipeline.aggregates.batches import Batch

#: A plot costs a tenth of a second, a run two: where its figures change with every run, it is as old as this at most.
REDRAWN_AFTER: Final = dt.timedelta(minutes=15)
#: Assets that show kept plots: their last materializations are read together, since each look at the event log costs
#: a connection of its own (20 ms and more).
PLOTTED: Final = ("rule_cusum", "l1_rules", "deployments")

Metadata = Mapping[str, dg.MetadataValue[Any]]


@dataclass
class _Run:
    """What is known in this process of the run that it executes."""

    run_id: str
    newest: dt.datetime | None = None
    before: Mapping[str, Metadata] | None = None


_current = _Run("")


def _of(run_id: str) -> _Run:
    global _current  # one run at a time in a process
    if _current.run_id != run_id:
        _current = _Run(run_id)
    return _current


def note_arrival(batch: Batch, newest: dt.datetime | None) -> None:
    """Keep, for the steps to come, when the newest telemetry that this run has counted arrived; None: none did."""
    _of(batch.run_id).newest = newest


def data_lag(batch: Batch) -> dict[str, float]:
    """Return {data_lag_seconds}: from the arrival of the newest telemetry counted in this run to now.

    Empty where this run counted nothing new. By the batch's clock.
    """
    newest = _of(batch.run_id).newest
    return {} if newest is None else {"data_lag_seconds": round(max(0.0, (batch.now - newest).total_seconds()), 3)}


def _before(instance: dg.DagsterInstance, run_id: str, asset: str) -> Metadata:
    run = _of(run_id)
    if run.before is None:
        events = instance.event_log_storage.get_latest_materialization_events([dg.AssetKey(name) for name in PLOTTED])
        run.before = {
            key.to_user_string(): event.asset_materialization.metadata
            for key, event in events.items()
            if event is not None and event.asset_materialization is not None
        }
    return run.before.get(asset, {})


def kept_plot(
    context: dg.AssetExecutionContext, asset: str, name: str, words: str, draw: Callable[[], str]
) -> dict[str, dg.MetadataValue[Any]]:
    """Return a plot as Markdown with the time it was drawn; the one of the last materialization as long as it holds.

    It holds while `words` are the same and 15 minutes have not passed.

    Args:
        context: of the step.
        asset: one of `PLOTTED`, which shows it.
        name: of the metadata.
        words: what it shows, for those who do not see it; what is no letter, digit or `-_.,:~%` becomes `_`.
        draw: gives an image as a `data:` URI.
    """
    head = f"![{''.join(c if c.isalnum() or c in '-_.,:~% ' else '_' for c in words)}]("
    before = _before(context.instance, context.run.run_id, asset)
    drawn, plot = before.get(f"{name}_drawn_at"), before.get(name)
    now = dt.datetime.now(dt.UTC)
    if (
        isinstance(drawn, dg.TimestampMetadataValue)
        and now.timestamp() - drawn.value < REDRAWN_AFTER.total_seconds()
        and isinstance(plot, dg.MarkdownMetadataValue)
        and (plot.value or "").startswith(head)
    ):
        return {name: plot, f"{name}_drawn_at": drawn}
    return {name: dg.MetadataValue.md(f"{head}{draw()})"), f"{name}_drawn_at": dg.MetadataValue.timestamp(now)}
