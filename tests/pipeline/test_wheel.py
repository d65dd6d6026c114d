"""The wheel: built without a network, with everything inside that the pipeline reads at run time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What is not Python and must travel with the package.
DATA = (
    "dbt_like_sql/**/*.sql",
    "flywheel_pipeline/database/routines/*.sql",
    "flywheel_pipeline/database/migrations/versions/*.py",
    "flywheel_pipeline/database/migrations/env.py",
    "flywheel_pipeline/database/seeds/*.yaml",
    "flywheel_pipeline/promotion/policies/*.yaml",
)
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _run(*command: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FLYWHEEL_"))}
    answer = subprocess.run(
        command, cwd=cwd, env={**environment, **OFFLINE}, capture_output=True, text=True, check=False, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `hatchling` builds it."""
    target = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target), cwd=ROOT)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel alone is installed."""
    target = tmp_path_factory.mktemp("site")
    _run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        "-t",
        str(target),
        str(wheel),
        cwd=target,
    )
    return target


def test_all_that_the_pipeline_reads_travels_inside(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for pattern in DATA:
        files = {file.relative_to(ROOT).as_posix() for file in ROOT.glob(pattern)}
        assert files, pattern
        assert files <= inside
    python = {file.relative_to(ROOT).as_posix() for file in (ROOT / "flywheel_pipeline").rglob("*.py")}
    assert python <= inside


def test_nothing_else_travels_inside(wheel: Path) -> None:
    for name in zipfile.ZipFile(wheel).namelist():
        top, _, rest = name.partition("/")
        assert top in ("flywheel_pipeline", "dbt_like_sql") or top.endswith(".dist-info"), name
        assert "__pycache__" not in rest, name
        assert not rest.endswith((".pyc", ".ndjson", ".log")), name


def test_the_console_script_and_the_pins_are_in_its_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "flywheel = flywheel_pipeline.cli:main" in archive.read(entry_points).decode()
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    text = archive.read(metadata).decode()
    assert "Requires-Python: <3.15,>=3.11" in text
    assert "Requires-Dist: dagster==" in text


def test_models_policies_seeds_and_the_graph_load_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    program = """
import json, sys
sys.path.insert(0, sys.argv[1])
import flywheel_pipeline
from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database import declared, seed
from flywheel_pipeline.promotion.policy import load_policy, policy_names
from flywheel_pipeline.sql_models.loader import load_models
graph = load_models()
print(json.dumps({
    "package": flywheel_pipeline.__file__,
    "paths": sorted(str(model.path) for model in graph.models.values()),
    "routines": [routine.name for routine in declared.routines()],
    "head": declared.head_revision(),
    "policies": [load_policy(name).name for name in policy_names()],
    "runbooks": len(seed.read_seed("runbooks")),
    "assets": len(list(build_defs().resolve_asset_graph().asset_nodes)),
}))
"""
    found = json.loads(_run(sys.executable, "-c", program, str(installed), cwd=tmp_path))
    assert found["package"].startswith(str(installed))
    assert len(found["paths"]) == len(list(ROOT.glob("dbt_like_sql/*/*.sql")))
    assert all(path.startswith(str(installed)) for path in found["paths"])
    assert found["routines"]
    assert found["head"]
    assert {"standard", "legacy", "high_risk"} <= set(found["policies"])
    assert found["runbooks"] == 51
    assert found["assets"] > 20


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from flywheel_pipeline.cli import main; main()"
    assert _run(sys.executable, "-c", program, str(installed), "gate", "60", "0", "--json", cwd=tmp_path).startswith(
        "{"
    )
