"""The archive that the settings name.

Belongs here: from FLYWHEEL_ARCHIVE_URL to an opened archive. Does not belong here: anything about its contents.
"""

from __future__ import annotations

from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.errors import UsageError


def configured_archive(settings: Settings | None = None) -> Archive | None:
    """Return the archive of FLYWHEEL_ARCHIVE_URL, which may be yet empty; None where none is set.

    Raises:
        ArchiveUrlRefused: the URL names no file system that can be used here.
    """
    settings = settings or get_settings()
    return None if settings.archive_url is None else require_archive(settings)


def require_archive(settings: Settings | None = None, *, create: bool = True) -> Archive:
    """Return the archive of FLYWHEEL_ARCHIVE_URL; `create` allows for one that is yet empty.

    Raises:
        UsageError: none is set.
        ArchiveUrlRefused: the URL names no file system that can be used here.
        ArchiveNotFound, ArchiveUnreachable: as `Archive.open`.
    """
    settings = settings or get_settings()
    if settings.archive_url is None:
        raise UsageError(
            "No archive is set.", hint="Set FLYWHEEL_ARCHIVE_URL to a folder, or to a URL such as s3://bucket/flywheel."
        )
    return Archive.open(settings.archive_url.get_secret_value(), create=create)
