"""One picture of a score: how far each pattern got, when, and when its evidence sufficed.

Belongs here: drawing. Does not belong here: scoring (`score`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final

_COLOURS: Final = {"shadow": "#c9ced6", "canary": "#f0b64d", "ring": "#6aa9d8", "fleet": "#4c9f70"}


def plot(scored: Mapping[str, Any], days: float) -> bytes:
    """Draw a score as a PNG: one line per pattern, its stages over the simulated days, false ones hatched in red.

    Args:
        scored: of `score.score`.
        days: the length of the simulated time.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    patterns = list(scored["patterns"])
    figure = Figure(figsize=(9.0, 1.6 + 0.42 * max(len(patterns), 1)), dpi=90, layout="constrained")
    axes = figure.subplots()
    for row, pattern in enumerate(patterns):
        stages = sorted(pattern["stages"].items(), key=lambda item: item[1]["day"])
        for number, (stage, entered) in enumerate(stages):
            until = stages[number + 1][1]["day"] if number + 1 < len(stages) else days
            axes.barh(
                row,
                max(until - entered["day"], 0.05),
                left=entered["day"],
                height=0.6,
                color=_COLOURS[stage],
                edgecolor="#c0392b" if entered["false"] else "white",
                hatch="///" if entered["false"] else None,
            )
        if pattern["crossed_day"] is not None:
            axes.plot([pattern["crossed_day"]], [row], marker="|", markersize=14, color="black")
    axes.set_yticks(
        range(len(patterns)),
        [f"{p['pattern_key'].rpartition('~')[0]}  {p['true_rate']:.1%}" for p in patterns],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, days)
    axes.set_xlabel("simulated day")
    axes.set_title(f"{scored['scenario']}, seed {scored['seed']}, policy {scored['policy']}", fontsize=9, loc="left")
    handles: list[Any] = [Patch(color=colour, label=stage) for stage, colour in _COLOURS.items()]
    handles.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=10, label="evidence suffices"))
    axes.legend(handles=handles, fontsize=7, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
