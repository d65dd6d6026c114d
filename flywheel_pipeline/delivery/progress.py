"""Rollout progress: how far the rules in service got, by stage and agent release, as a table and as a plot.

Belongs here: the figures of one materialization and their picture. Does not belong here: who may have a rule
(`manifest`) and how far one pair got (the model `deployments`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from flywheel_pipeline.delivery.capability import parse_version
from flywheel_pipeline.sql_models.metadata import png_uri

STATES = ("executed", "acknowledged", "delivered", "queued", "promoted", "withheld")
STAGES = ("canary", "ring", "fleet")
MAX_PLOT_BYTES = 30_000
MAX_BARS = 18
_COLOURS = {
    "executed": "#2f7d5b",
    "acknowledged": "#6aa886",
    "delivered": "#a9cdb8",
    "queued": "#e3c26f",
    "promoted": "#d7dbe0",
    "withheld": "#b5534b",
}


@dataclass(frozen=True)
class Progress:
    """Pairs of promoted rule and appliance of one stage and agent release, by the state that each got to."""

    stage: str
    agent_version: str
    counts: dict[str, int]

    @property
    def pairs(self) -> int:
        """All of them."""
        return sum(self.counts.values())


def rollout_progress(conn: sa.Connection) -> list[Progress]:
    """How far the promoted rules in service got, by stage and agent release: those wanted and those withheld.

    Returns:
        By stage in the order of a rollout, then by release, oldest first; releases that cannot be read come last.
    """
    rows = conn.execute(
        sa.text(
            """
            SELECT r.state AS stage, coalesce(nullif(btrim(a.agent_version), ''), 'unknown') AS agent_version,
                   d.state, count(*) AS pairs
            FROM deployments d
            JOIN l1_rules r ON r.rule_id = d.rule_id AND r.rule_version = d.rule_version
            JOIN appliances a ON a.appliance_id = d.appliance_id
            WHERE r.enabled AND (d.wanted OR d.state = 'withheld')
            GROUP BY 1, 2, 3
            """
        )
    ).all()
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        found.setdefault((row.stage, row.agent_version), dict.fromkeys(STATES, 0))[row.state] += row.pairs

    def order(key: tuple[str, str]) -> tuple[int, bool, tuple[int, ...], str]:
        version = parse_version(key[1])
        return STAGES.index(key[0]) if key[0] in STAGES else -1, version is None, tuple(version or ()), key[1]

    return [Progress(stage, version, found[stage, version]) for stage, version in sorted(found, key=order)]


def plot_progress(progress: Sequence[Progress]) -> str:
    """Draw a bar per stage and agent release, divided by how far its pairs got.

    Beyond 18 bars those with fewest pairs are left out, and the title says how many.

    Returns:
        A PNG as a `data:` URI of at most 30 KB, for `MetadataValue.md("![](…)")`.

    Raises:
        ValueError: nothing to draw.
    """
    if not progress:
        raise ValueError("a plot of rollout progress needs at least one rule that an appliance should run")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s: not at import
    from matplotlib.figure import Figure

    least = sorted((p.pairs for p in progress), reverse=True)[:MAX_BARS][-1]
    shown = [p for p in progress if p.pairs >= least][:MAX_BARS]
    figure = Figure(figsize=(6.4, 1.3 + 0.34 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(shown))
    left = [0.0] * len(shown)
    for state in STATES:
        shares = [100 * p.counts[state] / p.pairs for p in shown]
        if any(shares):
            axes.barh(places, shares, left=left, color=_COLOURS[state], height=0.7, label=state)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for place, p in zip(places, shown, strict=True):
        axes.text(101, place, f"{p.pairs:,}", va="center", fontsize=7)
    axes.set_yticks(list(places), [f"{p.stage} · {p.agent_version}" for p in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("% of pairs of rule and appliance (right: how many)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    left_out = len(progress) - len(shown)
    axes.set_title(
        "How far promoted rules got, by stage and agent release"
        + (f" ({left_out} smaller groups left out)" if left_out else ""),
        fontsize=9,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return png_uri(figure, MAX_PLOT_BYTES)
