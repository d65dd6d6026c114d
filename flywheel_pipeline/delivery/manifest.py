"""The desired state of each appliance: which rules it should run, in which order, in which action form.

Belongs here: pure functions from rules, appliances and the runbook catalogue to manifests and their hashes.
Does not belong here: the database (`publish`) and the decision that a rule is in service (`promotion`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flywheel_pipeline.delivery.capability import FORM_BY_PLATFORM, served_action
from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.promotion.runbook_ids import is_placeholder

COOLDOWN_SECONDS = 300
MAX_RETRIES = 1
DEFAULT_SEVERITY = "medium"

# Share of the sites that a rule is delivered to, by state and step within it; never less than one site, and in the first
# step of the canary no more. Without a step a rule stands where it stood before there were any.
STAGE_SHARE: Mapping[tuple[str, int | None], float] = {
    ("canary", 1): 0.0,
    ("canary", 2): 0.10,
    ("canary", None): 0.10,
    ("ring", 1): 0.25,
    ("ring", None): 0.25,
    ("ring", 2): 0.50,
    ("fleet", None): 1.0,
}

UNKNOWN_RELEASE = "unknown"

_TYPE_FIELDS = ("incident_type", "check_type")
_OPERATORS = ("eq", "ne", "in", "not_in", "contains", "regex", "gt", "gte", "lt", "lte", "exists")


class UnservableRule(FlywheelError):
    """A rule is enabled that no appliance may get: no executable runbook behind it, or it matches all."""


@dataclass(frozen=True)
class RunbookRow:
    """A runbook of the catalogue, as far as delivery needs it."""

    runbook_id: str
    name: str
    platform: str | None
    severity: str | None = None
    enabled: bool = True


@dataclass(frozen=True)
class RuleRow:
    """A rule of `l1_rules`, as far as delivery needs it.

    Attributes:
        incident_pattern: the stored match conditions, in any shape found in production.
        failing: measured to fail (`publish.load_rules` says how); such a rule stands behind the others.
        rollout_step: step within canary or ring; None elsewhere.
    """

    rule_id: str
    rule_version: int
    incident_pattern: Any
    runbook_id: str | None
    platform: str | None
    source: str
    state: str
    enabled: bool
    content_hash: str
    failing: bool = False
    rollout_step: int | None = None


@dataclass(frozen=True)
class ApplianceRow:
    """An appliance that is to have a manifest; `capabilities` is what it reports, None if nothing."""

    appliance_id: str
    site_id: str
    agent_version: str | None
    capabilities: Any = None


@dataclass(frozen=True)
class ScopeOut:
    """A part of the fleet that a rule in service is kept from: a site, or a release of the agent."""

    rule_id: str
    kind: Literal["site", "agent_version"]
    value: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What one appliance should run.

    Attributes:
        manifest_hash: sha256 of the rules, as 64 hex digits; two appliances with equal rules share it.
        rules: in the agent's sync format plus the rule's `version`, in the order in which the agent tries
            them.
        withheld: enabled rules in scope that it cannot run, or is kept from by a quarantine of its site or its agent's
            release: `{rule_id, version, source, reason}`, by rule id.
    """

    appliance_id: str
    site_id: str
    manifest_hash: str
    rules: tuple[dict[str, Any], ...]
    withheld: tuple[dict[str, Any], ...]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text.

    Raises:
        ValueError: a number that is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def manifest_hash(rules: Iterable[Mapping[str, Any]]) -> str:
    """sha256 of the rules in their order, as 64 hex digits."""
    return _hash_of_texts(canonical_json(rule) for rule in rules)


def _hash_of_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256(f"[{','.join(texts)}]".encode()).hexdigest()


def normalise_conditions(incident_pattern: Any, platform: str) -> list[dict[str, Any]]:
    """The match conditions in the agent's form, from any stored shape.

    `{"incident_type": X}`, `{"check_type": X}` and further fields become one `eq` condition a field (`in` for
    a list of values); a list of `{field, operator, value}` is kept. A condition on the platform is added
    where there is none, since an incident type such as `firewall` exists on each platform. The order is by
    field.

    Args:
        incident_pattern: `l1_rules.incident_pattern`.
        platform: windows, linux or macos.

    Raises:
        UnservableRule: no condition names an incident type, or a shape that cannot be read: such a rule might
            match everything.
    """
    conditions: list[dict[str, Any]] = []
    for part in incident_pattern if isinstance(incident_pattern, list) else [incident_pattern]:
        if not isinstance(part, Mapping):
            raise UnservableRule(f"{part!r} is no match condition.", hint="It is an object, or a list of objects.")
        if "field" in part:
            conditions.append(_explicit_condition(part))
        else:
            conditions.extend(
                {"field": key, "operator": "in" if isinstance(value, list) else "eq", "value": value}
                for key, value in part.items()
            )
    if not any(c["field"] in _TYPE_FIELDS and _narrows(c) for c in conditions):
        raise UnservableRule(
            "The match conditions name no incident type, so the rule would match everything.",
            hint="Give incident_pattern an incident_type or check_type.",
        )
    if not any(c["field"] == "platform" for c in conditions):
        conditions.append({"field": "platform", "operator": "eq", "value": platform})
    return sorted(conditions, key=lambda c: (c["field"], canonical_json(c)))


