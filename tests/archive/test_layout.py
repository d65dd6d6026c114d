"""What is wrong with an archive is said in one sentence, by a class for each reason; nothing wrong is read."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from archived_fleet import DAY

from flywheel_pipeline.archive import errors
from flywheel_pipeline.archive.export import export_day
from flywheel_pipeline.archive.layout import SCHEMA_VERSION, Archive, ArchiveFile, DayManifest
from flywheel_pipeline.errors import ArchiveError

CONTENT = b"The layout asks for bytes and their hash, not for Parquet."


@pytest.fixture
def exported(archive: Archive) -> Archive:
    """An archive of one day with one file of two rows."""
    path = f"{archive.day_folder('executions', DAY)}/20260203T042700Z-0a1b2c3d-0.parquet"
    archive.fs.makedirs(archive.full_path(archive.day_folder("executions", DAY)))
    archive.fs.pipe_file(archive.full_path(path), CONTENT)
    file = ArchiveFile(
        table="executions", path=path, rows=2, bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    archive.publish(
        DayManifest(
            schema_version=SCHEMA_VERSION,
            day=DAY,
            generation="20260203T042700Z-0a1b2c3d",
            rows=2,
            files=(file,),
            day_version="1f0c9c34-6f0e-4f3c-9a51-0d6c2f2c7b11",
            exported_at=dt.datetime(2026, 2, 3, 4, 27, tzinfo=dt.UTC),
        )
    )
    return archive


def edit(archive: Archive, change: Callable[[dict[str, Any]], None]) -> None:
    path = archive.full_path(archive.manifest_path(DAY))
    content = json.loads(archive.fs.cat_file(path))
    change(content)
    archive.fs.pipe_file(path, json.dumps(content).encode())


def setting(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("nowhere://x/y", "unknown scheme 'nowhere'"),
        ("dana:hunter2@s3://x/y", "no scheme that is known"),
        ("https://example.org/x", "cannot be written to"),
        ("/", "names no folder"),
        ("file:///", "names no folder"),
        ("ftp://dana:hunter2@archive.invalid/x", "cannot be used"),
    ],
)
def test_a_url_that_cannot_hold_an_archive_is_refused_without_its_password(url: str, words: str) -> None:
    with pytest.raises(errors.ArchiveUrlRefused, match=words) as refused:
        Archive.open(url)
    assert refused.value.hint
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://AKIA:ab/cdSE+CRET@bucket/x", "memory://***@bucket/x"),
        ("memory://u:se@SE+CRET@host/x", "memory://***@host/x"),
        ("memory://bucket/x?token=SE+CRET", "memory://bucket/x"),
        ("memory://bucket/x?token=SE@CRET&key=SE+CRET", "memory://***@"),
        ("memory://u:a?SE+CRET@host/x", "memory://***@"),
        ("memory:/AKIA:SE+CRET@bucket/x", "memory:/***@bucket/x"),
        ("memory://bucket/flywheel", "memory://bucket/flywheel"),
        ("/nowhere/a@b?c", "/nowhere/a@b?c"),
        ("file:///nowhere/a@b", "file:///nowhere/a@b"),
    ],
)
def test_the_url_of_an_archive_is_shown_without_what_opens_it(url: str, shown: str) -> None:
    archive = Archive.open(url, create=True)
    assert archive.shown == shown
    assert "SE+CRET" not in repr(archive)
    with pytest.raises(errors.ArchiveNotFound) as refused:
        Archive.open(url)
    assert f"There is no archive at {shown}." in refused.value.message


def test_what_a_client_of_an_object_store_says_repeats_no_secret_of_its_url() -> None:
    archive = Archive.open("memory://AKIA1234:ab/cdSE+CRET@bucket/x", create=True)
    said = 'Invalid bucket name "AKIA1234:ab": no such path AKIA1234:ab/cdSE+CRET@bucket/x'
    with pytest.raises(errors.ArchiveUnreachable) as refused, archive.reaching():
        raise ValueError(said)
    told = "".join(traceback.format_exception(refused.value))
    assert "bucket name" in refused.value.message
    assert [secret for secret in ("AKIA1234", "SE+CRET") if secret in told] == []


def test_where_nothing_was_archived_there_is_no_archive(archive: Archive) -> None:
    with pytest.raises(errors.ArchiveNotFound, match="There is no archive at"):
        Archive.open(archive.fs.unstrip_protocol(archive.root))
    assert archive.days() == []
    with pytest.raises(errors.DayNotArchived, match="2026-02-02 is not in the archive"):
        archive.manifest(DAY)


def test_files_are_found_by_absolute_urls(exported: Archive) -> None:
    (file,) = exported.manifest(DAY).files("executions")
    assert exported.manifest(DAY).files("corrections") == ()
    assert file.url.startswith(("file:///", "memory://"))
    assert (file.local_path is not None) == exported.is_local
    again = Archive.open(exported.fs.unstrip_protocol(exported.root))
    assert again.days() == [DAY]
    assert again.fs.size(file.url) == file.bytes
    assert file.path.startswith("executions/day=2026-02-02/")


@pytest.mark.parametrize(
    ("harm", "refusal", "words"),
    [
        (setting(schema_version=SCHEMA_VERSION + 1), errors.ManifestFromTheFuture, "schema version 2; this release reads up to 1"),
        (setting(schema_version="one"), errors.ManifestRefused, "schema_version"),
        (setting(day="2026-02-03"), errors.ManifestRefused, "is none of the executions of 2026-02-03"),
        (setting(day="2026-02-03", files=[], rows=0), errors.ManifestRefused, "is the manifest of 2026-02-03"),
        (setting(rows=3), errors.ManifestRefused, "says 3 rows, and its files hold 2"),
        (lambda content: content.pop("generation"), errors.ManifestRefused, "generation: Field required"),
        (lambda content: content["files"][0].update(path="executions/day=2026-02-02/../../x.parquet"), errors.ManifestRefused, "is none of the"),
        (lambda content: content["files"][0].update(path="/etc/x.parquet"), errors.ManifestRefused, "is none of the"),
        (lambda content: content["files"].append(content["files"][0]), errors.ManifestRefused, "named twice"),
        (lambda content: content["files"][0].update(bytes=1), errors.ArchivedFileChanged, "the manifest of 2026-02-02 says 1"),
        (lambda content: content["files"][0].update(sha256="0" * 64), errors.ArchivedFileChanged, "its SHA-256 differs"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_refused(
    exported: Archive, harm: Callable[[dict[str, Any]], None], refusal: type[ArchiveError], words: str
) -> None:
    exported.verify(DAY)
    edit(exported, harm)
    with pytest.raises(refusal, match=words) as refused:
        exported.verify(DAY)
    assert type(refused.value) is refusal
    assert refused.value.hint


def test_what_is_no_json_is_refused(exported: Archive) -> None:
    exported.fs.pipe_file(exported.full_path(exported.manifest_path(DAY)), b'{"schema_version": 1, "day": "20')
    with pytest.raises(errors.ManifestRefused, match="is no JSON"):
        exported.manifest(DAY)


def test_a_lost_file_and_a_spoilt_one_are_named(exported: Archive) -> None:
    (file,) = exported.manifest(DAY).files("executions")
    path = exported.full_path(file.path)
    content = exported.fs.cat_file(path)
    exported.fs.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    exported.manifest(DAY)  # its size is the one that was written
    with pytest.raises(errors.ArchivedFileChanged, match=f"{file.path} is not the file that was written"):
        exported.verify(DAY)
    exported.fs.pipe_file(path, content + b"x")
    with pytest.raises(errors.ArchivedFileChanged, match=f"{file.path} has {len(content) + 1:,} bytes"):
        exported.manifest(DAY)
    exported.fs.rm_file(path)
    with pytest.raises(errors.ArchivedFileLost, match=f"names {file.path}, which is not there"):
        exported.manifest(DAY)


def test_a_day_half_exported_is_no_day(exported: Archive) -> None:
    exported.fs.rm_file(exported.full_path(exported.manifest_path(DAY)))
    with pytest.raises(errors.DayHalfExported, match="did not finish: 1 files and no manifest"):
        exported.manifest(DAY)
    assert exported.days() == []


def test_a_manifest_is_replaced_in_one_step(engine: sa.Engine, folder: Archive) -> None:
    export_day(engine, folder, DAY)  # a day without rows: a manifest that names no file
    folder.publish(folder.manifest(DAY).model_copy(update={"exported_by": "another"}))
    assert folder.manifest(DAY).exported_by == "another"
    assert [path.name for path in Path(folder.root, "manifests").iterdir()] == ["2026-02-02.json"]
