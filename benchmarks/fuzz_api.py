r"""Broken payloads against `flywheel serve`: none may end it, none may be answered 5xx, each is kept or refused with a reason.

Nine in ten are lines of NDJSON batches (a broken line must spoil no other), the others are bodies of their own: cut off,
not UTF-8, nested deep, gzip that is none, another media type, no JSON. A mutation that left a post whole may land; how
many did is printed. At the end the rejects in the database are held against the answers.

    python benchmarks/fuzz_api.py [--payloads 100000] [--seed 1] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench_api import BATCH, Line, enrol, line, served, template

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine

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


async def fuzz(port: int, tokens: list[str], payloads: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Send; return what became of the payloads, and what must not have happened."""
    became: Counter[str] = Counter()
    wrong: list[str] = []
    turn = iter(range(payloads))

    async def sender(number: int) -> None:
        pick, wire = random.Random(seed * 1000 + number), Line(port)
        row = template(f"site-{number:03d}") % b"f-%d" % number
        path = f"POST /api/agent/executions HTTP/1.1\r\nAuthorization: Bearer {tokens[number]}\r\n"
        while next(turn, None) is not None:
            if pick.random() < 0.5:
                rows = [
                    broken(pick, row.replace(b"f-%d" % number, b"f-%d-%d" % (number, pick.getrandbits(60))))
                    for _ in range(9)
                ]
                for _ in range(8):
                    next(turn, None)
                while len(rows) < BATCH and next(turn, None) is not None:
                    rows.append(broken(pick, row))
                head, body, sent = "Content-Type: application/x-ndjson\r\n", b"\n".join(rows), len(rows)
            else:
                head, body = body_of_its_own(pick, row)
                sent = 1
            for _ in range(100):
                try:
                    status, headers, answer = await wire.ask(path + head, body)
                except (OSError, asyncio.IncompleteReadError) as error:
                    wrong.append(f"{type(error).__name__} for {body[:80]!r}")
                    wire.close()
                    break
                if status != 429:
                    told = json.loads(answer)
                    results = told.get("results")
                    if status >= 500 or (status >= 400 and not (told.get("code") and told.get("reason"))):
                        wrong.append(f"{status} for {body[:80]!r}")
                    if results is None:
                        became[f"refused {status} {told['code']}"] += sent
                    else:
                        became.update("rejected" if r["outcome"] == "rejected" else "landed" for r in results)
                        wrong.extend(
                            [f"no reason: {r}" for r in results if r["outcome"] == "rejected" and not r.get("reason")]
                        )
                        if sent > 1 and len(results) != sent:
                            wrong.append(f"{sent} sent, {len(results)} answered")
                    break
                became["429, sent again"] += 1
                await asyncio.sleep(float(headers["retry-after"]))
            else:
                wrong.append("429 for ever")

    await asyncio.gather(*(sender(number) for number in range(4)))
    return became, wrong


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
        tokens = enrol(engine, 4)
        begun = time.monotonic()
        with served(server.url.render_as_string(hide_password=False), home) as port:
            became, wrong = asyncio.run(fuzz(port, tokens, payloads, options.seed))
        with engine.connect() as connection:
            kept, landed = connection.exec_driver_sql(
                "SELECT (SELECT sum(times_seen) FROM telemetry_rejects), (SELECT count(*) FROM execution_telemetry)"
            ).one()
        engine.dispose()
    finally:
        server.remove()
        shutil.rmtree(home, ignore_errors=True)
    for what, count in became.most_common():
        print(f"  {count:>8,} {what}")
    print(*wrong[:10], sep="\n", end="\n" if wrong else "")
    met = line(
        not wrong and became["rejected"] > 0 and kept > 0,
        f"fuzz, {payloads:,} broken payloads in {time.monotonic() - begun:.0f} s: {len(wrong)} failures; rejects in the database "
        f"{kept:,} (sightings), executions {landed:,}",
    )
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
