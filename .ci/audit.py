"""The audit of dependencies: what can be known without the network, always; known vulnerabilities, where somebody answers.

Offline, in a second:

- both locks are whole: exact versions, a SHA-256 for each, no URL, no index; the one for more than one machine
  (`make scale`) holds all of the other, at the same versions
- every direct dependency is in the lock, within bounds that end somewhere, with the reason beside it in pyproject.toml
- what is installed is what is locked, nothing else is, and it fits together (every requirement of every distribution);
  what only the larger lock holds may be missing
- every licence is on the list below

Online: pip-audit asks for the known vulnerabilities of every locked version. It passes over what the service does not
know, so an answer for nothing reads like "no known vulnerabilities": here each version without an answer counts as not
asked. A service that cannot be reached is said in capital letters, and fails only `--known`, which asks for that answer.

    python .ci/audit.py             # as `make lint` does: asks at most once a day for one lock file
    python .ci/audit.py --offline   # never asks
    python .ci/audit.py --known     # as `make audit` does: asks now, and fails without an answer
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = "requirements.lock"
SCALE_LOCK = "requirements-scale.lock"
#: SPDX ids. Permissive ones, and three that ask for no more than that changes of their own files are published: these
#: libraries are used as they are. Another licence is read by somebody before it is added here.
LICENCES = frozenset(
    [
        "0BSD",
        "Apache-2.0",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "PSF-2.0",
        "Zlib",
        "LGPL",
        "LGPL-3.0-only",
        "MPL-2.0",
    ]
)
#: What distributions write where an SPDX id would stand: classifiers and the old field.
SAID = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd license": "BSD",
    "gnu library or lesser general public license (lgpl)": "LGPL",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}
#: Made by `python -m venv` and `pip install -e .`, not by the lock.
UNLOCKED = frozenset({"pip", "setuptools", "wheel", "flywheel-pipeline"})
SERVICE = "https://pypi.org/pypi/{name}/{version}/json"
DAY_SECONDS = 86_400.0
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[a-z0-9,._-]+\])?==([A-Za-z0-9][A-Za-z0-9.+!_-]*)(?: ; (.+?))?$")
_HASH = re.compile(r"^--hash=sha256:[0-9a-f]{64}$")
_DIRECT = re.compile(r'^\s*"(?P<requirement>[^"]+)",\s*(?:#\s*(?P<reason>\S.*))?$')


@dataclass(frozen=True)
class Pin:
    """One entry of the lock. `here`: whether its marker holds on this machine."""

    name: str
    version: str
    here: bool


# -- the lock --------------------------------------------------------------------------------------


def read_lock(text: str) -> tuple[list[Pin], list[str]]:
    """Return the pins of a lock file, and what is wrong with it."""
    pins: list[Pin] = []
    wrong: list[str] = []
    for entry in re.split(r"\n(?=\S)", text.strip()):
        head, *hashes = (line.strip().removesuffix("\\").strip() for line in entry.split("\n"))
        found = _PIN.match(head)
        if found is None:
            wrong.append(f"the lock has a line that is no exact pin: {head[:80]!r}")
            continue
        name, version, marker = found.groups()
        if not hashes or not all(_HASH.match(line) for line in hashes):
            wrong.append(f"the lock has no SHA-256 for {name}, or something beside it")
        pins.append(Pin(canonicalize_name(name), version, marker is None or Marker(marker).evaluate()))
    twice = {pin.name for pin in pins if pin.here and sum(p.name == pin.name and p.here for p in pins) > 1}
    return pins, wrong + [f"the lock pins {name} twice" for name in sorted(twice)]


def direct(text: str) -> Iterator[tuple[Requirement, str | None]]:
    """The direct dependencies of pyproject.toml, each with the reason written beside it."""
    project = tomllib.loads(text)["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    reasons = {m["requirement"]: m["reason"] for line in text.splitlines() if (m := _DIRECT.match(line))}
    for requirement in declared:
        yield Requirement(requirement), reasons.get(requirement)


def direct_problems(text: str, pins: Sequence[Pin]) -> Iterator[str]:
    """What is wrong with the direct dependencies."""
    for requirement, reason in direct(text):
        name = canonicalize_name(requirement.name)
        locked = [pin.version for pin in pins if pin.name == name]
        if not locked:
            yield f"{name} is in pyproject.toml and not in the lock: run `make lock`"
        if any(version not in requirement.specifier for version in locked):
            yield f"{name} is locked at {', '.join(locked)}, pyproject.toml wants {requirement.specifier}: run `make lock`"
        if not any(part.operator in ("==", "<", "<=", "~=") for part in requirement.specifier):
            yield f"{name} has no upper bound in pyproject.toml: a new major version would come with the next lock"
        if reason is None:
            yield f"{name} has no reason beside it in pyproject.toml"


# -- what is installed -----------------------------------------------------------------------------


def scale_problems(pins: Sequence[Pin], scale: Sequence[Pin]) -> Iterator[str]:
    """Where the lock for more than one machine differs from the lock for one."""
    versions = {(pin.name, pin.version) for pin in scale}
    for pin in pins:
        if (pin.name, pin.version) not in versions:
            yield f"{SCALE_LOCK} does not hold {pin.name} {pin.version} as {LOCK} does: run `make lock`"


def installed_problems(
    pins: Sequence[Pin], installed: Mapping[str, Distribution], scale: Sequence[Pin] = ()
) -> Iterator[str]:
    """Where the environment differs from the locks, or does not fit together. What only `scale` holds may be missing."""
    needed = {pin.name for pin in pins if pin.here}
    wanted = {pin.name: pin.version for pin in [*scale, *pins] if pin.here}
    for name, version in wanted.items():
        found = installed.get(name)
        if found is None and name not in needed:
            continue
        if found is None or found.version != version:
            yield f"{name} {version} is locked, {'nothing' if found is None else found.version} is installed: run `make install`"
    for name in sorted(installed.keys() - wanted.keys() - UNLOCKED):
        yield f"{name} is installed and not in the lock: `make clean` and `make install` give the locked ones alone"
    for name, distribution in installed.items():
        for text in distribution.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                yield f"{name} requires what cannot be read: {text}"
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            other = installed.get(canonicalize_name(requirement.name))
            if other is None:
                yield f"{name} requires {requirement}, which is not installed"
            elif not requirement.specifier.contains(other.version, prereleases=True):
                yield f"{name} requires {requirement}, and {other.version} is installed"


def licences(distribution: Distribution) -> list[frozenset[str]]:
    """The licences of a distribution: each element must be allowed by one of its alternatives."""
    metadata = distribution.metadata
    expression = metadata.get("License-Expression") or ""
    old = (metadata.get("License") or "").strip()
    classifiers = [
        value.rsplit(" :: ", 1)[-1]
        for value in metadata.get_all("Classifier") or []
        if value.startswith("License :: ") and "DFSG" not in value
    ]
    if not expression and old and (("\n" not in old and _known(old)) or not classifiers):
        expression = old.split("\n")[0]
    if expression:
        return [
            frozenset(SAID.get(part.strip(" ()").lower(), part.strip(" ()")) for part in re.split(r" OR ", both))
            for both in re.split(r" AND ", expression)
        ]
    return [frozenset(SAID.get(name.lower(), name) for name in classifiers)]


def _known(text: str) -> bool:
    parts = (part.strip(" ()") for part in re.split(r" OR | AND ", text))
    return all(part in LICENCES or part.lower() in SAID for part in parts)


def licence_problems(installed: Iterable[Distribution]) -> Iterator[str]:
    """Distributions under a licence that nobody has allowed."""
    for distribution in installed:
        for alternatives in licences(distribution):
            if not alternatives & LICENCES:
                said = " or ".join(sorted(alternatives)) or "no licence"
                yield (
                    f"{canonicalize_name(distribution.name)} is under {said!r}: read it, and add its id to .ci/audit.py"
                )


# -- known vulnerabilities -------------------------------------------------------------------------


def answers(pins: Sequence[Pin], seconds: float = 3.0) -> bool:
    """Whether the vulnerability service knows one of the first locked versions: a mirror of the index may know none."""
    for pin in pins[:3]:
        try:
            with urllib.request.urlopen(SERVICE.format(name=pin.name, version=pin.version), timeout=seconds) as answer:  # noqa: S310
                if answer.status == 200:
                    return True
        except urllib.error.HTTPError:
            continue
        except (urllib.error.URLError, OSError):
            return False
    return False


def read_audit(report: Mapping[str, Any]) -> tuple[list[str], list[str], int]:
    """Read pip-audit's JSON; return (vulnerabilities, names it got no answer for, how many it got one for)."""
    known = [
        f"{found['name']} {found['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for found in report["dependencies"]
        for hole in found.get("vulns", ())
    ]
    unanswered = [found["name"] for found in report["dependencies"] if "skip_reason" in found]
    return known, unanswered, len(report["dependencies"]) - len(unanswered)


