"""Archives to write to: a folder, and an object store that has no folders and no rename."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from flywheel_pipeline.archive.layout import Archive


@pytest.fixture(params=["folder", "object store"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Archive]:
    """A yet empty archive of each kind."""
    if request.param == "folder":
        yield Archive.open(tmp_path / "archive", create=True)
        return
    root = f"memory://flywheel-{uuid.uuid4().hex}"
    yield Archive.open(root, create=True)
    memory = fsspec.filesystem("memory")
    if memory.exists(root):
        memory.rm(root, recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> Archive:
    """A yet empty archive on a folder."""
    return Archive.open(tmp_path / "archive", create=True)
