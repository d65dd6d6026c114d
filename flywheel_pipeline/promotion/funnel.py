"""The promotion funnel: how many patterns became rules, and how far those got, as figures and as a plot.

Belongs here: counting the registry's own tables. Does not belong here: delivery (`delivery/progress.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from flywheel_pipeline.sql_models.metadata import png_uri

MAX_PLOT_BYTES = 30_000


@dataclass(frozen=True)
class Funnel:
    """Patterns and promoted rules, as they stand now. One rule may stand for several patterns."""

    patterns: int
    patterns_promoted: int
    rules: int
    in_service: int
    on_every_machine: int
    quarantined: int

    @property
    def steps(self) -> list[tuple[str, int]]:
        """Label and count from the widest step to the narrowest."""
        return [
            ("patterns seen", self.patterns),
            ("patterns promoted", self.patterns_promoted),
            ("rules made of them", self.rules),
            ("rules in service", self.in_service),
        ]


def read_funnel(connection: sa.Connection) -> Funnel:
    """Count patterns and promoted rules; built-in rules were never patterns."""
    row = connection.execute(
        sa.text(
            """
            SELECT p.*, r.*
            FROM (SELECT count(*), count(*) FILTER (WHERE status = 'promoted') FROM patterns)
                   AS p (patterns, patterns_promoted)
            CROSS JOIN (
              SELECT count(*), count(*) FILTER (WHERE enabled), count(*) FILTER (WHERE enabled AND state = 'fleet'),
                     count(*) FILTER (WHERE state = 'quarantined')
              FROM l1_rules WHERE source = 'promoted'
            ) AS r (rules, in_service, on_every_machine, quarantined)
            """
        )
    ).one()
    return Funnel(*row)


def plot_funnel(funnel: Funnel) -> str:
    """Draw a bar a step, and what is out of service in red, as a PNG `data:` URI of at most 30 KB."""
    from matplotlib.figure import Figure  # 0.3 s: not at import

    bars = [
        *((label, n, "#2b5c9e" if label.startswith("patterns") else "#2f7d5b") for label, n in funnel.steps),
        ("on every machine", funnel.on_every_machine, "#2f7d5b"),
        ("quarantined", funnel.quarantined, "#b5534b"),
    ]
    # Margins by hand: a layout engine would draw it twice.
    figure = Figure(figsize=(6.0, 2.4))
    axes = figure.add_axes((0.2, 0.02, 0.79, 0.86))
    places = range(len(bars))
    axes.barh(places, [n for _, n, _ in bars], color=[colour for _, _, colour in bars], height=0.68)
    widest = max(1, *(n for _, n, _ in bars))
    for place, (_, n, _) in zip(places, bars, strict=True):
        axes.text(n + widest * 0.01, place, f"{n:,}", va="center", fontsize=8)
    axes.set_yticks(list(places), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.12)
    axes.set_xticks([])
    axes.set_title("From a pattern of L2 to a rule in service", fontsize=9, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return png_uri(figure, MAX_PLOT_BYTES)
