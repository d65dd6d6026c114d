"""Why a rule fails, as blocks of a page: one place that both reports take it from.

Belongs here: laying out what the health room found. Does not belong here: finding it. Templates are redacted already.
"""

from __future__ import annotations

from collections.abc import Sequence

from flywheel_pipeline.health.attribution import ErrorTemplate, WaterfallStep
from flywheel_pipeline.report import charts
from flywheel_pipeline.report.page import Block, Column, Table

TEMPLATES_SHOWN = 8


def cause_blocks(rule_id: str, steps: Sequence[WaterfallStep], errors: Sequence[ErrorTemplate]) -> list[Block]:
    """Return the waterfall, drawn and counted, and the error templates of one rule."""
    blocks: list[Block] = []
    if len(steps) > 1:
        blocks.append(charts.waterfall(steps, rule_id))
    blocks.append(
        Table(
            (
                Column("template", "error"),
                Column("outcome_class", "outcome class"),
                Column("count", "failures", "number"),
                Column("share", "of failures", "rate"),
                Column("hosts", "hosts", "number"),
            ),
            [
                {
                    "template": error.template,
                    "outcome_class": error.outcome_class.replace("_", " "),
                    "count": error.count,
                    "share": error.share,
                    "hosts": error.hosts,
                }
                for error in errors[:TEMPLATES_SHOWN]
            ],
            empty="No execution failed.",
            of=len(errors),
        )
    )
    return blocks
