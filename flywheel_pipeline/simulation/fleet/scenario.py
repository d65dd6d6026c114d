"""Scenarios: what a simulated fleet is and does, as strict YAML.

Belongs here: the declaration, reading it, and the library of scenarios that the package carries. Does not belong here:
drawing anything by chance (`stream`). Rates and shares are fractions, durations say their unit, days count from 0.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flywheel_pipeline.candidates.keys import pattern_key
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.promotion.policy import canonical, policy_names

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Platform = Literal["windows", "linux", "macos"]
#: Prefix of every site id that the simulator makes up; by it a database of simulated fleets is known as one.
SITE_PREFIX = "sim-"

#: What becomes of a pattern: `fleet` serves the whole fleet at the end, `served` at least one site, `never` not one
#: site at any time, `any` is not judged.
PatternExpectation = Literal["fleet", "served", "never", "any"]
RuleExpectation = Literal["kept", "quarantined", "any"]


class _Strict(BaseModel):
    # Strict: "5" is no number and 1 is no yes. Where YAML has lists, fields say so themselves.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Agents(_Strict):
    """A share of the appliances and the release that they run on day 0."""

    version: Name = "1.0.74"
    share: Share = 1.0


class Upgrade(_Strict):
    """From a day on, the appliances that run less than `version`, up to a share of all, run `version`."""

    day: Annotated[float, Field(ge=0)]
    version: Name
    share: Share = 1.0


class Rename(_Strict):
    """A site reports under another id from `day` on; the alias is known to the pipeline from `alias_day` on."""

    site: Annotated[int, Field(ge=1)]
    day: Annotated[int, Field(ge=0)]
    alias_day: Annotated[int, Field(ge=0)]
    to: Name


class FleetSize(_Strict):
    """Sites, hosts and appliances, and what is wrong with some of them.

    Attributes:
        sites: how many.
        site_ids: their names; none: `sim-001` and so on.
        windows, linux, macos: hosts of each platform at each site.
        appliances_per_site: hosts are dealt among them.
        agents: releases on day 0, by share of the appliances.
        dead_hosts: share of hosts that nobody reaches; an attempt on one is repeated every `dead_retry_hours`.
        flapping_hosts: share of hosts on which every fix is reverted after `flap_hours`.
        flap_suppression_after: after so many reverted fixes in a row the agent does not act for a day; none: cleared.
        clock_ahead_share, clock_ahead_minutes: appliances whose clock runs ahead, within the contract's tolerance.
    """

    sites: Annotated[int, Field(ge=1, le=100_000)]
    site_ids: tuple[Name, ...] | None = Field(default=None, strict=False)
    windows: Annotated[int, Field(ge=0, le=999)] = 0
    linux: Annotated[int, Field(ge=0, le=999)] = 0
    macos: Annotated[int, Field(ge=0, le=999)] = 0
    appliances_per_site: Annotated[int, Field(ge=1, le=99)] = 1
    agents: tuple[Agents, ...] = Field(default=(Agents(),), strict=False, min_length=1)
    upgrades: tuple[Upgrade, ...] = Field(default=(), strict=False)
    renames: tuple[Rename, ...] = Field(default=(), strict=False)
    dead_hosts: Share = 0.0
    dead_retry_hours: Annotated[float, Field(ge=0.5)] = 6.0
    flapping_hosts: Share = 0.0
    flap_hours: Annotated[float, Field(ge=0.5, le=20)] = 4.0
    flap_suppression_after: Annotated[int, Field(ge=1)] | None = None
    clock_ahead_share: Share = 0.0
    clock_ahead_minutes: Annotated[float, Field(ge=0, le=9)] = 5.0

    @model_validator(mode="after")
    def _consistent(self) -> FleetSize:
        if self.windows + self.linux + self.macos == 0:
            raise ValueError("a site needs hosts: windows, linux or macos")
        if self.site_ids is not None and len(set(self.site_ids)) != self.sites:
            raise ValueError(f"site_ids needs {self.sites} different names")
        if abs(sum(a.share for a in self.agents) - 1.0) > 1e-9:
            raise ValueError("the shares of agents add up to 1")
        if any(r.site > self.sites or r.alias_day < r.day for r in self.renames):
            raise ValueError("a rename names one of the sites, and its alias comes on its day or later")
        if any(not r.to.startswith(SITE_PREFIX) for r in self.renames):
            raise ValueError(f"a renamed site is called {SITE_PREFIX}…")
        return self


class Change(_Strict):
    """From a day on the runbook succeeds at another rate, at a share of the sites (the first ones)."""

    day: Annotated[float, Field(ge=0)]
    success_rate: Share
    sites_share: Share = 1.0


class Exclusions(_Strict):
    """Shares of the attempts that say nothing about the runbook."""

    unreachable: Share = 0.0
    not_applicable: Share = 0.0
    escalated: Share = 0.0
    suppressed: Share = 0.0

    @property
    def total(self) -> float:
        """The share of all of them."""
        return self.unreachable + self.not_applicable + self.escalated + self.suppressed


class Otherwise(_Strict):
    """The incidents for which L2 chooses another runbook, under a condition that no telemetry shows.

    Attributes:
        runbook: the other one.
        share: share of the incidents of the type.
        success_rate: of the other runbook on them.
        forced_success_rate: of the drift's first runbook on them, as a rule would run it.
    """

    runbook: Name
    share: Share
    success_rate: Share = 0.95
    forced_success_rate: Share = 0.1


class LateFlip(_Strict):
    """A share of the failures is first reported as a verified success and corrected hours later."""

    share: Share
    hours: Annotated[float, Field(gt=0)]


class Synthetic(_Strict):
    """Chaos or test rows of the same pattern, a rate per host and day, marked by campaign id or by tag."""

    per_host_day: Annotated[float, Field(gt=0)]
    success_rate: Share = 1.0
    mark: Literal["campaign", "tag"] = "campaign"


class StandingRule(_Strict):
    """An L1 rule that stands before day 0 and handles the drift while it is served.

    Attributes:
        rule_id: its id.
        runbook: what it runs; none: the drift's runbook.
        success_rate: its true rate, with the rate of the drift as default.
        registered: false: agents run it and the registry does not know it.
        enabled: false: taken over as quarantined.
        changes: from a day on it succeeds at another rate.
        expect: `kept` in service, or `quarantined`, at the end.
    """

    rule_id: Name
    runbook: Name | None = None
    success_rate: Share | None = None
    registered: bool = True
    enabled: bool = True
    changes: tuple[Change, ...] = Field(default=(), strict=False)
    expect: RuleExpectation = "any"


class Drift(_Strict):
    """Incidents of one type on one platform, and how they are healed.

    Attributes:
        per_host_day: new drifts per day on a host that has been compliant for a day.
        success_rate: true rate at which the runbook heals an incident it can heal, as the last report says.
        recurrence_rate: share of the successes after which the drift comes back within 24 hours.
        unverified_rate: share of the successes that come without a verification.
        silent_failure_rate: share of the failures reported as success although the verification said no.
        failing_sites_share, failing_sites_rate: sites (the first ones) at which it succeeds at another rate.
        imported_successes: the old system's success-only count of this pattern, imported with it.
        expect: what must become of the pattern.
    """

    incident_type: Name
    platform: Platform = "windows"
    runbook: Name
    per_host_day: Annotated[float, Field(ge=0, le=24)]
    success_rate: Share
    recurrence_rate: Share = 0.0
    unverified_rate: Share = 0.0
    silent_failure_rate: Share = 0.0
    failing_sites_share: Share = 0.0
    failing_sites_rate: Share = 0.0
    exclusions: Exclusions = Exclusions()
    changes: tuple[Change, ...] = Field(default=(), strict=False)
    otherwise: Otherwise | None = None
    late_flip: LateFlip | None = None
    synthetic: Synthetic | None = None
    rule: StandingRule | None = None
    imported_successes: Annotated[int, Field(ge=1)] | None = None
    expect: PatternExpectation = "any"

    @model_validator(mode="after")
    def _consistent(self) -> Drift:
        if self.exclusions.total > 1:
            raise ValueError("exclusions are shares of all attempts: at most 1 together")
        if self.per_host_day == 0 and self.synthetic is None:
            raise ValueError("per_host_day is 0 and there are no synthetic rows: nothing would happen")
        return self

    @property
    def key(self) -> str:
        """The key of the pattern: incident type, runbook, platform."""
        return pattern_key(self.incident_type, self.runbook, self.platform)


class Outage(_Strict):
    """A share of the appliances, drawn by lot, has no network for some hours and delivers its queue afterwards."""

    day: Annotated[int, Field(ge=0)]
    hour: Annotated[float, Field(ge=0, lt=24)] = 0.0
    hours: Annotated[float, Field(gt=0, le=72)]
    share: Share = 1.0


class ReplayedDay(_Strict):
    """All that was delivered on one day is delivered again on a later one."""

    day: Annotated[int, Field(ge=0)]
    again: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _later(self) -> ReplayedDay:
        if self.again <= self.day:
            raise ValueError("a day is replayed on a later one: again > day")
        return self


class Transport(_Strict):
    """What happens to posts between agent and intake.

    Attributes:
        duplicates: share of the posts that arrive twice.
        late, late_hours: share that waits in an offline queue, up to so many hours; so posts arrive out of order.
        bad_payloads: share of the posts beside which a malformed one arrives, of every kind in turn.
    """

    duplicates: Share = 0.0
    late: Share = 0.0
    late_hours: Annotated[float, Field(gt=0, le=72)] = 1.0
    bad_payloads: Share = 0.0
    outages: tuple[Outage, ...] = Field(default=(), strict=False)
    replays: tuple[ReplayedDay, ...] = Field(default=(), strict=False)


class Act(_Strict):
    """What somebody does to the system at the beginning of a day, before its pass.

    `blanket_reenable` is the UPDATE of a migration that once set enabled = true on all rules. `approve` approves the
    patterns of an incident type by name, `quarantine` a rule.
    """

    day: Annotated[int, Field(ge=0)]
    act: Literal["blanket_reenable", "approve", "quarantine"]
    incident_type: Name | None = None
    rule_id: Name | None = None

    @model_validator(mode="after")
    def _subject(self) -> Act:
        wanted = {"blanket_reenable": (False, False), "approve": (True, False), "quarantine": (False, True)}[self.act]
        if (self.incident_type is not None, self.rule_id is not None) != wanted:
            raise ValueError("approve names an incident_type, quarantine a rule_id, blanket_reenable neither")
        return self


class Scenario(_Strict):
    """A whole scenario.

    Attributes:
        name: its name; a file's and the library's.
        title, plants: one line each, for people: what it is, and what it plants.
        start: the UTC day on which it begins.
        days: how many days the fleet drifts.
        settle_days: further days through which the pipeline is stepped without new drifts.
        policy: the promotion policy in force.
        campaign: chaos campaign id on every row; such rows count nowhere.
    """

    name: Name
    title: Name
    plants: Annotated[str, Field(min_length=1)]
    start: Annotated[dt.date, Field(strict=False)] = dt.date(2026, 1, 5)
    days: Annotated[int, Field(ge=1, le=3660)]
    settle_days: Annotated[int, Field(ge=1, le=60)] = 1
    policy: Name = "standard"
    campaign: Name | None = None
    fleet: FleetSize
    drifts: tuple[Drift, ...] = Field(strict=False, min_length=1)
    transport: Transport = Transport()
    acts: tuple[Act, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if self.policy not in policy_names():
            raise ValueError(f"there is no policy {self.policy}; there are {', '.join(policy_names())}")
        seen: set[tuple[str, str]] = set()
        for drift in self.drifts:
            if (drift.incident_type, drift.platform) in seen:
                raise ValueError(f"{drift.incident_type} on {drift.platform} drifts twice: say it in one entry")
            seen.add((drift.incident_type, drift.platform))
            if getattr(self.fleet, drift.platform) == 0:
                raise ValueError(f"{drift.incident_type} drifts on {drift.platform}, and the fleet has no such host")
        if self.campaign is not None and self.transport.bad_payloads:
            raise ValueError("a campaign sends no bad_payloads: they would stand among the production's rejects")
        return self

    @cached_property
    def begins(self) -> dt.datetime:
        """Midnight UTC of the first day."""
        return dt.datetime.combine(self.start, dt.time(), dt.UTC)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the scenario as canonical JSON: any changed value is another scenario."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode()).hexdigest()

    @property
    def hosts(self) -> int:
        """Hosts of the fleet."""
        return self.fleet.sites * (self.fleet.windows + self.fleet.linux + self.fleet.macos)


# ------------------------------------------------------------------------------------------------------- reading


def scenario_names() -> list[str]:
    """Return the names of the scenarios that the package carries."""
    folder = files("flywheel_pipeline.simulation") / "scenarios"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_scenario(name_or_file: str) -> Scenario:
    """Read a scenario of the library by name, or one from a YAML file.

    Raises:
        UsageError: there is none, or it holds an unknown key or a value out of range; the message names the line.
    """
    if name_or_file in scenario_names():
        entry = files("flywheel_pipeline.simulation") / "scenarios" / f"{name_or_file}.yaml"
        return parse_scenario(entry.read_text("utf-8"), f"{name_or_file}.yaml")
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(
            f"There is no scenario {name_or_file}.",
            hint="`flywheel simulate scenarios` lists them; or name a YAML file.",
        )
    try:
        return parse_scenario(path.read_text("utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name} is not UTF-8.") from error


def parse_scenario(text: str, name: str) -> Scenario:
    """Parse a scenario from YAML text and hold it against the declaration.

    Args:
        text: the YAML.
        name: how messages name it.

    Raises:
        UsageError: not YAML, a key that stands twice, an unknown or missing one, a value out of range; with its line.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(root, name)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from error
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        shown = "; ".join(_problem(root, problem, name) for problem in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(
            f"{shown}{more}.", hint="`flywheel simulate scenarios --keys` lists what a scenario may say."
        ) from error


def _problem(root: yaml.Node | None, problem: Any, name: str) -> str:
    words = {"extra_forbidden": "unknown key", "missing": "is missing"}.get(problem["type"], problem["msg"])
    where = ".".join(str(part) for part in problem["loc"]) or "the scenario"
    said = f"{words} {where}" if problem["type"] == "extra_forbidden" else f"{where}: {words}"
    return f"{name}, line {_line_of(root, problem['loc'])}: {said}"


def _line_of(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """Return the line on which the value at `loc` stands, or the deepest part of the way there; from 1."""
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _refuse_repeated_keys(node: yaml.Node | None, name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UsageError(f"{name}, line {key.start_mark.line + 1}: the key {key.value} stands twice.")
            seen.add(key.value)
            _refuse_repeated_keys(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, name)


def keys_of_scenarios() -> list[tuple[str, str]]:
    """Return (part, keys) for every part of a scenario, for the command line."""
    parts = (
        Scenario, FleetSize, Agents, Upgrade, Rename, Drift, Exclusions, Otherwise, LateFlip, Synthetic, Change,
        StandingRule, Transport, Outage, ReplayedDay, Act,
    )  # fmt: skip
    return [
        (
            part.__name__,
            ", ".join(f"{key}{'' if field.is_required() else '?'}" for key, field in part.model_fields.items()),
        )
        for part in parts
    ]
