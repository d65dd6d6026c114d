"""The soak, bounded: one fault of each kind that needs no daemon, under writers and pipelines."""

from __future__ import annotations

import pytest
import soak


@pytest.mark.timeout(300)
def test_a_short_soak_loses_nothing_and_counts_nothing_twice() -> None:
    arguments = soak.parse(["--quick", "--rows", "6000", "--writers", "4"])
    report = soak.soak(arguments, lambda _line: None)
    assert report.differences == []
    assert report.illegal == []
    assert report.unexcused == []
    assert report.left_out.keys() <= {"disk full"}
    assert sum(report.faults.values()) == 17
    assert len(report.faults) >= 16
    assert report.rows >= 5000
    assert report.retries > 0  # the faults did hit writers
    assert report.corrections > 0
    assert report.rejected > 0
    assert sum(report.runs.values()) > 0
