"""GET /agent/sync: what an appliance should run, and what it is told to do.

The answer is a function of its ETag: rules, versions, tombstones, healing tier and open commands. A request that names
the tag in If-None-Match is answered 304 from one query that never touches the rules. A command is open from the moment it
is queued until it is answered or ends; it stays in every answer, so that an answer lost on its way loses no command. It
is marked delivered when the appliance is handed it, or shows by the tag that it has it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from psycopg.rows import namedtuple_row
from starlette.requests import Request
from starlette.responses import Response

from flywheel_pipeline.delivery.api.connections import speaking_for
from flywheel_pipeline.delivery.api.problems import Problem
from flywheel_pipeline.delivery.api.state import admit_asking, worker_of
from flywheel_pipeline.delivery.publish import take_commands
from flywheel_pipeline.delivery.tokens import Caller

_OPEN: Final = """
  SELECT count(*) FILTER (WHERE status = 'pending') AS pending,
    coalesce(jsonb_agg(jsonb_build_object('id', id, 'command_type', command_type, 'params', params,
      'created_at', created_at, 'expires_at', expires_at) ORDER BY created_at, params ->> 'rule_id', id), '[]') AS commands
  FROM appliance_commands
  WHERE appliance_id = flywheel_session_appliance() AND status IN ('pending', 'delivered')
    AND (expires_at IS NULL OR expires_at > clock_timestamp())
"""
_HEAD: Final = f"""
SELECT m.site_id, m.content_hash, m.tombstones::text AS tombstones, c.pending, c.commands::text AS commands
FROM appliance_manifests m
CROSS JOIN ({_OPEN}) AS c
WHERE m.appliance_id = flywheel_session_appliance()
"""  # noqa: S608
_RULES: Final = """
SELECT t.manifest_hash, t.rule_count, flywheel_manifest_rules(t.entry_ids) FROM appliance_manifests m JOIN manifest_contents t USING (content_hash)
WHERE m.appliance_id = flywheel_session_appliance() AND t.content_hash = %s
"""
_GZIP_FROM_BYTES: Final = 1_024


@dataclass(frozen=True, slots=True)
class _Head:
    """All that an answer depends on, but for the rules that `content_hash` stands for."""

    content_hash: str
    tombstones: str
    healing_tier: str | None
    pending: int
    commands: str

    @property
    def tag(self) -> str:
        """Hash of the answer's content."""
        parts = (self.content_hash, self.tombstones, self.healing_tier, self.commands)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class _Body:
    plain: bytes
    zipped: bytes

    @property
    def size(self) -> int:
        return len(self.plain) + len(self.zipped)


class _Bodies:
    """Answers by their tag. The tag is a hash of the content, so nothing here is ever out of date; least used go first."""

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._bodies: OrderedDict[str, _Body] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tag: str) -> _Body | None:
        """The answer of this tag, if it is held."""
        with self._lock:
            body = self._bodies.get(tag)
            if body is not None:
                self._bodies.move_to_end(tag)
            return body

    def put(self, tag: str, body: _Body) -> None:
        """Hold an answer."""
        with self._lock:
            if tag in self._bodies or body.size > self._limit:
                return
            self._bodies[tag] = body
            self._held += body.size
            while self._held > self._limit:
                _, dropped = self._bodies.popitem(last=False)
                self._held -= dropped.size


_BODIES: Final = _Bodies()


async def sync(request: Request) -> Response:
    """The manifest of the calling appliance and its open commands; 304 where it has both already."""
    wanted = _tags(request)
    caller, (head, body) = await admit_asking(
        request, _HEAD, lambda connection, caller, answer: _read(connection, caller, answer, wanted)
    )
    if head is None:
        raise Problem(
            503,
            "manifest_pending",
            "No manifest has been built for this appliance yet.",
            "Keep the rules that run now and ask again; the next refresh builds it.",
            headers={"Retry-After": "60"},
        )
    if head.pending:
        await worker_of(request).connections.write(
            caller, lambda connection: take_commands(connection, caller.appliance_id, datetime.now(UTC))
        )
    tag = head.tag
    zipped = "gzip" in request.headers.get("accept-encoding", "").lower()
    headers = {
        "ETag": f'"{tag}-gzip"' if zipped else f'"{tag}"',
        "Cache-Control": "private, no-cache",
        "Vary": "Accept-Encoding, Authorization",
    }
    if body is None:
        return Response(status_code=304, headers=headers)
    if zipped and body.zipped:
        headers["Content-Encoding"] = "gzip"
        return Response(body.zipped, headers=headers, media_type="application/json")
    headers["ETag"] = f'"{tag}"'
    return Response(body.plain, headers=headers, media_type="application/json")


def _tags(request: Request) -> frozenset[str]:
    """The tags that the caller has, whatever their encoding; `*` names none in particular and is no tag."""
    values = ",".join(request.headers.getlist("if-none-match"))
    return frozenset(part.strip().removeprefix("W/").strip('"').removesuffix("-gzip") for part in values.split(",")) - {
        "",
        "*",
    }


def _read(
    connection: psycopg.Connection[Any], caller: Caller, answer: Any, wanted: frozenset[str]
) -> tuple[_Head | None, _Body | None]:
    """The head of the answer, and its body unless the caller has it."""
    for _ in range(3):
        # A manifest that stands under a site which the appliance has left is not its own any more.
        if answer is None or answer.site_id not in caller.sites:
            return None, None
        head = _Head(answer.content_hash, answer.tombstones, caller.healing_tier, answer.pending, answer.commands)
        if head.tag in wanted:
            return head, None
        body = _BODIES.get(head.tag)
        if body is None:
            with speaking_for(connection, caller):
                body = _made(connection, head)
        if body is not None:
            return head, body
        with speaking_for(connection, caller):
            answer = connection.cursor(row_factory=namedtuple_row).execute(_HEAD).fetchone()
    # Three manifests were replaced between two queries each: the next sync finds a calmer moment.
    raise Problem(
        503, "manifest_changing", "The manifest is being replaced.", "Ask again.", headers={"Retry-After": "1"}
    )


def _made(connection: psycopg.Connection[Any], head: _Head) -> _Body | None:
    """Make the answer of this head; None where its manifest was replaced meanwhile."""
    row = connection.execute(_RULES, (head.content_hash,)).fetchone()
    if row is None:
        return None
    manifest_hash, rule_count, rules = row
    if len(rules) != rule_count:
        return None  # its entries were dropped behind the manifest that replaced it
    answer = {
        "rules": rules,
        "healing_tier": head.healing_tier,
        "version": manifest_hash[:12],
        "count": len(rules),
        "manifest_hash": manifest_hash,
        "rule_versions": {rule["id"]: rule["version"] for rule in rules},
        "tombstones": json.loads(head.tombstones),
        "commands": json.loads(head.commands),
    }
    plain = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
    zipped = gzip.compress(plain, 6, mtime=0) if len(plain) >= _GZIP_FROM_BYTES else b""
    body = _Body(plain, zipped)
    _BODIES.put(head.tag, body)
    return body