def _explicit_condition(part: Mapping[str, Any]) -> dict[str, Any]:
    operator = part.get("operator", "eq")
    if set(part) - {"field", "operator", "value"} or "value" not in part or operator not in _OPERATORS:
        raise UnservableRule(
            f"{dict(part)!r} is no match condition.",
            hint=f"It has a field, an operator ({', '.join(_OPERATORS)}) and a value.",
        )
    return {"field": str(part["field"]), "operator": operator, "value": part["value"]}


def _narrows(condition: Mapping[str, Any]) -> bool:
    """Whether a condition on the incident type names types: text, or a list of text, without blanks."""
    if condition["operator"] not in ("eq", "in"):
        return False
    values = condition["value"] if isinstance(condition["value"], list) else [condition["value"]]
    return bool(values) and all(isinstance(v, str) and v.strip() for v in values)


def runbook_problem(runbook_id: str | None, platform: str | None, catalogue: Mapping[str, RunbookRow]) -> str | None:
    """Why this runbook cannot be served to that platform; None where it can.

    Twin of the database's `flywheel_runbook_problem`, word for word.
    """
    if is_placeholder(runbook_id):
        named = (runbook_id or "").strip(" ") or "an empty runbook"
        return f"{named} is a placeholder: no script stands behind it"
    runbook = catalogue.get(runbook_id or "")
    if runbook is None:
        return f"{runbook_id} is not in the runbook catalogue"
    if not runbook.enabled:
        return f"{runbook_id} is disabled in the runbook catalogue"
    if platform is None or runbook.platform != platform:
        return (
            f"{runbook_id} is a runbook for {runbook.platform or 'no platform'}, "
            f"the rule is for {platform or 'no platform'}"
        )
    return None


def rule_problem(rule: RuleRow, catalogue: Mapping[str, RunbookRow]) -> str | None:
    """Why no appliance may get this rule: runbook, platform or match conditions; None where it may be."""
    problem = runbook_problem(rule.runbook_id, rule.platform, catalogue)
    if problem is None and rule.platform not in FORM_BY_PLATFORM:
        problem = f"no agent runs runbooks for {rule.platform}"
    if problem is None:
        try:
            normalise_conditions(rule.incident_pattern, rule.platform or "")
        except UnservableRule as unservable:
            problem = str(unservable)
    return problem


def unservable_rules(rules: Iterable[RuleRow], catalogue: Mapping[str, RunbookRow]) -> list[tuple[str, str]]:
    """The enabled rules that no appliance may get, as (rule_id, problem), by rule id; best none."""
    problems = ((rule.rule_id, rule_problem(rule, catalogue)) for rule in rules if rule.enabled)
    return sorted((rule_id, problem) for rule_id, problem in problems if problem is not None)


def cohort(
    rule_id: str, rule_version: int, state: str, sites: Iterable[str], step: int | None = None
) -> frozenset[str]:
    """The sites that a rule of this state is delivered to.

    Sites are ranked by sha256(rule, version, site): the choice is stable, differs from rule to rule, and the
    cohort of a step contains those of the steps before it. At least one site, else at most `STAGE_SHARE` of
    them.

    Args:
        rule_id: the rule.
        rule_version: its version; a new version draws new sites.
        state: canary, ring or fleet; any other state is delivered nowhere.
        sites: the sites that have an appliance.
        step: the step within canary or ring.
    """
    share = STAGE_SHARE.get((state, step))
    everywhere = sorted(set(sites))
    if share is None or not everywhere:
        return frozenset()
    ranked = sorted(everywhere, key=lambda s: hashlib.sha256(f"{rule_id}\0{rule_version}\0{s}".encode()).digest())
    return frozenset(ranked[: max(1, int(len(ranked) * share))])


def rule_order(rule: RuleRow) -> tuple[int, int, str]:
    """Sort key of a rule within a manifest; an agent runs the first rule that matches.

    Built-in rules first, promoted ones after them; measured to fail, a rule falls one tier behind. So a
    promoted rule takes over from a failing built-in, and never outranks a healthier one. The tiers depend on
    a threshold and not on the rates, so that new telemetry does not reshuffle every manifest.
    """
    return (1 if rule.failing else 0, 0 if rule.source == "builtin" else 1, rule.rule_id)


