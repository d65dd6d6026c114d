"""The reference agent: an appliance that pulls its rules, heals simulated hosts, reports, acknowledges, and fails like a real one.

Belongs here: what an agent does between two looks at its clock, over HTTP as any agent would, and the hosts that drift
under it. Does not belong here: what the pipeline makes of it, and scenarios of whole fleets. Everything is drawn from a
seed and a simulated clock, so that a run can be repeated; only what the server answers comes from outside.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

from flywheel_pipeline.delivery.capability import FIRST_VERSION, action_for, parse_action, parse_version
from flywheel_pipeline.delivery.manifest import manifest_hash
from flywheel_pipeline.errors import FlywheelError, UsageError

TICK: Final = timedelta(minutes=15)
FIRST_RETRY: Final = timedelta(minutes=1)
LONGEST_RETRY: Final = timedelta(minutes=60)
BATCH_ROWS: Final = 200
#: Answers after which the same bytes are sent again; every other refusal is final.
RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Unreachable(FlywheelError):
    """No answer came: nobody listens, the connection broke, or the answer was lost on its way."""


class Transport(Protocol):
    """How an agent reaches the server."""

    def __call__(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """Send a request and return the answer.

        Raises:
            Unreachable: no answer came; whether the server did what was asked is not known.
        """


class HttpTransport:
    """Requests over one kept connection to a real server."""

    def __init__(self, url: str, *, timeout_seconds: float = 30.0) -> None:
        """Reach the server at `url`, such as `http://127.0.0.1:8000`.

        Raises:
            UsageError: it is no http or https URL.
        """
        if not re.fullmatch(r"https?://[^\s/]+(/.*)?", url):
            raise UsageError(f"{url!r} is no address of a server.", hint="It looks like http://127.0.0.1:8000.")
        import httpx  # 0.2 s: not at import

        self._unreachable = httpx.TransportError
        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=timeout_seconds)

    def __call__(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """Send a request; see `Transport`."""
        try:
            response = self._client.request(method, path, headers=dict(headers), content=body)
        except self._unreachable as error:
            raise Unreachable(f"No answer from {self._client.base_url}: {error or type(error).__name__}.") from error
        return Answer(response.status_code, response.headers, response.content)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class LossyTransport:
    """A transport that loses requests before they arrive, and answers on their way back (so the agent sends again)."""

    def __init__(self, inner: Transport, rng: random.Random, *, requests: float = 0.0, answers: float = 0.0) -> None:
        """Lose these shares (fractions) of the requests and of the answers."""
        self._inner = inner
        self._rng = rng
        self._requests = requests
        self._answers = answers
        self.lost: Counter[str] = Counter()

    def __call__(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """Send a request, perhaps in vain; see `Transport`."""
        if self._rng.random() < self._requests:
            self.lost["requests"] += 1
            raise Unreachable("The request was lost on its way.")
        answer = self._inner(method, path, headers=headers, body=body)
        if self._rng.random() < self._answers:
            self.lost["answers"] += 1
            raise Unreachable("The answer was lost on its way.")
        return answer


@dataclass(frozen=True)
class Drift:
    """A kind of drift that the hosts of an appliance show.

    Attributes:
        per_day: how often a host drifts so, on average.
        runbook_id: what the language model picks where no rule matches.
        platform: windows, linux or macos.
    """

    incident_type: str
    platform: str
    runbook_id: str
    per_day: float = 1.0


@dataclass(frozen=True)
class Profile:
    """Who an appliance is and what is true of it, known to nobody else.

    Attributes:
        agent_version: release; None where it does not say.
        knows: the action forms that it really runs; None: those that its release brought.
        reports_capabilities: whether its state report lists action forms; what it lists are `claims`, or what it knows.
        hosts: host names with their platform.
        success: true success rate of each runbook, a fraction; others succeed at `otherwise`.
        offline: spans in which nothing gets out.
    """

    appliance_id: str
    site_id: str
    agent_version: str | None = "1.0.74"
    knows: frozenset[str] | None = None
    reports_capabilities: bool = False
    claims: frozenset[str] | None = None
    hosts: tuple[tuple[str, str], ...] = (("ws01", "windows"), ("srv01", "windows"), ("lnx01", "linux"))
    drifts: tuple[Drift, ...] = (
        Drift("firewall", "windows", "RB-WIN-SEC-001"),
        Drift("bitlocker_status", "windows", "RB-WIN-SEC-005"),
        Drift("ssh_config", "linux", "LIN-SSH-001"),
    )
    success: Mapping[str, float] = field(default_factory=dict)
    otherwise: float = 0.95
    offline: tuple[tuple[datetime, datetime], ...] = ()

    @property
    def forms(self) -> frozenset[str]:
        """The action forms that it really runs."""
        if self.knows is not None:
            return self.knows
        version = parse_version(self.agent_version)
        return frozenset(form for form, first in FIRST_VERSION.items() if version is not None and version >= first)


def rule_matches(rule: Mapping[str, Any], incident: Mapping[str, Any]) -> bool:
    """Whether all conditions of a rule hold for an incident; a condition that cannot be read holds for none.

    `incident_type` and `check_type` are two names of one field.
    """
    conditions = rule.get("conditions")
    return isinstance(conditions, list) and bool(conditions) and all(_condition_holds(c, incident) for c in conditions)


def _condition_holds(condition: Mapping[str, Any], incident: Mapping[str, Any]) -> bool:
    name = condition.get("field")
    found = incident.get("incident_type" if name == "check_type" else str(name))
    value = condition.get("value")
    match condition.get("operator", "eq"):
        case "eq":
            return bool(found == value)
        case "ne":
            return bool(found != value)
        case "in":
            return isinstance(value, list) and found in value
        case "not_in":
            return isinstance(value, list) and found not in value
        case "contains":
            return isinstance(found, str) and isinstance(value, str) and value in found
        case "regex":
            return isinstance(found, str) and isinstance(value, str) and re.search(value, found) is not None
        case "exists":
            return (found is not None) == bool(value)
        case "gt" | "gte" | "lt" | "lte" as operator:
            if not isinstance(found, (int, float)) or not isinstance(value, (int, float)):
                return False
            return {"gt": found > value, "gte": found >= value, "lt": found < value, "lte": found <= value}[operator]
    return False


class Agent:
    """One appliance at work: call `step` with a clock that never goes back, and it does what was due until then."""

    def __init__(
        self,
        profile: Profile,
        token: str,
        transport: Transport,
        *,
        seed: int | str = 1,
        sync_every: timedelta = timedelta(minutes=30),
        resend_share: float = 0.0,
    ) -> None:
        """An agent that has never synced.

        Args:
            profile: who it is.
            token: its bearer token.
            transport: how it reaches the server.
            seed: what it draws chance from, together with its id.
            sync_every: how often it asks for rules and reports its state.
            resend_share: fraction of acknowledged batches that it sends once more, as a queue does that lost its place.
        """
        self.profile = profile
        self._token = token
        self._transport = transport
        self._rng = random.Random(f"{seed}/{profile.appliance_id}")  # noqa: S311 - simulated chance
        self._sync_every = sync_every
        self._resend_share = resend_share
        self.rules: list[dict[str, Any]] = []
        self.rule_set_hash: str | None = None
        self.counts: Counter[str] = Counter()
        self._etag: str | None = None
        self._queue: list[dict[str, Any]] = []
        self._answers: dict[str, str | None] = {}
        self._cooldown: dict[tuple[str, str], datetime] = {}
        self._number = 0
        self._last: datetime | None = None
        self._next_sync: datetime | None = None
        self._next_try: datetime | None = None
        self._failures = 0
        self._state_due = True

    @property
    def waiting(self) -> int:
        """Posts and answers to commands that the server does not have yet."""
        return len(self._queue) + len(self._answers)

    @property
    def executions(self) -> int:
        """Executions so far, reported or not."""
        return self._number

    def upgrade(self, agent_version: str, knows: frozenset[str] | None = None) -> None:
        """Run another release from now on; it says so with its next report."""
        from dataclasses import replace

        self.profile = replace(self.profile, agent_version=agent_version, knows=knows)
        self._state_due = True

    def step(self, clock: datetime) -> None:
        """Do what is due until `clock`: incidents since the last step, then the network if it is there."""
        if self._last is not None and clock > self._last:
            self._drift(self._last, clock)
        self._last = clock
        if self._is_offline(clock):
            self.counts["steps_offline"] += 1
            return
        if self._next_try is not None and clock < self._next_try:
            return
        try:
            if self._next_sync is None or clock >= self._next_sync:
                self._sync()
                self._next_sync = clock + self._sync_every
                self._state_due = True
            self._report(clock)
            self._acknowledge()
            if self._state_due:
                self._report_state()
        except (Unreachable, _TryAgain) as failed:
            self._failures += 1
            wait = min(FIRST_RETRY * 2 ** min(self._failures - 1, 10), LONGEST_RETRY)
            asked = failed.after if isinstance(failed, _TryAgain) else timedelta(0)
            self._next_try = clock + max(wait * self._rng.uniform(0.8, 1.2), asked)
            self.counts["tries_in_vain"] += 1
        else:
            self._failures = 0
            self._next_try = None

    def _is_offline(self, clock: datetime) -> bool:
        return any(start <= clock < end for start, end in self.profile.offline)

    # Healing ---------------------------------------------------------------------------------------

    def _drift(self, since: datetime, until: datetime) -> None:
        days = (until - since) / timedelta(days=1)
        moments: list[tuple[datetime, str, Drift]] = []
        for host, platform in self.profile.hosts:
            for drift in self.profile.drifts:
                if drift.platform == platform and self._rng.random() < drift.per_day * days:
                    moments.append((since + (until - since) * self._rng.random(), host, drift))
        for at, host, drift in sorted(moments, key=lambda m: (m[0], m[1], m[2].incident_type)):
            self._heal(at, host, drift)

    def _heal(self, at: datetime, host: str, drift: Drift) -> None:
        incident = {"incident_type": drift.incident_type, "platform": drift.platform, "hostname": host}
        rule = next((r for r in self.rules if rule_matches(r, incident)), None)
        if rule is None:
            self.counts["L2"] += 1
            action = action_for(drift.runbook_id, drift.platform)
            self._queue_post(at, host, drift, f"L2-{action}", None, None, "L2", *self._run(drift.runbook_id))
            return
        ready = self._cooldown.get((rule["id"], host))
        if ready is not None and at < ready:
            self.counts["in_cooldown"] += 1
            return
        self._cooldown[rule["id"], host] = at + timedelta(seconds=int(rule.get("cooldown_seconds", 0)))
        self.counts["L1"] += 1
        for action in rule["actions"]:
            form = parse_action(action).form
            if form not in self.profile.forms:
                self.counts["unknown_action"] += 1
                outcome: tuple[bool, str | None] = (False, f"Unknown action: {action}")
            else:
                outcome = self._run(parse_action(action).argument or "")
            self._queue_post(at, host, drift, rule["id"], rule["id"], action, "L1", *outcome)

    def _run(self, runbook_id: str) -> tuple[bool, str | None]:
        good = self._rng.random() < self.profile.success.get(runbook_id, self.profile.otherwise)
        return good, None if good else "Phase 'verify' failed: the setting did not hold"

    def _queue_post(
        self,
        at: datetime,
        host: str,
        drift: Drift,
        runbook_id: str,
        rule_id: str | None,
        action: str | None,
        level: str,
        good: bool,
        error: str | None,
    ) -> None:
        self._number += 1
        identity = f"{self.profile.appliance_id}/{self._number}/{at.isoformat()}"
        done = at + timedelta(seconds=round(self._rng.uniform(2, 40), 1))
        execution = {
            "execution_id": f"exec-{hashlib.sha256(identity.encode()).hexdigest()[:24]}",
            "incident_id": f"inc-{hashlib.sha256(f'{identity}/incident'.encode()).hexdigest()[:16]}",
            "appliance_id": self.profile.appliance_id,
            "runbook_id": runbook_id,
            "rule_id": rule_id,
            "action": action,
            "hostname": host,
            "platform": drift.platform,
            "incident_type": drift.incident_type,
            "agent_version": self.profile.agent_version,
            "started_at": at.isoformat(),
            "completed_at": done.isoformat(),
            "duration_seconds": (done - at).total_seconds(),
            "success": good,
            "status": "success" if good else "failure",
            "verification_passed": good if error is None or "verify" in error else None,
            "resolution_level": level,
            "error_message": error,
        }
        self._queue.append({name: value for name, value in execution.items() if value is not None})

    # The network -----------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, *, body: Any = None, tag: str | None = None) -> Answer:
        headers = {"Authorization": f"Bearer {self._token}"}
        if tag is not None:
            headers["If-None-Match"] = tag
        if body is not None:
            headers["Content-Type"] = "application/json"
        answer = self._transport(
            method,
            path,
            headers=headers,
            body=None if body is None else json.dumps(body, separators=(",", ":")).encode(),
        )
        if answer.status in RETRIED:
            raise _TryAgain(answer)
        return answer

    def _sync(self) -> None:
        query = f"site_id={_quoted(self.profile.site_id)}&appliance_id={_quoted(self.profile.appliance_id)}"
        answer = self._ask("GET", f"/agent/sync?{query}", tag=self._etag)
        if answer.status == 304:
            self.counts["not_modified"] += 1
            return
        _require(answer, 200, "fetch its rules")
        told = answer.json
        rules = told["rules"]
        if manifest_hash(rules) != told["manifest_hash"]:
            raise FlywheelError(
                f"{self.profile.appliance_id} was handed rules that do not have the hash beside them.",
                hint="The agent keeps the rules that it has; look at the manifest of the appliance.",
            )
        dropped = {rule["id"] for rule in self.rules} - {rule["id"] for rule in rules}
        must_drop = {(stone["rule_id"], stone["version"]) for stone in told["tombstones"]}
        if must_drop & {(rule["id"], rule["version"]) for rule in rules}:
            raise FlywheelError(f"{self.profile.appliance_id} was told to drop a rule and to run it.")
        self.rules = rules
        self.rule_set_hash = told["manifest_hash"]
        self.counts["manifests"] += 1
        self.counts["rules_dropped"] += len(dropped)
        for command in told["commands"]:
            self._take(command)
        # Only now: an answer that could not be used is asked for again.
        self._etag = answer.headers.get("etag")

    def _take(self, command: Mapping[str, Any]) -> None:
        """Carry out a command: its rule stands in the manifest that came with it, or does not any more.

        A command that the manifest contradicts was overtaken by it; it is left to the server to supersede.
        """
        params, kind = command["params"], command["command_type"]
        has = any((r["id"], r["version"]) == (params.get("rule_id"), params.get("rule_version")) for r in self.rules)
        if kind not in ("sync_promoted_rule", "withdraw_rule"):
            self._answers[str(command["id"])] = f"Unknown command: {kind}"
        elif has == (kind == "sync_promoted_rule"):
            self._answers[str(command["id"])] = None
        else:
            self.counts["commands_overtaken"] += 1
            return
        self.counts[f"command_{command['command_type']}"] += 1

    def _report(self, clock: datetime) -> None:
        while self._queue:
            rows = self._queue[:BATCH_ROWS]
            posts = [
                {"site_id": self.profile.site_id, "reported_at": clock.isoformat(), "execution": row} for row in rows
            ]
            told = self._posted(posts)
            self.counts["sent"] += len(rows)
            for outcome in ("inserted", "corrected", "unchanged", "rejected"):
                self.counts[f"row_{outcome}"] += told[outcome]
            if self._rng.random() < self._resend_share:
                self.counts["resent"] += len(rows)
                self._posted(posts)
            del self._queue[: len(rows)]

    def _posted(self, posts: list[dict[str, Any]]) -> Any:
        answer = self._ask("POST", "/api/agent/executions", body=posts)
        # A batch of which every row was refused is done with as well: each stands among the rejects, with its reason.
        if answer.status != 422 or "results" not in answer.json:
            _require(answer, 200, "report its executions")
        return answer.json

    def _acknowledge(self) -> None:
        for command_id, failure in list(self._answers.items()):
            body = {} if failure is None else {"failure": failure}
            answer = self._ask("POST", f"/api/agent/commands/{command_id}/ack", body=body)
            _require(answer, 200, "acknowledge a command")
            self.counts["acknowledged" if failure is None else "refused"] += 1
            del self._answers[command_id]

    def _report_state(self) -> None:
        listed = sorted(self.profile.claims if self.profile.claims is not None else self.profile.forms)
        state = {
            "agent_version": self.profile.agent_version or "unknown",
            "capabilities": listed if self.profile.reports_capabilities else None,
            "manifest_hash": self.rule_set_hash,
            "site_id": self.profile.site_id,
            "appliance_id": self.profile.appliance_id,
        }
        _require(self._ask("POST", "/api/agent/state", body=state), 200, "report its state")
        self._state_due = False
        self.counts["states"] += 1


class _TryAgain(FlywheelError):
    """The server asked for patience; `after` is how much."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"The server answered {answer.status}.")
        seconds = answer.headers.get("retry-after", "0")
        self.after = timedelta(seconds=int(seconds) if seconds.isdecimal() else 0)


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _require(answer: Answer, status: int, what: str) -> None:
    if answer.status == status:
        return
    said = answer.body[:500].decode("utf-8", "replace")
    raise FlywheelError(
        f"The appliance could not {what}: the server answered {answer.status}: {said}",
        hint="401: the token does not hold, 403: it is for another site or appliance, 404: no agent API listens there.",
    )


