"""The faults room uses rows and recounts of the aggregates room, the staged fleet of promotion, and live processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for _room in ("aggregates", "delivery", "pipeline", "promotion"):
    _path = str(Path(__file__).resolve().parents[1] / _room)
    if _path not in sys.path:
        sys.path.append(_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder has the marker `faults`."""
    here = Path(__file__).resolve().parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.faults)
