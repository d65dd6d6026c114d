"""Removing what no manifest names: remains of exports that did not finish, and generations that were exchanged.

Belongs here: finding and removing them. Does not belong here: any file that a manifest names.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from flywheel_pipeline.archive.days import exclude_others
from flywheel_pipeline.archive.layout import MANIFESTS, TABLES, Archive

GRACE_HOURS = 24.0


@dataclass(frozen=True)
class Remains:
    """A file that no manifest names. `path` is relative to the root."""

    path: str
    bytes: int


def sweep(
    engine: sa.Engine, archive: Archive, *, grace_hours: float = GRACE_HOURS, dry_run: bool = False
) -> list[Remains]:
    """Remove the files that no manifest names, and return them; while nobody exports.

    Files of an export after which its day was purged are left, whatever the manifests say: nobody else holds those rows.

    Args:
        engine: the database whose exports are excluded meanwhile.
        archive: the archive.
        grace_hours: files written, or days exported, within so many hours are left: a reader may still hold the manifest
            that names them.
        dry_run: remove nothing.

    Raises:
        ManifestRefused: a manifest cannot be read, so nobody knows what it names; nothing was removed.
        ArchiveUnreachable: the file system did not answer.
    """
    with engine.begin() as connection:
        exclude_others(connection)
        before = dt.datetime.now(dt.UTC) - dt.timedelta(hours=grace_hours)
        sealed = connection.exec_driver_sql(
            "SELECT day, archived_generation FROM sealed_days WHERE archived_generation IS NOT NULL"
        )
        found = _unnamed(archive, before, {row.day.isoformat(): row.archived_generation for row in sealed})
        if not dry_run:
            with archive.reaching("cannot be swept"):
                for remains in found:
                    archive.fs.rm_file(archive.full_path(remains.path))
    return found


def _unnamed(archive: Archive, before: dt.datetime, sealed: Mapping[str, str]) -> list[Remains]:
    manifests = [archive.read_manifest(day) for day in archive.days()]
    named = {file.path for manifest in manifests for file in manifest.files_}
    fresh = {manifest.day.isoformat() for manifest in manifests if manifest.exported_at > before}
    found = []
    for table in TABLES:
        for path, size in archive.walk(table):
            parts = re.match(rf"{table}/day=(\d{{4}}-\d\d-\d\d)/([^/]+)\.parquet$", path)
            if parts is None or path in named or parts[1] in fresh:
                continue
            if parts[2].rpartition("-")[0] != sealed.get(parts[1], "none"):
                found.append(Remains(path, size))
    found += [Remains(path, size) for path, size in archive.walk(MANIFESTS) if path.endswith(".tmp")]
    return [remains for remains in found if archive.modified(remains.path) <= before]
