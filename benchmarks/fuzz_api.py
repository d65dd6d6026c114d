r"""Broken payloads against `flywheel serve`: none may end it, none may be answered 5xx, each is kept or refused with a reason.

Nine in ten are lines of NDJSON batches (a broken line must spoil no other), one in ten is a body of its own: cut off, not
UTF-8, nested deep, gzip that is none, another media type, no JSON. Each sender speaks for many appliances in turn, so that
the limits of one do not set the pace. A mutation that left a post whole may land; how many did is printed. At the end
every payload has its answer, every answer "rejected" is a reject in the database, and what landed is in the log.

    python benchmarks/fuzz_api.py [--payloads 100000] [--seed 1] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
import uvloop
from bench_api import Line, line, served, template

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.delivery.tokens import issue

SENDERS, APPLIANCES_EACH = 8, 8
SIZES = (9, 45, 90, 450)
#: A request without an answer for so long counts as hanging.
PATIENCE_SECONDS = 60.0

VALUES: list[bytes] = [
    b"null", b"true", b"-1", b"1e999", b"9" * 400, b"NaN", b"Infinity", b"[]", b"{}", b'""', b'"\\u0000"', b'"\\ud800"',
    b'"' + b"x" * 5000 + b'"', b'"2026-13-45T99:99:99Z"', b'"0001-01-01T00:00:00Z"', b"[[[[[[]]]]]]", b"1.5", b'"site-999"',
    b'{"a":' * 300 + b"1" + b"}" * 300, b'"\xff\xfe"', b'"\\u202e\xe2\x80\xae"', b"\"'; DROP TABLE sites; --\"",
]  # fmt: skip
FIELDS = [b"site_id", b"reported_at", b"execution", b"execution_id", b"runbook_id", b"hostname", b"platform",
          b"incident_type", b"started_at", b"success", b"status", b"resolution_level", b"confidence", b"retry_count"]  # fmt: skip


def broken(pick: random.Random, row: bytes) -> bytes:
    """A post with something wrong in one line; newlines are kept out, they would make two of it."""
    act = pick.randrange(7)
    if act == 0:
        payload = row[: pick.randrange(1, len(row))]
    elif act == 1:
        payload = bytes(pick.randrange(256) for _ in range(pick.randrange(1, 60)))
    elif act == 2:
        at = pick.randrange(len(row))
        payload = row[:at] + bytes([pick.randrange(256)]) + row[at + 1 :]
    elif act == 3:
        payload = row.replace(b'"' + pick.choice(FIELDS) + b'"', b'"x"', 1)
    elif act == 4:
        depth = pick.randrange(1, 3000)
        payload = b"[" * depth + b"]" * pick.choice([depth, 0])
    else:
        field = b'"' + pick.choice(FIELDS) + b'": '
        begin, found, rest = row.partition(field)
        comma = rest.find(b", ")
        payload = begin + found + pick.choice(VALUES) + (rest[comma:] if comma >= 0 else b"}}")
    return payload.replace(b"\n", b" ").strip() or b"?"


def body_of_its_own(pick: random.Random, row: bytes) -> tuple[str, bytes]:
    """Headers and a broken body."""
    kind = pick.choice(
        ["application/json"] * 5 + ["application/x-ndjson", "text/plain", "application/json; charset=utf-16"]
    )
    head = f"Content-Type: {kind}\r\n" + pick.choice(
        [""] * 6 + ["Content-Encoding: gzip\r\n", "Content-Encoding: br\r\n"]
    )
    payload = broken(pick, row)
    return head, pick.choice([payload, b"[" + payload, b"[" + payload + b"," + row + b"]", b"\x1f\x8b" + payload])


@dataclass
class Outcome:
    """What became of the payloads, and what must not have happened.

    `rows` counts rows of answered batches (rejected, landed); `rejects` are the ids named in the answers: lines that are the
    same byte for byte share one.
    """

    became: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    again: int = 0
    requests: int = 0
    rejects: set[int] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)

    @property
    def answered(self) -> int:
        """Payloads that have their answer."""
        return self.became.total()


def enrol(engine: sa.Engine) -> list[str]:
    """Register the appliances, each at a site of its own; return their tokens."""
    with engine.begin() as connection:
        return [
            issue(connection, f"appliance-{n:03d}", site_id=f"site-{n:03d}", actor="fuzz", reason="benchmark").token
            for n in range(SENDERS * APPLIANCES_EACH)
        ]


def shares(payloads: int) -> list[list[int]]:
    """What each sender sends, as sizes of its requests: 0 is a body of its own, which is one payload."""
    pick = random.Random(f"shares {payloads}")
    sizes: list[int] = []
    left = payloads * 9 // 10
    while left > 0:
        sizes.append(min(pick.choice(SIZES), left))
        left -= sizes[-1]
    sizes += [0] * (payloads - payloads * 9 // 10)
    pick.shuffle(sizes)
    return [sizes[number::SENDERS] for number in range(SENDERS)]


async def fuzz(port: int, tokens: list[str], payloads: int, seed: int) -> Outcome:
    """Send; return what became of the payloads."""
    found = Outcome()

    async def sender(number: int, sizes: list[int]) -> None:
        pick, wire = random.Random(seed * 1000 + number), Line(port)
        own = range(number * APPLIANCES_EACH, (number + 1) * APPLIANCES_EACH)
        rows = {each: template(f"site-{each:03d}") for each in own}
        for turn, size in enumerate(sizes):
            appliance = own[turn % APPLIANCES_EACH]
            path = f"POST /api/agent/executions HTTP/1.1\r\nAuthorization: Bearer {tokens[appliance]}\r\n"
            if size:
                lines = [broken(pick, rows[appliance] % (b"f-%d" % pick.getrandbits(60))) for _ in range(size)]
                head, body = "Content-Type: application/x-ndjson\r\n", b"\n".join(lines)
            else:
                head, body = body_of_its_own(pick, rows[appliance] % (b"f-%d" % pick.getrandbits(60)))
            await send(wire, path + head, body, size)

    async def send(wire: Line, head: str, body: bytes, size: int) -> None:
        for _ in range(100):
            found.requests += 1
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    status, headers, answer = await wire.ask(head, body)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                found.wrong.append(f"{type(error).__name__} for {body[:80]!r}")
                wire.close()
                return
            if status != 429:
                judge(status, answer, body, size)
                return
            found.again += 1
            await asyncio.sleep(float(headers["retry-after"]))
        found.wrong.append("429 for ever")

    def judge(status: int, answer: bytes, body: bytes, size: int) -> None:
        told = json.loads(answer)
        results = told.get("results")
        if status >= 500 or (status >= 400 and not (told.get("code") and told.get("reason"))):
            found.wrong.append(f"{status} for {body[:80]!r}")
        if results is None:
            if "reject_id" in told:
                found.rejects.add(told["reject_id"])
            found.became[f"refused {status} {told.get('code')}"] += size or 1
            return
        if size and len(results) != size:
            found.wrong.append(f"{size} sent, {len(results)} answered: {body[:80]!r}")
        # A body of its own that is a list of two or more is still one payload.
        outcomes = Counter("rejected" if r["outcome"] == "rejected" else "landed" for r in results)
        refused = [r for r in results if r["outcome"] == "rejected"]
        found.rejects.update(r["reject_id"] for r in refused)
        if not all(r.get("reason") and r.get("reason_code") for r in refused):
            found.wrong.append(f"rejected without a reason: {body[:80]!r}")
        found.rows += outcomes
        found.became.update(outcomes if size else ["rejected" if outcomes["rejected"] else "landed"])

    async def progress() -> None:
        begun = time.monotonic()
        while True:
            await asyncio.sleep(5)
            passed, done = time.monotonic() - begun, found.answered
            print(
                f"  {passed:5.0f} s  {done:>8,} of {payloads:,} payloads, {found.requests:,} requests, {len(found.wrong)} failures, "
                f"{passed / max(done, 1) * (payloads - done):.0f} s to go",
                file=sys.stderr,
                flush=True,
            )

    teller = asyncio.create_task(progress())
    await asyncio.gather(*(sender(number, sizes) for number, sizes in enumerate(shares(payloads))))
    teller.cancel()
    return found


def main() -> None:
    """Send them; exit 1 if one failed the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="5,000 payloads")
    options = parser.parse_args()
    payloads = 5_000 if options.quick else options.payloads
    home = Path(tempfile.mkdtemp(prefix="fw-fuzz-"))
    server = EmbeddedServer(home)
    server.ensure_running()
    try:
        engine = open_engine(server.url)
        migrate.upgrade(engine)
        tokens = enrol(engine)
        with served(server.url.render_as_string(hide_password=False), home) as port:
            begun = time.monotonic()
            found = uvloop.run(fuzz(port, tokens, payloads, options.seed))
            seconds = time.monotonic() - begun
        with engine.connect() as connection:
            kept = {
                row.id: bool(row.reason and row.reason_code)
                for row in connection.exec_driver_sql("SELECT id, reason, reason_code FROM telemetry_rejects")
            }
            landed = connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one()
        engine.dispose()
    finally:
        server.remove()
        shutil.rmtree(home, ignore_errors=True)
    for what, count in found.became.most_common():
        print(f"  {count:>8,} {what}")
    print(*found.wrong[:10], sep="\n", end="\n" if found.wrong else "")
    met = line(
        not found.wrong
        and found.answered == payloads
        and found.rejects == kept.keys()
        and all(kept.values())
        and 0 < landed <= found.rows["landed"],
        f"fuzz, {payloads:,} broken payloads in {found.requests:,} requests, {seconds:.0f} s: {len(found.wrong)} failures, "
        f"{found.answered:,} answered; the answers name {len(found.rejects):,} rejects with reasons, "
        f"{len(found.rejects - kept.keys())} of them not in the database and {len(kept.keys() - found.rejects)} there beside "
        f"them; {found.rows['landed']:,} left whole, {landed:,} in the log; {found.again:,} answers 429",
    )
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
