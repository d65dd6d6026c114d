"""Bodies of requests: read within limits, inflated within limits, taken apart into rows without losing a byte.

Belongs here: media types, gzip, NDJSON and JSON arrays. Does not belong here: what a row must hold (`contract`).
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from typing import Final

from starlette.requests import ClientDisconnect, Request

from flywheel_pipeline.delivery.api.limits import Limits
from flywheel_pipeline.delivery.api.problems import Problem

JSON: Final = "application/json"
NDJSON: Final = ("application/x-ndjson", "application/ndjson", "application/jsonl")
_MEMBERS: Final = 64  # of one gzip body: an empty member is 20 bytes, and 400,000 of them would take seconds
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_SPACE_BYTES: Final = b" \t\r\n"
_CLOSE: Final = {"Connection": "close"}


class UnreadableBody(Exception):
    """A body that arrived whole and cannot be taken apart; it is kept as one reject."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body as sent.

    Raises:
        Problem: 413 above `limit` bytes, 408 when it takes longer than `seconds`, 400 when the client goes away.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    received = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                received += chunk
                if len(received) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise Problem(
            408,
            "body_too_slow",
            f"The body did not arrive within {seconds:g} s.",
            "Send fewer rows at a time.",
            headers=_CLOSE,
        ) from None
    except ClientDisconnect:
        raise Problem(400, "disconnected", "The client went away.", "Send the request again.") from None
    return bytes(received)


def _too_large(limit: int) -> Problem:
    return Problem(
        413,
        "body_too_large",
        f"The body is larger than {limit:,} bytes.",
        "Send fewer rows at a time; 500 are a good batch.",
        headers=_CLOSE,
    )


def require_encoding(request: Request) -> bool:
    """Whether the body is gzip. Raises Problem (415) for any encoding but gzip and identity."""
    encodings = [
        part.strip().lower() for value in request.headers.getlist("content-encoding") for part in value.split(",")
    ]
    named = [encoding for encoding in encodings if encoding not in ("", "identity")]
    if named in (["gzip"], ["x-gzip"]):
        return True
    if not named:
        return False
    raise Problem(
        415,
        "unsupported_encoding",
        "Content-Encoding may be gzip, once, or identity.",
        "Send the body as it is or gzip it once.",
        headers={"Accept-Encoding": "gzip, identity"},
    )


def media_type(request: Request, accepted: tuple[str, ...]) -> str:
    """The media type of the body. Raises Problem (415) if it is none of those accepted, or not UTF-8."""
    values = request.headers.getlist("content-type")
    kind, *parameters = values[0].split(";") if len(values) == 1 else [""]
    found = kind.strip().lower()
    named = {
        part.partition("=")[0].strip().lower(): part.partition("=")[2].strip(' \t"').lower() for part in parameters
    }
    if found in accepted and named.get("charset", "utf-8") in ("utf-8", "utf8", "us-ascii"):
        return found
    raise Problem(
        415,
        "unsupported_media_type",
        f"Content-Type must be one of {', '.join(accepted)}, in UTF-8.",
        "Name the media type of the body in the header Content-Type.",
        headers={"Accept": ", ".join(accepted)},
    )


def inflate(body: bytes, limit: int) -> bytes:
    """Undo gzip, never holding more than `limit` bytes of it.

    Raises:
        Problem: 413, it inflates to more.
        UnreadableBody: it is no gzip, is cut off, or something follows it.
    """
    inflated = bytearray()
    rest = body
    for _ in range(_MEMBERS):
        member = zlib.decompressobj(wbits=31)
        try:
            inflated += member.decompress(rest, limit + 1 - len(inflated))
        except zlib.error as error:
            raise UnreadableBody("invalid_gzip", f"the body is not gzip: {error}") from None
        if len(inflated) > limit:
            raise Problem(
                413,
                "inflated_body_too_large",
                f"The body inflates to more than {limit:,} bytes.",
                "Send fewer rows at a time; 500 are a good batch.",
                headers=_CLOSE,
            )
        if not member.eof:
            raise UnreadableBody("invalid_gzip", "the body ends in the middle of its gzip stream")
        rest = member.unused_data
        if not rest:
            return bytes(inflated)
    raise UnreadableBody("invalid_gzip", f"the body has more than {_MEMBERS} gzip members")


def rows_of(body: bytes, kind: str, limits: Limits) -> tuple[list[bytes], bool]:
    """Take a body apart into rows, each with its own bytes; and whether it is a single post rather than a batch.

    NDJSON is cut at its newlines: a line that is broken spoils no other. A JSON array must be JSON as a whole, since
    its rows cannot be told apart otherwise. Any other JSON is one post.

    Raises:
        Problem: 413, more rows than a batch may have; 422, nothing in it.
        UnreadableBody: an array that is no JSON or nested too deep.
    """
    if not body.strip(_SPACE_BYTES):
        raise Problem(422, "empty_body", "The body is empty.", "Send a post, a JSON array of posts, or NDJSON.")
    if kind != JSON:
        rows = [line for line in body.split(b"\n") if line.strip(_SPACE_BYTES)]
        single = False
    elif body.lstrip(_SPACE_BYTES).startswith(b"["):
        rows, single = _elements(body, limits.rows), False
    else:
        rows, single = [body], True
    if len(rows) > limits.rows:
        raise _too_many(limits.rows)
    return rows, single


def _too_many(limit: int) -> Problem:
    return Problem(
        413,
        "too_many_rows",
        f"A batch may have {limit:,} rows.",
        "Send fewer rows at a time; 500 are a good batch.",
    )


# The values are thrown away, only their ends matter: a number of a million digits costs nothing.
_SCAN: Final = json.JSONDecoder(
    parse_int=lambda _: 0,
    parse_float=lambda _: 0,
    parse_constant=lambda _: 0,
    object_pairs_hook=lambda _: None,
    strict=False,
).raw_decode


def _elements(body: bytes, limit: int) -> list[bytes]:
    """The elements of a JSON array as the bytes they arrived as."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise UnreadableBody("invalid_utf8", f"byte {error.start + 1} is not UTF-8") from None
    rows: list[bytes] = []
    at = _after_space(text, text.index("[") + 1)
    if text[at : at + 1] != "]":
        while True:
            try:
                _, end = _SCAN(text, at)
            except RecursionError:
                raise UnreadableBody(
                    "too_deep", f"element {len(rows)} of the array is nested too deep; as NDJSON each row stands alone"
                ) from None
            except ValueError as error:
                raise UnreadableBody(
                    "invalid_json", f"element {len(rows)} of the array is no JSON; as NDJSON each row stands alone"
                ) from error
            rows.append(text[at:end].encode())
            if len(rows) > limit:
                raise _too_many(limit)
            at = _after_space(text, end)
            if text[at : at + 1] != ",":
                break
            at = _after_space(text, at + 1)
    if text[at : at + 1] != "]" or text[at + 1 :].strip(" \t\r\n"):
        raise UnreadableBody("invalid_json", f"after {len(rows)} elements the array does not end as JSON does")
    return rows


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
