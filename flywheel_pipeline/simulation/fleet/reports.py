"""What agents write: the posts of simulated executions, good ones and malformed ones, and the words of failures.

Belongs here: the JSON of a post by what really happened. Does not belong here: when it happens, or how often (`stream`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

#: What may become of an attempt, in the words of the outcome classes; the simulator plants these.
OUTCOMES: Final = (
    "success",
    "failure",
    "unverified",
    "unreachable",
    "not_applicable",
    "escalated",
    "suppressed",
    "agent_unsupported",
    "synthetic",
)

# Errors that production saw for each outcome; {host}, {type}, {action} and {runbook} are filled in.
_ERRORS: Final[Mapping[str, tuple[tuple[str, str | None], ...]]] = {
    "failure": (
        ("Phase 'verify' failed: state is still non_compliant", "script_error"),
        ("WMI query failed: 0x80041010", "script_error"),
        ("remediation exited with code 1", "script_error"),
    ),
    "unreachable": (
        ("create shell: http response error: 401 - invalid content type", "auth_failure"),
        ("Execution timed out after 60s", "timeout"),
        (
            "get session: TLS pin check for {host}: dial tcp: lookup {host} on 10.0.0.1:53: no such host",
            "network_error",
        ),
    ),
    "not_applicable": (("This feature is not available on this edition of Windows", None),),
    "escalated": (("Drive not encrypted - manual intervention required", None),),
    "suppressed": (("Persistent flap suppression active for {type}", None),),
    "agent_unsupported": (("Unknown action: {action}", None),),
}
_NO_RUNBOOK: Final = "Runbook not found: {runbook}. Available: [RB-WIN-SEC-001 RB-WIN-SEC-002]"

# The first patch release 1.0.N with each action form, as observed in production; written down here a second time on
# purpose: planted truth must not come from the code that is to be judged by it.
_NEWEST_FORM: Final = {
    "windows": ("run_windows_runbook", 70),
    "linux": ("run_linux_runbook", 69),
    "macos": ("run_runbook", 44),
}
_OLDER_FORM: Final = ("run_runbook", 44)


def action_of(runbook_id: str, platform: str, agent_version: str) -> tuple[str, bool]:
    """Return what an agent of this release is told to do, and whether it knows that form."""
    form, since = _NEWEST_FORM[platform]
    release = int(agent_version.rsplit(".", 1)[1])
    if release < since and release >= _OLDER_FORM[1]:
        form, since = _OLDER_FORM
    return f"{form}:{runbook_id}", release >= since


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to heal, as it really went. Times are milliseconds of the agent's clock since the epoch."""

    execution_id: str
    incident_id: str
    site_id: str
    appliance_id: str
    hostname: str
    platform: str
    incident_type: str
    runbook: str
    level: str
    rule_id: str | None
    action: str | None
    agent_version: str
    started_ms: int
    duration_ms: int
    outcome: str
    reported_success: bool
    pick: float
    campaign: str | None = None
    tagged: bool = False


