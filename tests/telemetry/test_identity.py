"""What the log's own words name: the functions that every row is asked, against the patterns that define them."""

from __future__ import annotations

import itertools

import sqlalchemy as sa

PATTERN = "^run_(?:windows_|linux_|macos_)?runbook:(.+)$"
FORMS = ("run_runbook", "run_windows_runbook", "run_linux_runbook", "run_macos_runbook")
ARGUMENTS = ("RB-WIN-SEC-016", "", " ", "a:b", "x\ny", "\n", "%", "_", "run_runbook:RB", "é", "L2-x")


def actions() -> list[str | None]:
    """Actions in the grammar and everything near it."""
    strange = ("runbook", "run_", "run__runbook", "xrun_runbook", "run_bsd_runbook", "RUN_RUNBOOK", "run-runbook", "")
    whole = [
        f"{form}{sign}{argument}"
        for form, sign, argument in itertools.product((*FORMS, *strange), (":", ""), ARGUMENTS)
    ]
    return [None, *whole, *(f" {text}" for text in whole), *(f"{text}\n" for text in whole)]


def test_an_action_names_the_runbook_that_the_pattern_finds(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT a, flywheel_action_runbook(a) AS found, "
                "substring(a from CAST(:pattern AS text)) AS wanted "
                "FROM unnest(CAST(:actions AS text[])) AS a"
            ),
            {"actions": actions(), "pattern": PATTERN},
        ).all()
    assert [(row.a, row.found) for row in rows] == [(row.a, row.wanted) for row in rows]
    assert sum(row.found is not None for row in rows) >= len(FORMS) * (len(ARGUMENTS) - 1)


def test_a_row_names_the_runbook_that_the_pattern_finds(engine: sa.Engine) -> None:
    texts = [None, "", "L2-", "L2-x", "L2-\nx", "xL2-y", *(f"L2-{a}" for a in actions() if a), *actions()]
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text(
                "WITH asked AS ("
                "  SELECT l, r, b, a FROM unnest(ARRAY['L1', 'L2', 'unknown']) AS l, "
                "  unnest(CAST(ARRAY[NULL, '', 'R-1', 'L2-x'] AS text[])) AS r, "
                "  unnest(CAST(:texts AS text[])) AS b, "
                "  unnest(CAST(ARRAY[NULL, '', 'run_runbook:', 'run_runbook:RB', 'other:RB'] AS text[])) AS a"
                "), named AS ("
                "  SELECT asked.*, substring(a from CAST(:pattern AS text)) AS told, "
                "  substring(substring(b from '^L2-(.+)$') from CAST(:pattern AS text)) AS legacy "
                "  FROM asked"
                ") SELECT l, r, b, a, flywheel_runbook_ref(l, r, b, a) AS found, "
                "CASE WHEN told IS NOT NULL THEN told WHEN l = 'L1' AND coalesce(r, '') IN ('', b) THEN '' "
                "ELSE coalesce(legacy, b) END AS wanted FROM named"
            ),
            {"texts": texts, "pattern": PATTERN},
        ).all()
    assert [row for row in rows if row.found != row.wanted] == []
    assert {row.found for row in rows} > {None, "", "RB", "L2-", "RB-WIN-SEC-016"}
