"""Why an archive is refused: one class for each reason, each one sentence and what to do.

Belongs here: refusals that a reader of the archive may want to tell apart. Does not belong here: anything that finds them.
"""

from __future__ import annotations

from flywheel_pipeline.errors import ArchiveError


class ArchiveUrlRefused(ArchiveError):
    """The URL names no file system that can be used here."""


class ArchiveUnreachable(ArchiveError):
    """The file system did not answer, or refused what was asked."""


class ArchiveNotFound(ArchiveError):
    """Nothing was ever archived at this URL."""


class DayNotArchived(ArchiveError):
    """The archive holds nothing of this day."""


class DayHalfExported(ArchiveError):
    """Files of this day are there and no manifest names them: an export did not finish."""


class ManifestRefused(ArchiveError):
    """A manifest is no manifest: not JSON, of another day, without its fields, or with paths that lead elsewhere."""


class ManifestFromTheFuture(ManifestRefused):
    """A manifest was written by a newer release."""


class ArchivedFileLost(ArchiveError):
    """A file that a manifest names is not there."""


class ArchivedFileChanged(ArchiveError):
    """A file that a manifest names is not the one that was written: another size, another hash."""


class NothingToArchive(ArchiveError):
    """A day was asked for that cannot be exported: it is not closed, or its telemetry was purged."""


class NotRepresentable(ArchiveError):
    """A row holds a value that no column of the archive can hold exactly."""


class NotSafelyArchived(ArchiveError):
    """A purge would delete telemetry that the archive does not hold as it is."""
