"""Parsing processes: the lines of a large file are parsed and encoded on all cores.

Belongs here: starting, feeding and losing those processes. Does not belong here: what happens to a line in them
(`blocks`); the database, of which they know nothing.

Python parses and encodes 45,000 rows/s a core, PostgreSQL takes more. The processes start while the importing process
parses the first blocks itself: one is a fresh interpreter (safe with threads and open connections), which imports the
contract once (0.6 s of CPU) and then forks the others, having no threads itself. They read the file through the
descriptor of the importing process and send back encoded rows, 0.7 us a row; whole ParsedRows would cost 14 us.

A process that ends too early, for whatever reason, loses nothing: its blocks are parsed by the importing process.
They end when their socket does, so that none outlives the import, even one that is killed.
"""

from __future__ import annotations

import logging
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any, Final

from flywheel_pipeline.telemetry.blocks import ParsedLines, RawBlock, parse_block
from flywheel_pipeline.telemetry.encoding import Encoder, encoder

#: More processes than this outrun one connection to PostgreSQL.
MOST_PROCESSES: Final = 4
#: So many blocks a process has before it: one in work and one that waits.
_BLOCKS_AHEAD: Final = 2
_END_SECONDS: Final = 5
_REQUEST: Final = struct.Struct("!QQQ")
_LENGTH: Final = struct.Struct("!Q")
_START: Final = (
    "import sys; sys.path[:] = sys.argv[4:]; from flywheel_pipeline.telemetry import parsers; parsers.serve()"
)

_log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------
# The importing process
# --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Process:
    """One parsing process as the importing process sees it; `pid` is None until it has reported."""

    socket: socket.socket
    pid: int | None = None
    lost: bool = False
    waiting: int = 0

    def ready(self) -> bool:
        """Whether it has reported; does not wait."""
        if self.pid is None and not self.lost:
            self.socket.setblocking(False)
            try:
                first = self.socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return False
            except OSError:
                first = b""
            finally:
                self.socket.setblocking(True)
            if first:
                self.report()
            else:
                self.lose()
        return not self.lost

    def report(self) -> None:
        """Wait for the report of a process that starts."""
        try:
            self.pid = _receive(self.socket)
        except (OSError, EOFError):
            self.lose()

    def ask(self, block: RawBlock) -> bool:
        """Have a block parsed; False when the process is gone."""
        try:
            self.socket.sendall(_REQUEST.pack(block.first_line, block.begin, len(block.data)))
        except OSError:
            self.lose()
            return False
        self.waiting += 1
        return True

    def take(self) -> ParsedLines | None:
        """Wait for the oldest block that was asked for; None when the process is gone."""
        self.waiting -= 1
        if not self.lost:
            try:
                return ParsedLines(*_receive(self.socket))
            except (OSError, EOFError):
                self.lose()
        return None

    def lose(self) -> None:
        """Say once that the process is gone."""
        if not self.lost:
            self.lost = True
            self.socket.close()
            _log.warning(
                "A parsing process (pid %s) ended before its time; the importing process parses its lines itself.",
                self.pid or "unknown",
            )


@dataclass(slots=True)
class Parsers:
    """Parses blocks of one file: with processes where there are some that are ready, otherwise by itself.

    `by_processes` counts the blocks that processes parsed.
    """

    received_at: datetime
    encode: Encoder
    processes: list[_Process] = field(default_factory=list)
    by_processes: int = 0

    def parse(self, blocks: Iterable[RawBlock]) -> Iterator[tuple[RawBlock, ParsedLines]]:
        """Blocks with what became of their lines, in their order; bounded memory.

        A damaged answer, which no process sends, raises what unmarshalling raises.
        """
        pending: deque[tuple[RawBlock, _Process | ParsedLines]] = deque()
        for block in blocks:
            pending.append((block, self._assign(block)))
            ahead = _BLOCKS_AHEAD * sum(process.pid is not None for process in self.processes)
            while pending and (isinstance(pending[0][1], ParsedLines) or len(pending) > ahead):
                yield self._finish(*pending.popleft())
        while pending:
            yield self._finish(*pending.popleft())

    def wait_until_ready(self) -> None:
        """Wait until each process has reported or ended."""
        for process in self.processes:
            if process.pid is None and not process.lost:
                process.report()

    def _assign(self, block: RawBlock) -> _Process | ParsedLines:
        if block.overlong is None:
            ready = [process for process in self.processes if process.ready()]
            for process in sorted(ready, key=lambda one: one.waiting):
                if process.ask(block):
                    return process
        return parse_block(block, self.received_at, self.encode)

    def _finish(self, block: RawBlock, work: _Process | ParsedLines) -> tuple[RawBlock, ParsedLines]:
        if isinstance(work, ParsedLines):
            return block, work
        parsed = work.take()
        if parsed is None:
            return block, parse_block(block, self.received_at, self.encode)
        self.by_processes += 1
        return block, parsed