def ask(lock: Path) -> Mapping[str, Any] | None:
    """Have pip-audit ask for every locked version; None if it broke off."""
    options = ["--require-hashes", "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--requirement", str(lock), *options, "--timeout", "10"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        report: Mapping[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        print(done.stderr.strip().splitlines()[-1:] or "pip-audit said nothing", file=sys.stderr)
        return None
    return report


def vulnerabilities(lock: Path, *, insist: bool) -> tuple[list[str], str]:
    """Return (problems, what to say about known vulnerabilities). A whole answer is good for a day and one lock file."""
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    stamp = Path(sys.prefix) / "audited.json"
    if not insist and stamp.exists():
        noted = json.loads(stamp.read_text())
        if noted["lock"] == digest and time.time() - noted["at"] < DAY_SECONDS:
            return [], f"no known vulnerabilities in {noted['asked']} locked versions, asked within a day"
    pins, _ = read_lock(lock.read_text("utf-8"))
    report = ask(lock) if answers(pins) else None
    if report is None:
        said = (
            "THE VULNERABILITY SERVICE DOES NOT ANSWER: nothing is known about vulnerabilities of the locked versions"
        )
        return ([said] if insist else []), f"{said}; `make audit` asks again"
    known, unanswered, asked = read_audit(report)
    if unanswered:
        said = f"NO ANSWER ABOUT {len(unanswered)} OF {len(unanswered) + asked} LOCKED VERSIONS: {', '.join(unanswered[:5])} …"
        return [*known, *([said] if insist else [])], said
    if not known:
        stamp.write_text(json.dumps({"lock": digest, "at": time.time(), "asked": asked}))
    return known, f"{len(known) or 'no'} known vulnerabilities in {asked} locked versions"


# -- all of it -------------------------------------------------------------------------------------


def offline_problems(root: Path = ROOT) -> tuple[list[str], str]:
    """Return (what is wrong, what was looked at) without asking anybody."""
    pins, wrong = read_lock((root / LOCK).read_text("utf-8"))
    scale, wrong_too = read_lock((root / SCALE_LOCK).read_text("utf-8"))
    project = (root / "pyproject.toml").read_text("utf-8")
    installed = {canonicalize_name(found.name): found for found in distributions(path=[*_site_packages()])}
    wrong += wrong_too
    wrong += scale_problems(pins, scale)
    wrong += direct_problems(project, scale)
    wrong += installed_problems(pins, installed, scale)
    wrong += licence_problems(found for name, found in installed.items() if name not in UNLOCKED)
    count = sum(1 for _ in direct(project))
    return (
        wrong,
        f"{len(pins)} and {len(scale)} locked versions with hashes, {count} direct with reasons, {len(installed)} installed as locked",
    )


def _site_packages() -> Iterator[str]:
    return (path for path in sys.path if path.startswith(sys.prefix))


def main() -> int:
    """Print what was found; 1 if something must be mended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="ask nobody")
    parser.add_argument(
        "--known", action="store_true", help="ask for known vulnerabilities, and fail without an answer"
    )
    options = parser.parse_args()
    wrong, looked = offline_problems()
    print(f"audit: {looked}")
    if not options.offline:
        known, said = vulnerabilities(ROOT / SCALE_LOCK, insist=options.known)
        wrong += known
        print(f"audit: {said}")
    for problem in wrong:
        print(f"audit: WRONG: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
