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
    if settings.archive_url is None:
        return None
    return Archive.open(settings.archive_url.get_secret_value(), create=True)


def require_archive(settings: Settings | None = None) -> Archive:
    """Return the archive of FLYWHEEL_ARCHIVE_URL.

    Raises:
        UsageError: none is set.
        ArchiveUrlRefused: the URL names no file system that can be used here.
    """
    archive = configured_archive(settings)
    if archive is None:
        raise UsageError(
            "No archive is set.", hint="Set FLYWHEEL_ARCHIVE_URL to a folder, or to a URL such as s3://bucket/flywheel."
        )
    return archive
