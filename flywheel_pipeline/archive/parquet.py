"""Writing record batches as Parquet files of bounded size, with the hash of every byte, on any file system.

Belongs here: row groups, files, hashes. Does not belong here: where the rows come from, and manifests.

While one row group is compressed and written, the next is read: Arrow lets go of Python's lock in both.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_pipeline.archive.columns import SOUGHT_BY, UNIQUE_VALUES
from flywheel_pipeline.archive.layout import Archive, ArchiveFile, Table

#: A row group is closed at whichever comes first. Engines share work by row groups, and hold some of them in memory.
GROUP_ROWS: Final = 131_072
GROUP_BYTES: Final = 24 << 20
#: A file is closed with the row group that reaches this.
FILE_BYTES: Final = 256 << 20


class _HashingSink(io.RawIOBase):
    """Passes bytes on to a new file of an archive, and keeps their hash and number."""

    def __init__(self, archive: Archive, path: str) -> None:
        self._archive, self._refused = archive, f"refused the file {path}"
        full = archive.full_path(path)
        with archive.reaching(self._refused):
            if not archive.is_bucket:
                archive.fs.makedirs(str(PurePosixPath(full).parent), exist_ok=True)
            self.stream: Any = archive.fs.open(full, "wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        block = memoryview(data)
        self.digest.update(block)
        self.size += block.nbytes
        with self._archive.reaching(self._refused):
            self.stream.write(block)
        return block.nbytes

    def put_down(self) -> None:
        """Close the file: on a folder it is on the disk then, in an object store it is there as a whole or not at all."""
        with self._archive.reaching(self._refused):
            if self._archive.is_local:
                self.stream.flush()
                os.fsync(self.stream.fileno())
            self.stream.close()


@dataclass
class _File:
    path: str
    sink: _HashingSink
    writer: pq.ParquetWriter
    rows: int = 0


class ParquetFiles:
    """The files of one table of one day: `write` row groups, then `close`, then read `files`.

    Names are `<generation>-<n>.parquet`, so they are new ones whatever is there. On a folder each file is on the disk when it
    is closed.
    """

    def __init__(
        self, archive: Archive, folder: str, table: Table, generation: str, schema: pa.Schema, metadata: dict[str, str]
    ) -> None:
        self.files: list[ArchiveFile] = []
        self._archive, self._folder, self._table, self._generation = archive, folder, table, generation
        self._schema = schema.with_metadata({f"flywheel.{key}": value for key, value in metadata.items()})
        self._dictionaries = [name for name in schema.names if name not in UNIQUE_VALUES]
        self._at_work: _File | None = None

    def write(self, rows: pa.Table) -> None:
        """Write one row group."""
        if self._at_work is None:
            self._at_work = self._open()
        self._at_work.writer.write_table(rows, row_group_size=max(rows.num_rows, 1))
        self._at_work.rows += rows.num_rows
        if self._at_work.sink.size >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Finish the file at work, if any."""
        if self._at_work is None:
            return
        file, self._at_work = self._at_work, None
        file.writer.close()
        sink = file.sink
        sink.put_down()
        self.files.append(
            ArchiveFile(
                table=self._table, path=file.path, rows=file.rows, bytes=sink.size, sha256=sink.digest.hexdigest()
            )
        )

    def abandon(self) -> None:
        """Let go of the file at work, if any; what is written of it is named by nobody."""
        if self._at_work is not None:
            file, self._at_work = self._at_work, None
            try:
                file.writer.close()
            finally:
                file.sink.put_down()

    def _open(self) -> _File:
        path = f"{self._folder}/{self._generation}-{len(self.files)}.parquet"
        sink = _HashingSink(self._archive, path)
        writer = pq.ParquetWriter(
            sink,
            self._schema,
            compression="zstd",
            use_dictionary=self._dictionaries,
            write_statistics=[name for name in SOUGHT_BY if name in self._schema.names],
            version="2.6",
        )
        return _File(path, sink, writer)


def write_batches(files: ParquetFiles, batches: Iterable[pa.RecordBatch], seen: Callable[[int], None]) -> None:
    """Write all batches and close the files; `seen` is called with the number of rows of each row group as it is read.

    At most two row groups are in memory: the one that is read and the one that is written.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="parquet") as pool:
            writing: Future[None] | None = None
            for group in _row_groups(batches):
                if writing is not None:
                    writing.result()
                writing = pool.submit(files.write, group)
                seen(group.num_rows)
            if writing is not None:
                writing.result()
        files.close()
    finally:
        files.abandon()


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if batch.num_rows == 0:
            continue
        held.append(batch)
        rows += batch.num_rows
        size += batch.nbytes
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            yield pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)
