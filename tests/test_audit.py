"""The audit of dependencies finds what it is there to find, and an audit that nobody answered is not taken for a clean one."""

from __future__ import annotations

import importlib.util
import sys
from email.message import Message
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
HASH = f"    --hash=sha256:{'0' * 64}"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


audit: Any = _load()


class Made(Distribution):
    """A distribution that only says what it is."""

    def __init__(self, name: str, version: str, *, requires: tuple[str, ...] = (), **said: str) -> None:
        self._message = Message()
        for key, value in {"Metadata-Version": "2.1", "Name": name, "Version": version, **said}.items():
            self._message[key.replace("_", "-")] = value
        for requirement in requires:
            self._message["Requires-Dist"] = requirement

    def read_text(self, filename: str) -> str | None:
        return self._message.as_string() if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(path)


def test_this_repository_passes() -> None:
    wrong, looked = audit.offline_problems()
    assert wrong == []
    assert "locked versions with hashes" in looked


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        (f"a>=1 \\\n{HASH}", "no exact pin"),
        (f"--index-url https://elsewhere.example/simple\na==1 \\\n{HASH}", "no exact pin"),
        (f"a @ https://elsewhere.example/a.whl \\\n{HASH}", "no exact pin"),
        ("a==1", "no SHA-256 for a"),
        ("a==1 \\\n    --hash=md5:00", "no SHA-256 for a"),
        (f"a==1 \\\n{HASH}\na==2 \\\n{HASH}", "pins a twice"),
    ],
)
def test_a_lock_that_leaves_something_open_is_refused(lock: str, words: str) -> None:
    _, wrong = audit.read_lock(lock)
    assert any(words in problem for problem in wrong)


def test_a_lock_may_pin_one_version_for_each_python() -> None:
    lock = f"a==1 ; python_full_version < '3.9' \\\n{HASH}\na[x]==2 ; python_full_version >= '3.9' \\\n{HASH}"
    pins, wrong = audit.read_lock(lock)
    assert wrong == []
    assert [(pin.version, pin.here) for pin in pins] == [("1", False), ("2", True)]


def test_a_direct_dependency_without_bound_reason_or_lock_is_named() -> None:
    text = """
[project]
dependencies = [
  "a>=1",  # a reason
  "b>=1,<2",
  "c==3",  # a reason
  "d==1",  # a reason
]
[project.optional-dependencies]
dev = []
"""
    pins, _ = audit.read_lock("\n".join(f"{name}==1 \\\n{HASH}" for name in "abd"))
    found = list(audit.direct_problems(text, pins))
    assert [problem.split()[0] for problem in found] == ["a", "b", "c"]
    assert "no upper bound" in found[0]
    assert "no reason" in found[1]
    assert "not in the lock" in found[2]


def test_what_is_installed_beside_the_lock_or_does_not_fit_is_named() -> None:
    pins, _ = audit.read_lock("\n".join(f"{name}==1 \\\n{HASH}" for name in "abc"))
    installed = {
        found.name: found
        for found in (Made("a", "1", requires=("b>=2", "x; extra == 'more'", "y")), Made("b", "1"), Made("z", "1"))
    }
    assert [problem.partition(":")[0] for problem in audit.installed_problems(pins, installed)] == [
        "c 1 is locked, nothing is installed",
        "z is installed and not in the lock",
        "a requires b>=2, and 1 is installed",
        "a requires y, which is not installed",
    ]


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "Apache-2.0 OR GPL-3.0-only"}, True),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License": "Copyright (c) somebody", "Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General Public License v3"}, False),
        ({"License": "ask our sales department"}, False),
        ({}, False),
    ],
)
def test_a_licence_that_nobody_allowed_is_named(said: dict[str, str], allowed: bool) -> None:
    assert (list(audit.licence_problems([Made("a", "1", **said)])) == []) is allowed


def test_versions_that_the_service_passed_over_are_not_taken_for_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"a==1 \\\n{HASH}\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(audit, "answers", lambda _pins: True)
    passed_over = {"dependencies": [{"name": "a", "skip_reason": "not found"}]}
    monkeypatch.setattr(audit, "ask", lambda _lock: passed_over)
    problems, said = audit.vulnerabilities(lock, insist=False)
    assert problems == []
    assert "NO ANSWER ABOUT 1 OF 1" in said
    assert audit.vulnerabilities(lock, insist=True)[0] == [said]

    hole = {"id": "CVE-1", "fix_versions": ["2"]}
    monkeypatch.setattr(audit, "ask", lambda _lock: {"dependencies": [{"name": "a", "version": "1", "vulns": [hole]}]})
    assert audit.vulnerabilities(lock, insist=False)[0] == ["a 1: CVE-1, mended in 2"]

    monkeypatch.setattr(audit, "ask", lambda _lock: {"dependencies": [{"name": "a", "version": "1", "vulns": []}]})
    assert audit.vulnerabilities(lock, insist=False) == ([], "no known vulnerabilities in 1 locked versions")
    monkeypatch.setattr(audit, "answers", lambda _pins: False)
    assert "asked within a day" in audit.vulnerabilities(lock, insist=False)[1]
    problems, said = audit.vulnerabilities(lock, insist=True)  # by name it is asked anew
    assert problems != []
    assert "DOES NOT ANSWER" in said
    lock.write_text(f"a==2 \\\n{HASH}\n")
    assert "DOES NOT ANSWER" in audit.vulnerabilities(lock, insist=False)[1]  # another lock, another question


def test_every_installed_licence_is_read_as_something() -> None:
    named = {canonicalize_name(found.name): audit.licences(found) for found in distributions()}
    assert len(named) > 100
    assert [name for name, found in named.items() if not all(found)] == []


def test_the_larger_lock_holds_the_smaller_one_at_the_same_versions() -> None:
    small, _ = audit.read_lock(f"a==1 \\\n{HASH}\nb==2 \\\n{HASH}")
    large, _ = audit.read_lock(f"a==1 \\\n{HASH}\nb==3 \\\n{HASH}\nc==1 \\\n{HASH}")
    assert [problem.split(" as ")[0] for problem in audit.scale_problems(small, large)] == [
        "requirements-scale.lock does not hold b 2"
    ]


def test_what_only_the_larger_lock_holds_may_be_missing_but_not_differ() -> None:
    small, _ = audit.read_lock(f"a==1 \\\n{HASH}")
    large, _ = audit.read_lock(f"a==1 \\\n{HASH}\nc==1 \\\n{HASH}")
    assert list(audit.installed_problems(small, {"a": Made("a", "1")}, large)) == []
    assert list(audit.installed_problems(small, {"c": Made("c", "1")}, large)) != []
    (wrong,) = audit.installed_problems(small, {"a": Made("a", "1"), "c": Made("c", "2")}, large)
    assert wrong.startswith("c 1 is locked, 2 is installed")
