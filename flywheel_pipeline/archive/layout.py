"""Where what lies in an archive, and how it is read: `Archive.open(url).manifest(day).files("executions")`.

Belongs here: paths, manifests and their refusals, on a folder or an object store by fsspec. Does not belong here: the database, Parquet
(`export.py` writes it), and which days ought to be there (`days.py`).

    ROOT/executions/day=YYYY-MM-DD/<generation>-<n>.parquet    immutable, named once
    ROOT/corrections/day=YYYY-MM-DD/<generation>-<n>.parquet
    ROOT/manifests/YYYY-MM-DD.json                             the only pointer to them

The manifest of a day is written last and replaced in one step, so a day is wholly there or not at all, and a corrected day
is exchanged as a whole. Only where a file can be replaced so does an archive lie: by a rename on a folder, by one PUT in an
object store. Files that no manifest names are remains, for `sweep` to remove.

A day is a UTC day of event time (`execution_telemetry.event_at`), as in the cells. Corrections lie under the day of the
execution that they corrected.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, cast, get_args
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from flywheel_pipeline.archive.errors import (
    ArchivedFileChanged,
    ArchivedFileLost,
    ArchiveNotFound,
    ArchiveUnreachable,
    ArchiveUrlRefused,
    DayHalfExported,
    DayNotArchived,
    ManifestFromTheFuture,
    ManifestRefused,
)
from flywheel_pipeline.errors import ArchiveError

#: Of the manifests and of the columns of the files; a change of either is another version.
SCHEMA_VERSION: Final = 1
Table = Literal["executions", "corrections"]
TABLES: Final[tuple[Table, ...]] = get_args(Table)
MANIFESTS: Final = "manifests"

_EXPORT_AGAIN = (
    "Run `flywheel archive export` for this day while its telemetry is in the database; else restore the file."
)
_EXAMPLES = "Set FLYWHEEL_ARCHIVE_URL to a folder, or to a URL such as s3://bucket/flywheel."
# One or no slash too: what is misspelt so is taken for a folder, and is shown. Three begin a path of this machine.
_SCHEME = re.compile(r"\w[\w+.-]+:/{0,2}(?!/)")
_SHORTEST_SECRET = 4  # characters: what is shorter stands in any text
_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az"})
#: Whose clients replace a file in one step: s3fs, gcsfs and adlfs by one upload, which the store takes whole or not at all.
#: Clients of WebHDFS, HDFS, FTP, SFTP and SMB write over what is there, and a reader sees half of it.
_KNOWN = _BUCKETS | {"file", "local", "memory"}  # memory: of this process, for tests


class ArchiveFile(BaseModel):
    """One Parquet file: `path` is relative to the archive's root, `sha256` of its bytes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    table: Table
    path: str
    rows: int = Field(ge=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _url: str = PrivateAttr(default="")
    _local: Path | None = PrivateAttr(default=None)

    @property
    def url(self) -> str:
        """Absolute URL with its protocol (`file://`, `s3://`, `memory://`); empty for one that was never in an archive."""
        return self._url

    @property
    def local_path(self) -> Path | None:
        """Absolute path where the archive lies on a file system of this machine; None elsewhere."""
        return self._local

    def placed(self, archive: Archive) -> Self:
        """Return this file with its absolute URL."""
        copy = self.model_copy()
        copy._url = archive.url_of(self.path)
        copy._local = Path(archive.full_path(self.path)) if archive.is_local else None
        return copy


class DayManifest(BaseModel):
    """What the archive holds of one day. `rows` counts executions; corrections are counted in their files.

    `day_version` is the version of the day's telemetry that the export saw (`day_versions.version`): while the database
    has the same, the day is up to date. `columns` are the Arrow types by table and column; `control` holds sums
    that PostgreSQL computed in the export's snapshot and that the written rows add up to.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    day: dt.date
    generation: str = Field(min_length=1)
    rows: int = Field(ge=0)
    files_: tuple[ArchiveFile, ...] = Field(alias="files")
    day_version: str
    exported_at: dt.datetime
    exported_by: str = ""
    columns: Mapping[str, Mapping[str, str]] = Field(default_factory=dict)
    control: Mapping[str, Mapping[str, int]] = Field(default_factory=dict)

    def files(self, table: Table) -> tuple[ArchiveFile, ...]:
        """Return the files of a table, in the order in which they were written; none where it had no rows."""
        return tuple(file for file in self.files_ if file.table == table)

    def rows_of(self, table: Table) -> int:
        """Return how many rows of a table this day has."""
        return sum(file.rows for file in self.files(table))

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files_)

    def to_json(self) -> bytes:
        """Return the manifest as it is written."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n").encode()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        inside = re.compile(rf"(?:{'|'.join(TABLES)})/day={self.day}/[A-Za-z0-9][A-Za-z0-9._-]*\.parquet")
        for file in self.files_:
            if not inside.fullmatch(file.path) or not file.path.startswith(f"{file.table}/"):
                raise ValueError(f"the path {file.path!r} is none of the {file.table} of {self.day}")
        if len({file.path for file in self.files_}) < len(self.files_):
            raise ValueError("a file is named twice")
        if self.rows != self.rows_of("executions"):
            raise ValueError(f"it says {self.rows} rows, and its files hold {self.rows_of('executions')}")
        return self


