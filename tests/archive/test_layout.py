"""What is wrong with an archive is said in one sentence, by a class for each reason; nothing wrong is read."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import sqlalchemy as sa
from archived_fleet import DAY

from flywheel_pipeline.archive import errors
from flywheel_pipeline.archive.export import export_day
from flywheel_pipeline.archive.layout import SCHEMA_VERSION, Archive, ArchiveFile, DayManifest
from flywheel_pipeline.archive.sweep import sweep
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
        ("ftp://dana:hunter2@archive.invalid/x", "'ftp' is not known to replace a file in one step"),
        ("sftp://dana:hunter2@archive.invalid/x", "'sftp' is not known to replace a file in one step"),
        ("webhdfs://dana:hunter2@archive.invalid/x", "'webhdfs' is not known to replace a file in one step"),
        ("hdfs://archive.invalid/x", "'hdfs' is not known to replace a file in one step"),
        ("smb://dana:hunter2@archive.invalid/x", "'smb' is not known to replace a file in one step"),
        ("dir://x", "'dir' is not known to replace a file in one step"),
        ("simplecache::s3://x/y", "no scheme that is known"),
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


def test_a_client_that_cannot_be_made_is_said_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    # What s3fs refuses as it is made; its settings come from the environment or a file, as fsspec documents.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "dana", "username": "dana"})
    url = "s3://dana:hunter2@bucket/x"
    with pytest.raises(errors.ArchiveUrlRefused, match="cannot be used: ") as refused:
        Archive.open(url)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


def test_a_file_with_the_name_of_no_day_is_no_manifest(exported: Archive) -> None:
    exported.fs.pipe_file(exported.full_path("manifests/2026-02-30.json"), b"{}")
    assert exported.days() == [DAY]


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


def test_who_reads_while_a_manifest_is_replaced_sees_the_old_one_or_the_new_one(exported: Archive) -> None:
    # Of 4 MB, so that a write takes as long as several reads.
    versions = [exported.manifest(DAY).model_copy(update={"exported_by": letter * 4_000_000}) for letter in "ab"]
    exported.publish(versions[0])
    over, read, refused = threading.Event(), [0, 0], []

    def look() -> None:
        while not over.is_set():
            try:
                read["ab".index(exported.read_manifest(DAY).exported_by[0])] += 1
            except ArchiveError as error:
                refused.append(error.message[:200])

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    until = time.monotonic() + 60  # a second here
    while (min(read) < 10 or sum(read) < 40) and not refused and time.monotonic() < until:
        for version in reversed(versions):
            exported.publish(version)
    over.set()
    for reader in readers:
        reader.join()
    assert refused == []
    assert min(read) >= 10


# The kernel refuses or ends a process that writes more to a file than its limit: the disk is full, or it dies in mid-write.
PUBLISH_WITHIN = """
import datetime as dt, resource, signal, sys
from flywheel_pipeline.archive.layout import Archive
archive, day = Archive.open(sys.argv[1]), dt.date.fromisoformat(sys.argv[2])
manifest = archive.manifest(day).model_copy(update={"exported_by": "another " * 10_000})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if sys.argv[3] == "dies" else signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
archive.publish(manifest)
"""


@pytest.mark.parametrize("fate", ["dies", "is refused"])
def test_a_manifest_half_written_leaves_the_old_one_whole(engine: sa.Engine, folder: Archive, fate: str) -> None:
    export_day(engine, folder, DAY)
    before = folder.verify(DAY)
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH_WITHIN, folder.root, DAY.isoformat(), fate],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    manifests = Path(folder.root, "manifests")
    remains = [path for path in manifests.iterdir() if path.name != "2026-02-02.json"]
    if fate == "dies":
        assert done.returncode == -signal.SIGXFSZ, done.stderr
        assert [path.stat().st_size for path in remains] == [20_000]  # it was in mid-write
    else:
        assert "ArchiveUnreachable" in done.stderr
        assert "File too large" in done.stderr
        assert remains == []
    assert folder.verify(DAY) == before
    assert folder.days() == [DAY]
    sweep(engine, folder, grace_hours=0)
    assert [path.name for path in manifests.iterdir()] == ["2026-02-02.json"]