@contextmanager
def parsers(file: IO[bytes], received_at: datetime, types: Sequence[str], processes: int) -> Iterator[Parsers]:
    """Parsers of one file with so many `processes`, which end with the block; with 0 all is done in this process.

    `types` are the PostgreSQL types of contract.COLUMNS. Where no process can be started, none is, with a warning.
    """
    team = Parsers(received_at, encoder(types))
    leader: subprocess.Popen[bytes] | None = None
    if processes:
        pairs = [socket.socketpair() for _ in range(processes)]
        team.processes = [_Process(ours) for ours, _ in pairs]
        theirs = [theirs.fileno() for _, theirs in pairs]
        arguments = [str(file.fileno()), ",".join(map(str, theirs)), f"{received_at.isoformat()} {','.join(types)}"]
        command = [sys.executable, "-c", _START, *arguments, *sys.path]
        try:
            leader = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[file.fileno(), *theirs])
        except OSError as error:
            _log.warning("No parsing process can be started (%s); the import goes on with one process.", error)
            team.processes = []
        for _, end in pairs:
            end.close()
        if leader is None:
            for ours, _ in pairs:
                ours.close()
    try:
        yield team
    finally:
        if leader is not None:
            _end(leader, team.processes)


def process_count() -> int:
    """So many parsing processes this machine has use for: one a core, none where there is one core."""
    if os.name != "posix" or not sys.executable:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 else min(cores, MOST_PROCESSES)


def _end(leader: subprocess.Popen[bytes], processes: Iterable[_Process]) -> None:
    for process in processes:
        process.socket.close()
    try:
        leader.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        leader.kill()
        leader.wait()


# --------------------------------------------------------------------------------------------------
# The parsing process
# --------------------------------------------------------------------------------------------------


def serve() -> None:
    """Be a parsing process, and first the parent of the others; ends when the importing process closes its sockets."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the importing process, and with it this one
    file, sockets, rest = sys.argv[1:4]
    received_at, types = rest.split(" ")
    encode = encoder(types.split(","))
    ends = [socket.socket(fileno=int(number)) for number in sockets.split(",")]
    children: list[int] = []
    own = ends[0]
    for end in ends[1:]:
        pid = os.fork()
        if pid == 0:
            own, children = end, []
            break
        children.append(pid)
    for end in ends:
        if end is not own:
            end.close()
    with suppress(BrokenPipeError, ConnectionResetError, EOFError):  # the import is over
        _serve(own, int(file), datetime.fromisoformat(received_at), encode)
    own.close()
    for pid in children:
        os.waitpid(pid, 0)


def _serve(own: socket.socket, file: int, received_at: datetime, encode: Encoder) -> None:
    _send(own, os.getpid())
    while True:
        first_line, begin, length = _REQUEST.unpack(_exactly(own, _REQUEST.size))
        data = bytearray()
        while len(data) < length:
            part = os.pread(file, length - len(data), begin + len(data))
            if not part:
                return  # the file was cut; the importing process still has these lines
            data += part
        parsed = parse_block(RawBlock(first_line, begin, begin + length, bytes(data)), received_at, encode)
        _send(own, (parsed.execution_ids, parsed.rows, parsed.line_numbers, parsed.refused))


def _send(to: socket.socket, value: Any) -> None:
    message = marshal.dumps(value)
    to.sendall(_LENGTH.pack(len(message)))
    to.sendall(message)


def _receive(of: socket.socket) -> Any:
    (length,) = _LENGTH.unpack(_exactly(of, _LENGTH.size))
    return marshal.loads(_exactly(of, length))  # noqa: S302 - of our own process, over its own pair of sockets


def _exactly(of: socket.socket, length: int) -> bytearray:
    message = bytearray(length)
    view, got = memoryview(message), 0
    while got < length:
        part = of.recv_into(view[got:])
        if not part:
            raise EOFError
        got += part
    return message
