"""Blocks of lines: where a line of NDJSON begins and ends, and what contract and encoding make of many at once.

Belongs here: cutting a file into blocks of whole lines and parsing one block; both the importing process and its
parsing processes do the second. Does not belong here: those processes (`parsers`), other formats (`files`). Light to
import: no SQLAlchemy.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import IO, Final, NamedTuple, TypeAlias

from flywheel_pipeline.telemetry.contract import LINE_LIMIT_BYTES, Reject, parse_line, too_long
from flywheel_pipeline.telemetry.encoding import Encoder

#: Lines are read and parsed in blocks of at most so many bytes; some 1,500 posts.
BLOCK_BYTES: Final = 1 << 20
_BOM: Final = b"\xef\xbb\xbf"
_BUFFER_BYTES: Final = 1 << 20

#: Line number, bytes, and for a line over the limit (then the bytes are its start) its length and SHA-256.
Line: TypeAlias = tuple[int, bytes, tuple[int, str] | None]
#: Line number, reason code, reason, payload, and the length and SHA-256 (hex) of the whole payload.
Refused: TypeAlias = tuple[int, str, str, bytes, int, str]


class RawBlock(NamedTuple):
    """Whole lines of a file: the number of the first, where their bytes begin and end, and the bytes.

    `overlong` stands for a single line over the limit, of which `data` is the start: its length and SHA-256.
    """

    first_line: int
    begin: int
    end: int
    data: bytes
    overlong: tuple[int, str] | None = None

    def payloads(self) -> dict[int, bytes]:
        """The bytes of each line by its number, without its end."""
        return {number: raw.rstrip(b"\r\n") for number, raw, _ in read_lines(io.BytesIO(self.data), self.first_line)}


@dataclass(slots=True)
class ParsedLines:
    """What became of the lines of a block: ids, encoded rows and line numbers of good ones, and the refused ones."""

    execution_ids: list[str]
    rows: list[bytes]
    line_numbers: list[int]
    refused: list[Refused]


def read_lines(file: IO[bytes], first_line: int = 1) -> Iterator[Line]:
    """The lines of a file with their ends; a byte order mark is no part of line 1."""
    number = first_line - 1
    while raw := file.readline(LINE_LIMIT_BYTES + 2):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if raw.endswith(b"\n") or len(raw) <= LINE_LIMIT_BYTES:
            yield number, raw, None
            continue
        head, length, digest = raw[:LINE_LIMIT_BYTES], len(raw), sha256(raw)
        while not raw.endswith(b"\n") and (raw := file.readline(_BUFFER_BYTES)):
            digest.update(raw)
            length += len(raw)
        yield number, head, (length, digest.hexdigest())


def cut(file: IO[bytes], most_lines: int) -> Iterator[RawBlock]:
    """The file in blocks of at most `most_lines` whole lines; a line that fills a block is a block of its own."""
    number, begin = 1, 0
    while data := os.pread(file.fileno(), BLOCK_BYTES, begin):
        data = _whole_lines(data, most_lines)
        if data:
            block = RawBlock(number, begin, begin + len(data), data)
        else:
            file.seek(begin)
            _, head, overlong = next(read_lines(file, number))
            end = file.tell()
            data = os.pread(file.fileno(), end - begin, begin) if overlong is None else head
            block = RawBlock(number, begin, end, data, overlong)
        yield block
        number += max(data.count(b"\n"), 1)
        begin = block.end


def _whole_lines(data: bytes, most_lines: int) -> bytes:
    end = data.rfind(b"\n") + 1
    if data.count(b"\n", 0, end) > most_lines:
        end = 0
        for _ in range(most_lines):
            end = data.index(b"\n", end) + 1
    return data[:end]


def parse_block(block: RawBlock, received_at: datetime, encode: Encoder) -> ParsedLines:
    """Hold each line of a block against the contract and encode the good ones; blank lines are no records."""
    parsed = ParsedLines([], [], [], [])
    if block.overlong is not None:
        length, digest = block.overlong
        reject = too_long(length)
        parsed.refused.append((block.first_line, reject.reason_code, reject.reason, block.data, length, digest))
        return parsed
    for number, raw, overlong in read_lines(io.BytesIO(block.data), block.first_line):
        if raw.isspace() or not raw:
            continue
        complete = raw.endswith(b"\n")
        raw = raw.rstrip(b"\r\n")
        outcome = (
            too_long(overlong[0]) if overlong else parse_line(raw, number, received_at=received_at, complete=complete)
        )
        if not isinstance(outcome, Reject):
            row = encode(outcome.values)
            if isinstance(row, bytes):
                parsed.execution_ids.append(outcome.execution_id)
                parsed.rows.append(row)
                parsed.line_numbers.append(number)
                continue
            outcome = row
        length, digest = overlong or (len(raw), sha256(raw).hexdigest())
        parsed.refused.append((number, outcome.reason_code, outcome.reason, raw, length, digest))
    return parsed