@dataclass(frozen=True)
class Archive:
    """An archive at a root. Make one by `Archive.open`.

    `shown` is its URL without passwords, for messages; `secrets` is what that hides, for the messages of its client.
    """

    fs: Any = field(repr=False)
    root: str = field(repr=False)
    shown: str
    secrets: tuple[str, ...] = field(default=(), repr=False)

    # -- opening and reading -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, url: str | Path, *, create: bool = False) -> Archive:
        """Open the archive at a folder or an fsspec URL; `create` allows for one that is yet empty.

        Credentials come from the environment, as the file system's own documentation says.

        Raises:
            ArchiveUrlRefused: the URL names no file system that can be used here, or one that replaces no file in one step.
            ArchiveNotFound: nothing was ever archived there, and `create` is not set.
            ArchiveUnreachable: the file system did not answer.
        """
        text = str(url).strip()
        shown, hidden = _without_secrets(text)
        if not text:
            raise ArchiveUrlRefused("The URL of the archive is empty.", hint=_EXAMPLES)
        scheme = text.partition("://")[0] if "://" in text else "file"
        if scheme not in ("file", "local") and scheme not in fsspec.available_protocols():
            named = f"the unknown scheme {scheme!r}" if re.fullmatch(r"[\w+.-]+", scheme) else "no scheme that is known"
            raise ArchiveUrlRefused(f"The archive URL has {named}.", hint=_EXAMPLES)
        if scheme in ("http", "https", "data", "git", "github", "gist", "zip", "tar", "libarchive", "reference"):
            raise ArchiveUrlRefused(
                f"The scheme {scheme!r} cannot be written to, so it holds no archive.", hint=_EXAMPLES
            )
        if scheme not in _KNOWN:
            raise ArchiveUrlRefused(
                f"The scheme {scheme!r} is not known to replace a file in one step, so a reader could see half of a manifest.",
                hint=f"An archive lies on a folder, which may be mounted, or an object store: {', '.join(sorted(_BUCKETS))}.",
            )
        try:
            fs, root = fsspec.core.url_to_fs(
                text if "://" in text else str(Path(text).expanduser()), use_listings_cache=False
            )
        except ImportError as error:
            raise ArchiveUrlRefused(
                f"The scheme {scheme!r} needs a package that is not installed: {_first_line(error)}.",
                hint="Install it beside Flywheel (for S3 and what speaks it: the extra `s3`), or use a folder.",
            ) from error
        except Exception as error:  # noqa: BLE001 (of any kind: a client may look for its credentials at once)
            raise ArchiveUrlRefused(
                f"The archive URL {shown} cannot be used: {_first_line(error, hidden)}.", hint=_EXAMPLES
            ) from (None if hidden else error)
        root = root.rstrip("/")
        if not root:
            raise ArchiveUrlRefused(
                f"The archive URL {shown} names no folder: an archive does not share the root of a file system.",
                hint=_EXAMPLES,
            )
        archive = cls(fs, root, shown, hidden)
        if not create and not archive._names(MANIFESTS):
            raise ArchiveNotFound(
                f"There is no archive at {shown}.",
                hint="`flywheel archive export` makes one; or correct FLYWHEEL_ARCHIVE_URL.",
            )
        return archive

    @property
    def is_local(self) -> bool:
        """Whether its files are files of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def is_bucket(self) -> bool:
        """Whether it is a bucket, which has no folders: asked to make one, its client would make a bucket of a misspelt name."""
        kinds = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        return not _BUCKETS.isdisjoint(kinds)

    def days(self) -> list[dt.date]:
        """Return the archived days, in order."""
        found = []
        for name in self._names(MANIFESTS):
            if match := re.fullmatch(r"(\d{4}-\d\d-\d\d)\.json", name):
                with contextlib.suppress(ValueError):  # 2026-02-30 is no day, so nobody's manifest
                    found.append(dt.date.fromisoformat(match[1]))
        return sorted(found)

    def manifest(self, day: dt.date) -> DayManifest:
        """Return the manifest of a day, once each file that it names was found there with the size it says.

        Raises:
            DayNotArchived: there is nothing of this day.
            DayHalfExported: there are files of this day, and no manifest.
            ManifestFromTheFuture: a newer release wrote it.
            ManifestRefused: it is no manifest of this day.
            ArchivedFileLost, ArchivedFileChanged: a file is missing, or of another size.
            ArchiveUnreachable: the file system did not answer.
        """
        manifest = self.read_manifest(day)
        sizes: dict[str, int] = {}
        for table in {file.table for file in manifest.files_}:
            sizes |= self._sizes(self.day_folder(table, day))
        for file in manifest.files_:
            if file.path not in sizes:
                raise _lost(day, file)
            if sizes[file.path] != file.bytes:
                raise ArchivedFileChanged(
                    f"{file.path} has {sizes[file.path]:,} bytes, and the manifest of {day} says {file.bytes:,}.",
                    hint=_EXPORT_AGAIN,
                )
        return manifest

    def read_manifest(self, day: dt.date) -> DayManifest:
        """Return the manifest of a day without a look at its files. Raises as `manifest` does."""
        with self.reaching():
            try:
                text = self.fs.cat_file(self.full_path(self.manifest_path(day)))
            except FileNotFoundError:
                text = None
        if text is not None:
            return self._parse(day, text)
        remains = [name for table in TABLES for name in self._names(self.day_folder(table, day))]
        if remains:
            raise DayHalfExported(
                f"The export of {day} did not finish: {len(remains)} files and no manifest.",
                hint=f"Run `flywheel archive export --from {day} --to {day}`; `flywheel archive sweep` removes the remains.",
            )
        raise DayNotArchived(
            f"{day} is not in the archive {self.shown}.",
            hint=f"Run `flywheel archive export --from {day} --to {day}`.",
        )

    def verify(self, day: dt.date) -> DayManifest:
        """Read every byte of a day's files and compare it with the manifest's hashes; return the manifest.

        Raises as `manifest` does; ArchivedFileChanged also for a file of another hash.
        """
        manifest = self.manifest(day)
        for file in manifest.files_:
            with self.reaching():
                try:
                    with self.fs.open(self.full_path(file.path), "rb") as stream:
                        digest = hashlib.file_digest(stream, "sha256").hexdigest()
                except FileNotFoundError:
                    raise _lost(day, file) from None
            if digest != file.sha256:
                raise ArchivedFileChanged(
                    f"{file.path} is not the file that was written: its SHA-256 differs from the manifest of {day}.",
                    hint=_EXPORT_AGAIN,
                )
        return manifest

    def walk(self, folder: str) -> list[tuple[str, int]]:
        """Return every file below a folder of the archive: relative path and size, in order."""
        with self.reaching():
            found = self.fs.find(self.full_path(folder), detail=True)
        start = len(self.full_path(""))
        return sorted((str(entry["name"])[start:], int(entry["size"])) for entry in found.values())

    def modified(self, path: str) -> dt.datetime:
        """Return when a file was last written, in UTC."""
        with self.reaching():
            return cast("dt.datetime", self.fs.modified(self.full_path(path))).astimezone(dt.UTC)

    # -- paths -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def manifest_path(day: dt.date) -> str:
        """Return the relative path of a day's manifest."""
        return f"{MANIFESTS}/{day.isoformat()}.json"

    @staticmethod
    def day_folder(table: Table, day: dt.date) -> str:
        """Return the relative path of the folder with a day's files of a table."""
        return f"{table}/day={day.isoformat()}"

    def full_path(self, relative: str) -> str:
        """Return the path as the file system names it."""
        return f"{self.root}/{relative}"

    def url_of(self, relative: str) -> str:
        """Return the absolute URL, with the protocol."""
        return str(self.fs.unstrip_protocol(self.full_path(relative)))

    # -- the file system's failures --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reaching(self, trouble: str = "cannot be used") -> Iterator[None]:
        """Around nothing but calls of the file system: whatever its client raises becomes ArchiveUnreachable.

        Clients of object stores raise errors of their own, each another kind, beside OSError; the one raised stays the cause,
        unless the URL holds secrets, which it may repeat.
        """
        try:
            yield
        except ArchiveError:
            raise
        except Exception as error:  # noqa: BLE001 (of any kind: said in full)
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            raise ArchiveUnreachable(
                f"The archive {self.shown} {trouble}: {kind}{_first_line(error, self.secrets)}.",
                hint="The archive still holds what it held before; correct that and try again.",
            ) from (None if self.secrets else error)

    # -- writing ---------------------------------------------------------------------------------------------------------

    def publish(self, manifest: DayManifest) -> None:
        """Write or replace the manifest of a day in one step: readers see the old one or the new one.

        On a folder the files that it names are on the disk before it, and it is before this returns.

        Raises:
            ArchiveUnreachable: the file system refused it; the old manifest stays.
        """
        path = self.full_path(self.manifest_path(manifest.day))
        text = manifest.to_json()
        with self.reaching():
            if not self.is_local:
                self.fs.pipe_file(path, text)  # one PUT
                return
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            for table in {file.table for file in manifest.files_}:
                _sync_folder(Path(self.full_path(self.day_folder(table, manifest.day))))
                _sync_folder(Path(self.full_path(table)))
            written = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
            try:
                with written.open("wb") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                written.replace(target)
            finally:
                written.unlink(missing_ok=True)
            _sync_folder(target.parent)
            _sync_folder(Path(self.root))

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _parse(self, day: dt.date, text: bytes) -> DayManifest:
        path = self.manifest_path(day)
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ManifestRefused(f"{path} in the archive is no JSON: {error}.", hint=_EXPORT_AGAIN) from error
        version = given.get("schema_version") if isinstance(given, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ManifestFromTheFuture(
                f"{path} in the archive has schema version {version}; this release reads up to {SCHEMA_VERSION}.",
                hint="Use the release that wrote it, or a newer one.",
            )
        try:
            manifest = DayManifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ManifestRefused(
                f"{path} in the archive is no manifest: {f'{where}: ' if where else ''}{first['msg']}.",
                hint=_EXPORT_AGAIN,
            ) from error
        if manifest.day != day:
            raise ManifestRefused(f"{path} in the archive is the manifest of {manifest.day}.", hint=_EXPORT_AGAIN)
        placed = tuple(file.placed(self) for file in manifest.files_)
        return manifest.model_copy(update={"files_": placed})

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        with self.reaching():
            try:
                return cast("list[dict[str, Any]]", self.fs.ls(self.full_path(folder), detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _names(self, folder: str) -> list[str]:
        return [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in self._entries(folder)]

    def _sizes(self, folder: str) -> dict[str, int]:
        return {
            f"{folder}/{str(entry['name']).rpartition('/')[2]}": int(entry["size"])
            for entry in self._entries(folder)
            if entry["type"] == "file"
        }


def _lost(day: dt.date, file: ArchiveFile) -> ArchivedFileLost:
    return ArchivedFileLost(
        f"The archive's manifest of {day} names {file.path}, which is not there.", hint=_EXPORT_AGAIN
    )


def _without_secrets(url: str) -> tuple[str, tuple[str, ...]]:
    """Return a URL as it may be shown, and the words that this hides.

    Keys of object stores hold `/`, `+` and `@` as they are, so all between the scheme and the last @ is hidden, and the
    query; a query with an @ cannot be told from such a key, so then all of it is. A folder's path is shown whole.
    """
    scheme = _SCHEME.search(url)
    if scheme is None:
        return url, ()
    head, rest = url[: scheme.end()], url[scheme.end() :]
    secret, at, place = rest.rpartition("@")
    place, _, query = place.partition("?")
    if "?" in secret:
        secret, at, place, query = rest, "@", "", ""
    given = f"{secret} {query}"
    words = {w for w in re.split(r"[^\w+%.~-]+", f"{given} {unquote(given)}") if len(w) >= _SHORTEST_SECRET}
    words |= {quote(word, safe="") for word in words}  # as a client says it that speaks in URLs
    return head + ("***" + at if at else "") + place, tuple(sorted(words))


def _first_line(error: Exception, secrets: tuple[str, ...] = ()) -> str:
    return hide((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:"), secrets)


def hide(said: str, secrets: Iterable[str]) -> str:
    """Return a text with `***` for each of these words, the longest first."""
    for secret in sorted(secrets, key=len, reverse=True):
        said = said.replace(secret, "***")
    return said


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, not just in its cache."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