def stamp(ms: int) -> str:
    """Return a time in milliseconds since the epoch as ISO 8601 in UTC."""
    return (datetime.fromtimestamp(ms // 1000, UTC) + timedelta(milliseconds=ms % 1000)).isoformat(
        timespec="milliseconds"
    )


def post_of(attempt: Attempt, reported_ms: int) -> dict[str, Any]:
    """Return the post of an attempt in the agents' format, reported at `reported_ms`."""
    success = attempt.reported_success
    execution: dict[str, Any] = {
        "execution_id": attempt.execution_id,
        "incident_id": attempt.incident_id,
        "appliance_id": attempt.appliance_id,
        "runbook_id": attempt.rule_id or (f"L2-{attempt.action}" if attempt.action else attempt.runbook),
        "hostname": attempt.hostname,
        "platform": attempt.platform,
        "incident_type": attempt.incident_type,
        "agent_version": attempt.agent_version,
        "started_at": stamp(attempt.started_ms),
        "completed_at": stamp(attempt.started_ms + attempt.duration_ms),
        "duration_seconds": attempt.duration_ms / 1000,
        "success": success,
        "status": "success" if success else "failure",
        "resolution_level": attempt.level,
    }
    if attempt.rule_id is not None:
        execution["rule_id"] = attempt.rule_id
    if attempt.action is not None:
        execution["action"] = attempt.action
    if attempt.outcome in ("success", "failure", "synthetic"):
        execution["verification_passed"] = success and attempt.outcome != "failure"
    if not success:
        message, kind = _error(attempt)
        execution["error_message"] = message
        if kind is not None:
            execution["failure_type"] = kind
    if attempt.level == "L2":
        execution["confidence"] = round(0.7 + 0.29 * attempt.pick, 3)
    if attempt.campaign is not None:
        execution["chaos_campaign_id"] = attempt.campaign
    if attempt.tagged:
        execution["tags"] = {"synthetic": True}
    return {"site_id": attempt.site_id, "reported_at": stamp(reported_ms), "execution": execution}


def _error(attempt: Attempt) -> tuple[str, str | None]:
    if attempt.outcome == "failure" and attempt.runbook.upper().startswith("AUTO-"):
        return _NO_RUNBOOK.format(runbook=attempt.runbook), "not_found"
    known = _ERRORS.get(attempt.outcome, _ERRORS["failure"])
    message, kind = known[min(int(attempt.pick * len(known)), len(known) - 1)]
    return message.format(host=attempt.hostname, type=attempt.incident_type, action=attempt.action), kind


def encode(post: Mapping[str, Any]) -> bytes:
    """Return a post as one line of JSON, without its newline."""
    return json.dumps(post, ensure_ascii=False, separators=(",", ":")).encode()


# --------------------------------------------------------------------------------------------- malformed payloads


def _without(post: dict[str, Any], field: str) -> bytes:
    del post["execution"][field]
    return encode(post)


def _with(post: dict[str, Any], **fields: Any) -> bytes:
    post["execution"].update(fields)
    return encode(post)


def _shifted(post: dict[str, Any], field: str, **delta: float) -> bytes:
    at = datetime.fromisoformat(post["execution"][field]) + timedelta(**delta)
    return _with(post, **{field: at.isoformat()})


_MALFORMED: Final[tuple[tuple[str, Callable[[dict[str, Any]], bytes]], ...]] = (
    ("missing_field", lambda post: _without(post, "hostname")),
    ("wrong_type", lambda post: _with(post, success="true")),
    ("unknown_field", lambda post: _with(post, healed_by="magic")),
    ("invalid_json", lambda post: encode(post)[:-40]),
    ("contradiction", lambda post: _with(post, success=True, status="failure")),
    ("out_of_range", lambda post: _with(post, confidence=1.5)),
    # The agent's clock stood three days ahead when it acted, and was right again when it reported.
    ("future_event", lambda post: _shifted(post, "started_at", days=3)),
    ("too_old", lambda post: _with(post, started_at="1970-01-01T00:00:07+00:00", completed_at=None)),
    ("ends_before_start", lambda post: _shifted(post, "completed_at", hours=-1)),
    ("nul_character", lambda post: _with(post, error_message="\x00")),
    (
        "missing_execution_id",
        lambda post: _with(post, execution_id="   ", incident_id=post["execution"]["execution_id"]),
    ),
)
#: Reason codes that malformed payloads must be refused with, one per kind.
MALFORMED_CODES: Final = tuple(code for code, _ in _MALFORMED)


def malformed(attempt: Attempt, reported_ms: int, number: int) -> tuple[str, bytes]:
    """Return (the reason code it must be refused with, one malformed payload): kind `number` in turn.

    It carries an execution id of its own, so that nothing good is lost with it.
    """
    post = post_of(attempt, reported_ms)
    post["execution"]["execution_id"] += "-malformed"
    code, spoil = _MALFORMED[number % len(_MALFORMED)]
    return code, spoil(post)
