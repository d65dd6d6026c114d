"""What an agent can execute: the action forms by agent version or by what the agent itself reports.

Belongs here: the grammar of actions, agent versions, and the choice of the form in which a rule is served.
Does not belong here: whether a runbook may be served at all (`manifest`). Unknown means incapable: a rule is
held back and listed rather than answered with `Unknown action`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flywheel_pipeline.errors import UsageError


class AgentVersion(NamedTuple):
    """A release of the agent; tuples compare in release order, a pre-release before its release."""

    major: int
    minor: int
    patch: int
    final: bool = True

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}" + ("" if self.final else " (pre-release)")


# The first release that understands each action form. Observed: 1.0.56 answers
# "Unknown action: run_windows_runbook:RB-WIN-SEC-016", the handler came with 1.0.70; run_runbook: came with
# the builds around 1.0.44; run_linux_runbook: came shortly before the Windows one, so 1.0.69 is the latest it
# can be. No release is on record for restart_service: and alert:, so they count as no older than the oldest
# colon form.
FIRST_VERSION: Mapping[str, AgentVersion] = {
    "escalate": AgentVersion(1, 0, 18),
    "run_runbook": AgentVersion(1, 0, 44),
    "restart_service": AgentVersion(1, 0, 44),
    "alert": AgentVersion(1, 0, 44),
    "run_linux_runbook": AgentVersion(1, 0, 69),
    "run_windows_runbook": AgentVersion(1, 0, 70),
}

# The form in which a current agent is told to run a runbook of a platform. macOS never had a form of its own.
FORM_BY_PLATFORM: Mapping[str, str] = {
    "windows": "run_windows_runbook",
    "linux": "run_linux_runbook",
    "macos": "run_runbook",
}

_VERSION = re.compile(r"v?([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_ACTION = re.compile(r"(?P<form>[a-z][a-z_]*)(?::(?P<argument>\S(?:.*\S)?))?")


@dataclass(frozen=True)
class Capability:
    """Whether an agent can execute an action.

    Attributes:
        ok: true only where it is known that the agent can.
        reason: one phrase; why not, or by what it is known.
        action: the action in the form to serve; empty where there is none.
    """

    ok: bool
    reason: str
    action: str = ""


@dataclass(frozen=True)
class Action:
    """An action taken apart: `run_runbook:LIN-SSH-001` is form and argument, `escalate` form alone."""

    form: str
    argument: str | None


def parse_version(version: str | None) -> AgentVersion | None:
    """Read an agent version such as `1.0.70`, `v1.0.70` or `1.0.71-rc1`.

    Returns:
        The version, or None where it is missing or no version (`unknown`): such an agent is capable of
        nothing.
    """
    match = _VERSION.fullmatch((version or "").strip())
    if match is None:
        return None
    return AgentVersion(int(match[1]), int(match[2]), int(match[3]), final=match[4] is None)


def parse_action(action: str) -> Action:
    """Take an action apart by the grammar `form` or `form:argument`.

    Raises:
        UsageError: no such form, a form without the argument it needs, or an argument where there is none.
    """
    match = _ACTION.fullmatch(action)
    known = ", ".join(sorted(FIRST_VERSION))
    if match is None or match["form"] not in FIRST_VERSION:
        raise UsageError(f"{action!r} is no action an agent knows.", hint=f"The forms are {known}.")
    if (match["form"] == "escalate") != (match["argument"] is None):
        wants = "takes no argument" if match["form"] == "escalate" else "needs an argument after the colon"
        raise UsageError(f"{action!r}: {match['form']} {wants}.", hint=f"The forms are {known}.")
    return Action(match["form"], match["argument"])


def supports(agent_version: str | None, action: str, capabilities: Any = None) -> Capability:
    """Decide whether an agent can execute an action.

    What the agent reports about itself outranks its version. A report that is not a list of action forms
    counts as a report of nothing.

    Args:
        agent_version: as the agent sent it, e.g. `1.0.56`; None or unreadable: incapable.
        action: e.g. `run_windows_runbook:RB-WIN-SEC-016`.
        capabilities: `appliances.capabilities`: a list of action forms, or None if the agent reports none.

    Raises:
        UsageError: the action is not in the grammar.
    """
    form = parse_action(action).form
    if capabilities is not None:
        if not isinstance(capabilities, list) or not all(isinstance(c, str) for c in capabilities):
            return Capability(False, "the agent's report of its capabilities is not a list of action forms")
        if form in {c.rstrip(":") for c in capabilities}:
            return Capability(True, f"the agent reports {form}", action)
        return Capability(False, f"the agent does not report {form}")
    version = parse_version(agent_version)
    if version is None:
        return Capability(
            False, f"agent version {agent_version or 'unknown'} cannot be read, so nothing is known of it"
        )
    if version < FIRST_VERSION[form]:
        return Capability(False, f"agent {version} is older than {FIRST_VERSION[form]}, the first with {form}")
    return Capability(True, f"{form} came with {FIRST_VERSION[form]}", action)


def action_for(runbook_id: str, platform: str) -> str:
    """The action by which a current agent runs a runbook, e.g. `run_windows_runbook:RB-WIN-SEC-001`.

    Raises:
        UsageError: the platform is none of windows, linux, macos.
    """
    if platform not in FORM_BY_PLATFORM:
        raise UsageError(f"{platform!r} is no platform.", hint="Platforms are windows, linux and macos.")
    return f"{FORM_BY_PLATFORM[platform]}:{runbook_id}"


def served_action(runbook_id: str, platform: str, agent_version: str | None, capabilities: Any = None) -> Capability:
    """The form in which this agent gets a runbook: the platform's own, else the older `run_runbook:`.

    Returns:
        A capability whose action is the form to serve; not ok, with the reason against the platform's own
        form and against the older one, where the agent can run neither.
    """
    try:
        newest = supports(agent_version, action_for(runbook_id, platform), capabilities)
        older = supports(agent_version, f"run_runbook:{runbook_id}", capabilities)
    except UsageError as impossible:
        return Capability(False, impossible.message)
    if newest.ok:
        return newest
    if older.ok or older.reason == newest.reason:
        return older
    return Capability(False, f"{newest.reason}; {older.reason}")
