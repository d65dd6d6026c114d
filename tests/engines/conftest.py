"""Fixtures of the engines' tests."""

from __future__ import annotations

import pytest
from spark_cluster import require_java


@pytest.fixture
def spark_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark in local mode and its clusters listen on loopback alone; skips where Spark cannot run."""
    require_java()
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
