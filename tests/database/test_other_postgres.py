"""Any PostgreSQL of version 15 or later by URL: the oldest one that this machine has."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import old_system
import pytest
import sqlalchemy as sa

from flywheel_pipeline.database import adopt, migrate
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable


def installed() -> list[tuple[int, Path]]:
    """Major version and `bin` of every PostgreSQL server from system packages, oldest first."""
    found = []
    for program in Path("/usr/lib/postgresql").glob("*/bin/postgres"):
        version = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout
        major = re.search(r"(\d+)", version)
        if major:
            found.append((int(major[1]), program.parent))
    return sorted(found)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """URL of a fresh cluster of the oldest PostgreSQL >= 15 installed here, with a password."""
    candidates = [entry for entry in installed() if entry[0] >= 15]
    if not candidates:
        pytest.skip("no PostgreSQL server >= 15 from system packages under /usr/lib/postgresql")
    _, binaries = candidates[0]
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    place = Path(tempfile.mkdtemp(prefix="fwo-"))
    os.chown(place, user.pw_uid, user.pw_gid)
    password = place / "password"
    password.write_text("p@ss/word")
    password.chmod(0o644)
    data = place / "data"
    options = ["--auth=scram-sha-256", f"--pwfile={password}", "--no-sync", "--encoding=UTF8", "--locale=C"]
    subprocess.run(
        [str(binaries / "initdb"), "-D", str(data), "-U", "owner", *options],
        check=True,
        capture_output=True,
        cwd="/",
        **identity,  # type: ignore[call-overload]
    )
    server = subprocess.Popen(
        [str(binaries / "postgres"), "-D", str(data), "-k", str(place), "-c", "listen_addresses="],
        stderr=subprocess.DEVNULL,
        cwd="/",
        **identity,  # type: ignore[call-overload]
    )
    text = f"postgresql://owner:p%40ss%2Fword@/postgres?host={place}"
    for _ in range(200):
        try:
            open_engine(text).dispose()
            break
        except DatabaseUnavailable:
            time.sleep(0.05)
    yield text
    server.send_signal(signal.SIGINT)
    server.wait()
    shutil.rmtree(place)


def test_upgrade_twice_and_check_on_another_postgresql(url: str) -> None:
    engine = open_engine(url)
    assert migrate.upgrade(engine).changes != ()
    assert migrate.upgrade(engine).changes == ()
    assert migrate.check(engine) == []
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success) "
                "VALUES ('e1', 's1', 'L1-FIREWALL-001', 'ws01', true)"
            )
        )
        assert connection.execute(sa.text("SELECT count(*) FROM touched_cells")).scalar_one() == 1
    engine.dispose()


def test_an_adoption_and_its_undo_on_another_postgresql(url: str) -> None:
    postgres = open_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with postgres.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE old_system")
    postgres.dispose()
    engine = open_engine(postgres.url.set(database="old_system"))
    old_system.make(engine)
    catalog, contents = old_system.fingerprint(engine), old_system.contents(engine)
    adopt.apply(engine, actor="Dana", reason="the pilot is over")
    assert migrate.check(engine) == []
    with engine.connect() as connection:
        rates = "SELECT max(success_rate) FROM rule_rates"  # the view, with an index on what it reads, was made again
        assert connection.exec_driver_sql(rates).scalar_one() <= 1
    adopt.undo(engine)
    after = old_system.fingerprint(engine)
    for kind in catalog.keys() - {"columns"}:  # before PostgreSQL 17 a computed column comes back as the last one
        assert after[kind] == catalog[kind], kind
    assert [fact[:-1] for fact in after["columns"]] == [fact[:-1] for fact in catalog["columns"]]
    assert old_system.contents(engine) == contents
    engine.dispose()


def test_a_wrong_password_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="password authentication failed") as refusal:
        open_engine(url.replace("p%40ss", "guess"))
    assert "guess" not in str(refusal.value)
