"""The oldest PostgreSQL >= 15 that this machine has from system packages, as a fresh cluster.

Belongs here: that server. Does not belong here: any assertion.
"""

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

import pytest

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


@pytest.fixture(scope="session")
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