def run_agents(
    agents: Sequence[Agent],
    start: datetime,
    end: datetime,
    *,
    tick: timedelta = TICK,
    between: Iterable[Any] | None = None,
) -> Counter[str]:
    """Let agents work through simulated time, tick by tick, in their order.

    Args:
        agents: who works; each a little later within the tick, so that they do not call at one moment.
        start: first moment.
        end: last moment; every agent steps on it.
        tick: simulated time between two steps.
        between: advanced once after each tick; for what happens beside, such as a pipeline's run.

    Returns:
        What all of them did, added up.

    Raises:
        UsageError: an end before the start, or no tick.
    """
    if end < start or tick <= timedelta(0):
        raise UsageError("Simulated time needs an end behind its start and a tick.", hint="--hours is above 0.")
    events = iter(between or ())
    clock = start
    while True:
        for agent in agents:
            agent.step(clock)
        next(events, None)
        if clock >= end:
            break
        clock = min(clock + tick, end)
    total: Counter[str] = Counter()
    for agent in agents:
        total.update(agent.counts)
        total["waiting"] += agent.waiting
    return total


def one_day_until_now(hours: float) -> tuple[datetime, datetime]:
    """The span of simulated time that ends now: what an agent reports must not lie in the future."""
    end = datetime.now(UTC).replace(microsecond=0)
    return end - timedelta(hours=hours), end
