"""Rows as PostgreSQL's binary COPY takes them: each is encoded once, where it was parsed, and compared as bytes.

Belongs here: bytes of a row from its values, and single fields from those bytes. Does not belong here: what a valid
row is (`contract`) and the statements (`landing`). Light to import: no SQLAlchemy, since parsing processes need it.

psycopg has no public way to format a row without an open COPY, so this module alone calls the function behind
`Copy.write_row` (2 us a row); a test holds its bytes against those that a COPY by psycopg sends.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import psycopg
from psycopg._copy_base import format_row_binary
from psycopg.adapt import AdaptersMap, Dumper, Transformer

from flywheel_pipeline.telemetry.contract import Reject

#: What a binary COPY begins and ends with: signature, no flags, no header extension; a field count of -1.
HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER: Final = b"\xff\xff"

#: The bytes of a row, or why it has none.
Encoder: TypeAlias = Callable[[Sequence[Any]], "bytes | Reject"]

_COUNT: Final = struct.Struct("!h")
_LENGTH: Final = struct.Struct("!i")
_INT8: Final = struct.Struct("!q")
_STAGED: Final = struct.Struct("!hiqiq")


class JsonText(Dumper):
    """JSON text, as the contract gives it, in the binary form of jsonb: a version byte and the text."""

    format = psycopg.pq.Format.BINARY
    oid = psycopg.postgres.types["jsonb"].oid

    def dump(self, obj: str) -> bytes:
        """The bytes of a jsonb field."""
        return b"\x01" + obj.encode()


def encoder(types: Sequence[str]) -> Encoder:
    """A function that encodes the values of one row, whose columns have these PostgreSQL types.

    Text is UTF-8. A value that PostgreSQL has no bytes for makes a Reject, as if the database had refused it.
    """
    adapters = AdaptersMap(psycopg.adapters)
    adapters.register_dumper(None, JsonText)
    transformer = Transformer(adapters)
    transformer.set_dumper_types([adapters.types[name].oid for name in types], psycopg.pq.Format.BINARY)

    def encode(values: Sequence[Any]) -> bytes | Reject:
        row = bytearray()
        try:
            format_row_binary(values, transformer, row)
        except (psycopg.DataError, UnicodeEncodeError) as error:
            return Reject("refused_by_database", str(error))
        return bytes(row)

    return encode


def staged(row: bytes, position: int, version: int) -> bytes:
    """The same row with two bigint columns in front."""
    (columns,) = _COUNT.unpack_from(row)
    return _STAGED.pack(columns + 2, 8, position, 8, version) + row[2:]


def bigint_field(row: bytes, index: int) -> int | None:
    """The column `index` of a row as a 64-bit number (a timestamp: microseconds since 2000), None for null."""
    at = _COUNT.size
    for _ in range(index):
        at += _LENGTH.size + max(_LENGTH.unpack_from(row, at)[0], 0)
    (length,) = _LENGTH.unpack_from(row, at)
    if length < 0:
        return None
    value: int = _INT8.unpack_from(row, at + _LENGTH.size)[0]
    return value
