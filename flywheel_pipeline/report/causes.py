"""Why a rule fails, as blocks of a page: one place that both reports take it from.

Belongs here: laying out what the health room found. Does not belong here: finding it. Templates are redacted already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flywheel_pipeline.health.attribution import ErrorTemplate, WaterfallStep
from flywheel_pipeline.report import charts
from flywheel_pipeline.report.page import Block, Column, Prose, Table

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


def attribution_blocks(attribution: Mapping[str, Any] | None) -> list[Block]:
    """Return a kept attribution as blocks: its sentence, where the rule fails, and what fails; nothing for None.

    Args:
        attribution: JSON types, as `explain` gives it under `why`: sentence, segments [{words, also, executions,
            failures, hosts, share, rate, rate_if_fixed, advice}], families [{what, failures, share, rate_if_fixed,
            template, advice}]; rates and shares are fractions.
    """
    if attribution is None:
        return []
    blocks: list[Block] = [Prose(attribution["sentence"])] if attribution["sentence"] else []
    blocks.append(
        Table(
            (
                Column("cause", "where it fails"),
                Column("executions", "executions", "number"),
                Column("failures", "failures", "number"),
                Column("hosts", "hosts", "number"),
                Column("share", "of failures", "rate"),
                Column("rate", "rate there", "rate"),
                Column("rate_if_fixed", "rule's rate if fixed", "rate"),
                Column("advice", "what to do"),
            ),
            [
                {**segment, "cause": "; the same hosts: ".join([segment["words"], *segment["also"]])}
                for segment in attribution["segments"]
            ],
            caption="Where it fails",
            empty="No site, release, hardware, system or time stands out beyond chance.",
        )
    )
    blocks.append(
        Table(
            (
                Column("what", "what fails"),
                Column("failures", "failures", "number"),
                Column("share", "of failures", "rate"),
                Column("rate_if_fixed", "rule's rate if gone", "rate"),
                Column("template", "most frequent error"),
                Column("advice", "what to do"),
            ),
            list(attribution["families"]),
            caption="What fails",
            empty="No execution failed.",
        )
    )
    return blocks
