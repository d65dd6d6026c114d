"""Promotion policies: versioned YAML, validated strictly, hashed; the hash stands on every decision.

Belongs here: what a policy may say and reading it. Does not belong here: applying it (`gates.py`). An unknown key is
an error: a threshold that nobody reads is how the old system got its stricter BitLocker limits ignored.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flywheel_pipeline.errors import PolicyError

Fraction = Field(gt=0.0, lt=1.0)


class _Strict(BaseModel):
    # Strict: "5" is no number and 1 is no yes. Where YAML and JSON have lists, fields say so themselves.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Threshold(_Strict):
    """The legacy gate: bare counts against a fixed line."""

    min_occurrences: int = Field(ge=1)
    min_success_rate: float = Fraction


class StageGate(_Strict):
    """The sequential test of one stage. `floor` and `alpha` are fractions."""

    floor: float = Fraction
    alpha: float = Fraction


class Evidence(_Strict):
    """Which episodes count: the first so many of a host and of a site, by event time."""

    episodes_per_host: int = Field(default=3, ge=1)
    episodes_per_site: int = Field(default=10, ge=1)


class Admission(_Strict):
    """What a candidate must show before any statistic. Shares are fractions."""

    max_excluded_share: float = Field(default=0.20, ge=0.0, le=1.0)
    min_selection_share: float = Field(default=0.90, ge=0.0, le=1.0)
    min_capable_share: float = Field(default=0.95, ge=0.0, le=1.0)
    min_matched_incidents: int = Field(default=1, ge=1)
    healthy_rule_rate: float = Field(default=0.80, ge=0.0, le=1.0)


class Quorum(_Strict):
    """How widely the evidence must be spread, from the ring on."""

    min_sites: int = Field(default=5, ge=1)
    min_episodes_per_site: int = Field(default=3, ge=1)
    min_hosts: int = Field(default=10, ge=1)
    leave_one_site_out: bool = True


class Shadow(_Strict):
    """How long would-fires are recorded: so many, or so many days."""

    min_would_fires: int = Field(default=50, ge=0)
    min_days: float = Field(default=14, ge=0)


class Expiry(_Strict):
    """When the inconclusive is parked: after so many days, or so many rated episodes."""

    days: float = Field(default=60, gt=0)
    episodes: int = Field(default=1000, ge=1)


class Limits(_Strict):
    """How much one run may promote."""

    promotions_per_run: int = Field(default=5, ge=1)


class Approval(_Strict):
    """Whose name a promotion needs."""

    required_always: bool = False
    required_for_disruptive: bool = True
    min_active_sites_without: int = Field(default=10, ge=0)
    high_risk_categories: tuple[str, ...] = Field(
        default=("disk", "reboot", "credentials", "network", "network_security"), strict=False
    )


class Cusum(_Strict):
    """The CUSUM of a rule in service, by scope (`health/cusum.py`).

    `good` and `bad` are the rates it tells apart. W at `warn_at` warns, at `quarantine_at` alarms; below `calm` the
    rest of the fleet counts as healthy, once it has `rest_episodes`. The whole rule goes where at least `min_sites`
    sites and `site_share` (a fraction) of those that ran it are quarantined. `checkpoint_days`: how far behind the
    present a checkpoint lies.
    """

    good: float = Field(default=0.85, gt=0.0, lt=1.0)
    bad: float = Field(default=0.60, gt=0.0, lt=1.0)
    warn_at: float = Field(default=3.0, gt=0.0)
    quarantine_at: float = Field(default=6.0, gt=0.0)
    calm: float = Field(default=1.0, gt=0.0)
    rest_episodes: int = Field(default=5, ge=1)
    min_sites: int = Field(default=3, ge=1)
    site_share: float = Field(default=0.25, gt=0.0, le=1.0)
    checkpoint_days: int = Field(default=3, ge=2)

    @model_validator(mode="after")
    def _in_order(self) -> Cusum:
        if not self.bad < self.good:
            raise ValueError("the bad rate lies below the good one")
        if not self.calm <= self.warn_at <= self.quarantine_at:
            raise ValueError("calm, warn_at and quarantine_at stand in this order")
        return self


class Demotion(_Strict):
    """When a rule in service fails. `floor` and `alpha`: the reject e-value on its episodes; `cusum`: when it got worse."""

    failing_rule: Literal["warn", "quarantine"] = "quarantine"
    floor: float = Fraction
    alpha: float = Fraction
    warn_below: float = Field(default=0.5, ge=0.0, le=1.0)
    min_matches: int = Field(default=20, ge=1)
    spare_builtin: bool = True
    cusum: Cusum = Cusum()


class Rollout(_Strict):
    """The steps of canary and ring, and what a rule must show of its own before each.

    A step lasts at least its days: at one site, at a tenth of the sites, at a quarter, at half. `widen_episodes` rated
    episodes of the rule itself are needed for the second step of a stage, `own_episodes` for the next stage; in both
    the e-value of its own episodes must be `own_e_value` or more. Where it runs at fewer than `own_sites` sites, L2's
    episodes at the others, from before the canary, stand beside its own.
    """

    one_site_days: float = Field(default=1.0, ge=0.0)
    tenth_days: float = Field(default=2.0, ge=0.0)
    quarter_days: float = Field(default=2.0, ge=0.0)
    half_days: float = Field(default=3.0, ge=0.0)
    widen_episodes: int = Field(default=3, ge=1)
    own_episodes: int = Field(default=10, ge=1)
    own_e_value: float = Field(default=1.0, gt=0.0)
    own_sites: int = Field(default=20, ge=1)

    def soak_days(self, stage: str, step: int) -> float:
        """Return how long a rule stays at this step at least, in days."""
        return {
            ("canary", 1): self.one_site_days,
            ("canary", 2): self.tenth_days,
            ("ring", 1): self.quarter_days,
            ("ring", 2): self.half_days,
        }[stage, step]


class Override(_Strict):
    """Stricter stage gates for incident types that match a shell pattern, e.g. `bitlocker*`."""

    incident_type: str = Field(min_length=1)
    stages: dict[Literal["canary", "ring", "fleet"], StageGate] = Field(min_length=1)


class Policy(_Strict):
    """One promotion policy. `threshold` policies look at bare counts, `sequential` ones at the e-value by stage."""

    name: str = Field(min_length=1)
    version: int = Field(ge=1)
    description: str = Field(min_length=1)
    kind: Literal["threshold", "sequential"]
    threshold: Threshold | None = None
    stages: dict[Literal["canary", "ring", "fleet"], StageGate] = Field(default_factory=dict)
    high_risk: StageGate | None = None
    evidence: Evidence = Evidence()
    admission: Admission = Admission()
    quorum: Quorum = Quorum()
    shadow: Shadow = Shadow()
    expiry: Expiry = Expiry()
    limits: Limits = Limits()
    approval: Approval = Approval()
    demotion: Demotion
    rollout: Rollout | None = None
    overrides: tuple[Override, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _complete(self) -> Policy:
        if self.kind == "threshold" and self.threshold is None:
            raise ValueError("a threshold policy needs `threshold`")
        if self.kind == "sequential" and set(self.stages) != {"canary", "ring", "fleet"}:
            raise ValueError("a sequential policy needs the stages canary, ring and fleet")
        if self.kind == "sequential" and self.threshold is not None:
            raise ValueError("a sequential policy reads no `threshold`")
        if self.kind == "threshold":
            unread = sorted(_SEQUENTIAL_ONLY & self.model_fields_set & _differing(self))
            if unread:
                raise ValueError(f"a threshold policy does not read {', '.join(unread)}")
            return self
        # The strictest of stage, override and class counts, so a looser one would be a value that nobody reads.
        stricter = [
            (f"override {o.incident_type}", name, gate) for o in self.overrides for name, gate in o.stages.items()
        ]
        if self.high_risk is not None:
            stricter += [("high_risk", name, self.high_risk) for name in self.stages]
        for what, name, gate in stricter:
            stage = self.stages[name]
            if gate.floor < stage.floor or gate.alpha > stage.alpha:
                raise ValueError(f"{what} is looser than the stage {name}; it can only be stricter")
        return self

    @cached_property
    def policy_hash(self) -> str:
        """sha256 of the policy as canonical JSON: any changed value is another policy."""
        return document_hash(self.model_dump(mode="json"))

    def stage_gate(self, stage: str, incident_type: str, *, high_risk: bool = False) -> StageGate:
        """Return floor and alpha for entering `stage`: of the stage, its override, and the high-risk class the strictest.

        Raises:
            PolicyError: the policy has no such stage.
        """
        gates = [gate for name, gate in self.stages.items() if name == stage]
        if not gates:
            raise PolicyError(f"Policy {self.name} has no stage {stage}.")
        for override in self.overrides:
            if fnmatch.fnmatchcase(incident_type.lower(), override.incident_type.lower()):
                gates += [gate for name, gate in override.stages.items() if name == stage]
        if high_risk and self.high_risk is not None:
            gates.append(self.high_risk)
        return StageGate(floor=max(g.floor for g in gates), alpha=min(g.alpha for g in gates))

    def success_floor(self, incident_type: str, stage: str, *, widening: bool = False) -> tuple[float, int]:
        """Return (floor, least executions) that a step out of `stage`, or within it, must show in a recount from the log."""
        if self.threshold is not None:
            return self.threshold.min_success_rate, self.threshold.min_occurrences
        entering = stage if widening else {"shadow": "canary", "canary": "ring", "ring": "fleet"}.get(stage)
        if entering is None:
            return 0.0, 0
        return self.stage_gate(entering, incident_type).floor, 1


_SEQUENTIAL_ONLY = frozenset(
    {"stages", "high_risk", "evidence", "admission", "quorum", "shadow", "expiry", "approval", "rollout", "overrides"}
)


def _differing(policy: Policy) -> set[str]:
    """Return the fields that differ from their defaults: a certificate carries a policy with all its defaults."""
    return {
        name
        for name, field in Policy.model_fields.items()
        if getattr(policy, name) != field.get_default(call_default_factory=True)
    }


def document_hash(document: Any) -> str:
    """Return the sha256 of a policy's document, as its release wrote it: later releases know more values."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: one text for one value.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class _NoDuplicates(yaml.SafeLoader):
    """YAML in which a key may stand once: of two, plain YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def policy_names() -> list[str]:
    """Return the names of the policies that the package carries."""
    folder = files("flywheel_pipeline.promotion") / "policies"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@lru_cache(maxsize=16)
def load_policy(name: str) -> Policy:
    """Read the policy of this name.

    Raises:
        PolicyError: there is none, or its file holds an unknown key or a value out of range.
    """
    if name not in policy_names():
        raise PolicyError(f"There is no policy {name}.", hint="The policies are: " + ", ".join(policy_names()) + ".")
    return parse_policy((files("flywheel_pipeline.promotion") / "policies" / f"{name}.yaml").read_text("utf-8"), name)


def parse_policy(text: str, name: str) -> Policy:
    """Parse a policy from YAML text and hold it against the declaration.

    Raises:
        PolicyError: not YAML, an unknown key, a missing one, or a value out of range; the message names it.
    """
    try:
        policy = Policy.model_validate(yaml.load(text, Loader=_NoDuplicates))  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise PolicyError(f"Policy {name} is not valid YAML: {error}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the policy"
        raise PolicyError(
            f"Policy {name}: {where}: {first['msg']}.", hint="Correct the file; nothing was decided."
        ) from error
    if policy.name != name:
        raise PolicyError(f"Policy file {name}.yaml names itself {policy.name}.")
    return policy
