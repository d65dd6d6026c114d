"""What an agent can execute: the action forms by agent version or by what the agent itself reports.

Belongs here: the grammar of actions, agent versions, and the choice of the form in which a rule is served.
Does not belong here: whether a runbook may be served at all (`manifest`). Unknown means incapable: a rule is
held back and listed rather than answered with `Unknown action`. What telemetry shows outranks what an agent
claims: a form that its release answered with `Unknown action` is not served to it again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
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


class ActionError(UsageError):
    """A text that is no action of the grammar `form` or `form:argument`; the hint says what would be one."""


class UnknownForm(ActionError):
    """The form before the colon is none that any agent knows."""


class MissingArgument(ActionError):
    """The form needs an argument after the colon and has none."""


class UnexpectedArgument(ActionError):
    """The form takes no argument and has one."""


class MalformedAction(ActionError):
    """Not of the grammar at all: empty, blank at an end, a line break, upper case in the form."""


# What stands after the colon; None: nothing does.
ARGUMENT: Mapping[str, str | None] = {
    "escalate": None,
    "run_runbook": "a runbook id",
    "run_windows_runbook": "a runbook id",
    "run_linux_runbook": "a runbook id",
    "restart_service": "the name of a service",
    "alert": "what to alert of",
}


@functools.lru_cache(maxsize=4096)
def parse_action(action: str) -> Action:
    """Take an action apart by the grammar `form` or `form:argument`; an argument may hold colons and inner spaces.

    Raises:
        MalformedAction, UnknownForm, MissingArgument, UnexpectedArgument: which rule of the grammar it breaks; all of
            them are ActionError.
    """
    known = ", ".join(sorted(FIRST_VERSION))
    form, colon, argument = action.partition(":")
    if not action or action != action.strip() or len(action.splitlines()) != 1 or not action.isprintable():
        raise MalformedAction(
            f"{action!r} is no action: it is empty, has blanks at an end, or holds what cannot be printed.",
            hint=f"Write it as form:argument on one line, for example run_runbook:LIN-SSH-001. The forms are {known}.",
        )
    if form not in FIRST_VERSION:
        near = form.strip().lower().replace("-", "_")
        if near in FIRST_VERSION:
            raise MalformedAction(
                f"{action!r}: {form!r} is not how the form is spelled.",
                hint=f"Write {near}, in lower case, then a colon.",
            )
        raise UnknownForm(f"{action!r}: no agent knows the form {form!r}.", hint=f"The forms are {known}.")
    wants = ARGUMENT[form]
    if wants is None and colon:
        raise UnexpectedArgument(f"{action!r}: {form} takes no argument.", hint=f"Write {form} alone, without a colon.")
    if wants is not None and not argument:
        raise MissingArgument(
            f"{action!r}: {form} needs an argument after the colon.", hint=f"Write {form}: and then {wants}."
        )
    if argument != argument.strip():
        raise MalformedAction(
            f"{action!r}: there is a blank after the colon.", hint=f"Write {form}:{argument.strip()} without it."
        )
    return Action(form, argument if colon else None)


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


def served_action(
    runbook_id: str,
    platform: str,
    agent_version: str | None,
    capabilities: Any = None,
    refused: Collection[str] = (),
) -> Capability:
    """The form in which this agent gets a runbook: the platform's own, else the older `run_runbook:`.

    Args:
        runbook_id: the runbook.
        platform: windows, linux or macos.
        agent_version: as the agent sent it.
        capabilities: what the agent reports, None if nothing.
        refused: action forms that this very release of the agent answered with `Unknown action`. They are not served,
            whatever it claims.

    Returns:
        A capability whose action is the form to serve; not ok, with the reason against the platform's own
        form and against the older one, where the agent can run neither.
    """
    try:
        newest = _supports_in_fact(agent_version, action_for(runbook_id, platform), capabilities, refused)
        older = _supports_in_fact(agent_version, f"run_runbook:{runbook_id}", capabilities, refused)
    except UsageError as impossible:
        return Capability(False, impossible.message)
    if newest.ok:
        return newest
    if older.ok or older.reason == newest.reason:
        return older
    return Capability(False, f"{newest.reason}; {older.reason}")


def _supports_in_fact(
    agent_version: str | None, action: str, capabilities: Any, refused: Collection[str]
) -> Capability:
    claim = supports(agent_version, action, capabilities)
    form = parse_action(action).form
    if claim.ok and form in refused:
        return Capability(
            False,
            f"agent {agent_version or 'of unknown release'} answered `Unknown action: {form}` although "
            f"{'it reports the form' if capabilities is not None else 'its release has it'}; "
            "held back until the appliance runs another release",
        )
    return claim