def build_manifests(
    rules: Sequence[RuleRow],
    appliances: Sequence[ApplianceRow],
    catalogue: Mapping[str, RunbookRow],
    *,
    on_unservable: Literal["raise", "leave_out"] = "raise",
    quarantines: Iterable[ScopeOut] = (),
) -> list[Manifest]:
    """Build the manifest of every appliance.

    A manifest holds the enabled rules whose stage reaches the site and whose action the agent can execute. It
    depends on the content of the arguments alone, not on their order.

    Args:
        rules: all rules; those not enabled are ignored.
        appliances: the appliances that are to have a manifest, one row each.
        catalogue: runbooks by id.
        on_unservable: what an enabled rule without an executable runbook (or matching everything) leads to.
            `leave_out` keeps it out of every manifest, so that other rules can still be withdrawn; the caller
            then fails on `unservable_rules`.
        quarantines: parts of the fleet that rules are kept from; an agent that does not say its release is `unknown`.

    Returns:
        One manifest per appliance, by appliance id.

    Raises:
        UnservableRule: an enabled rule may not be served (with `raise`).
        ValueError: a rule or an appliance is given twice.
    """
    _refuse_repeats("rule", [r.rule_id for r in rules])
    _refuse_repeats("appliance", [a.appliance_id for a in appliances])
    unservable = unservable_rules(rules, catalogue)
    if unservable and on_unservable == "raise":
        listed = "; ".join(f"{rule_id}: {problem}" for rule_id, problem in unservable)
        raise UnservableRule(
            f"{len(unservable)} enabled rule(s) may not be served: {listed}.",
            hint="Quarantine them with a reason, or correct the runbook catalogue.",
        )
    left_out = {rule_id for rule_id, _ in unservable}
    served = sorted((r for r in rules if r.enabled and r.rule_id not in left_out), key=rule_order)
    sites = {a.site_id for a in appliances}
    reach = {r.rule_id: cohort(r.rule_id, r.rule_version, r.state, sites, r.rollout_step) for r in served}
    kept_out = {(q.kind, q.value, q.rule_id): q.reason for q in quarantines}

    # Appliances with the same agent at sites with the same rules share one manifest, and each rule is put into
    # its form once per kind of agent: 10,000 appliances x 500 rules are 5 million pairs.
    scopes = {site: tuple(r for r in served if site in reach[r.rule_id]) for site in sites}
    groups: dict[tuple[str, tuple[tuple[str, str | None], ...]], list[ApplianceRow]] = defaultdict(list)
    scope_ids = {
        site: tuple((r.rule_id, kept_out.get(("site", site, r.rule_id))) for r in scope)
        for site, scope in scopes.items()
    }
    for appliance in appliances:
        groups[_kind_of_agent(appliance), scope_ids[appliance.site_id]].append(appliance)
    offers: dict[str, dict[str, _Offer]] = {}
    manifests: list[Manifest] = []
    for (kind, _), members in groups.items():
        if kind not in offers:
            release = members[0].agent_version or UNKNOWN_RELEASE
            offers[kind] = {
                r.rule_id: _offer(r, members[0], catalogue, kept_out.get(("agent_version", release, r.rule_id)))
                for r in served
            }
        site = members[0].site_id
        scope = [
            offers[kind][r.rule_id] if reason is None else _withheld(r, reason)
            for r in scopes[site]
            for reason in (kept_out.get(("site", site, r.rule_id)),)
        ]
        entries = tuple(o.content for o in scope if o.served)
        withheld = tuple(sorted((o.content for o in scope if not o.served), key=lambda w: str(w["rule_id"])))
        content = _hash_of_texts(o.text for o in scope if o.served)
        manifests.extend(Manifest(a.appliance_id, a.site_id, content, entries, withheld) for a in members)
    return sorted(manifests, key=lambda m: m.appliance_id)


def _refuse_repeats(what: str, ids: list[str]) -> None:
    repeated = sorted(i for i, times in Counter(ids).items() if times > 1)
    if repeated:
        raise ValueError(f"{what} given twice: {', '.join(repeated)}")


def _kind_of_agent(appliance: ApplianceRow) -> str:
    return canonical_json([appliance.agent_version, appliance.capabilities])


@dataclass(frozen=True)
class _Offer:
    """A rule as one kind of agent gets it: its entry and the entry's canonical JSON, or why it is withheld."""

    served: bool
    content: dict[str, Any]
    text: str


def _withheld(rule: RuleRow, reason: str) -> _Offer:
    content = {"rule_id": rule.rule_id, "version": rule.rule_version, "source": rule.source, "reason": reason}
    return _Offer(False, content, canonical_json(content))


def _offer(
    rule: RuleRow, appliance: ApplianceRow, catalogue: Mapping[str, RunbookRow], kept_out: str | None = None
) -> _Offer:
    if kept_out is not None:
        return _withheld(rule, kept_out)
    runbook_id, platform = str(rule.runbook_id), str(rule.platform)
    capability = served_action(runbook_id, platform, appliance.agent_version, appliance.capabilities)
    if not capability.ok:
        return _withheld(rule, str(capability.reason))
    content = _entry(rule, catalogue[runbook_id], platform, capability.action)
    return _Offer(True, content, canonical_json(content))


def _entry(rule: RuleRow, runbook: RunbookRow, platform: str, action: str) -> dict[str, Any]:
    return {
        "id": rule.rule_id,
        "name": runbook.name,
        "conditions": normalise_conditions(rule.incident_pattern, platform),
        "actions": [action],
        "severity": runbook.severity or DEFAULT_SEVERITY,
        "cooldown_seconds": COOLDOWN_SECONDS,
        "max_retries": MAX_RETRIES,
        "source": rule.source,
        "version": rule.rule_version,
    }
