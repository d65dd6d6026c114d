"""Served rules that match the same incident: which one wins, and which never fires.

Belongs here: comparing the conditions of rules that stand in one manifest, and keeping `rule_conflicts`. Does not belong
here: the order of rules in a manifest (`manifest.rule_order`), which decides who wins: an agent runs the first rule
that matches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sqlalchemy as sa

from flywheel_pipeline.delivery.manifest import Manifest, RuleRow, canonical_json, normalise_conditions

_TYPE_FIELDS = ("incident_type", "check_type")  # two names of one thing


class ConflictKey(NamedTuple):
    """Two rules and an incident that both match."""

    incident_type: str
    platform: str
    winner_id: str
    loser_id: str


@dataclass(frozen=True)
class Conflict:
    """Two rules of one manifest that match the same incident.

    Attributes:
        kind: `shadowed`: whatever the loser matches, the winner matches first, so it never fires on this incident type;
            `overlaps`: the winner has conditions that the loser lacks, so which one runs depends on the incident.
        same_runbook: both run the same script, so it does not matter which.
        appliances: manifests that hold both.
    """

    key: ConflictKey
    winner_version: int
    loser_version: int
    kind: str
    same_runbook: bool
    appliances: int


@dataclass(frozen=True)
class _Matcher:
    """A rule as far as matching goes: the types it names, and the conditions beside type and platform."""

    rule: RuleRow
    types: frozenset[str]
    others: frozenset[str]


def _matcher(rule: RuleRow) -> _Matcher:
    types: list[set[str]] = []
    others: set[str] = set()
    for condition in normalise_conditions(rule.incident_pattern, rule.platform or ""):
        values = condition["value"] if isinstance(condition["value"], list) else [condition["value"]]
        if condition["field"] in _TYPE_FIELDS and condition["operator"] in ("eq", "in"):
            types.append({str(value) for value in values})
        elif condition == {"field": "platform", "operator": "eq", "value": rule.platform}:
            continue
        else:
            others.add(canonical_json(condition))
    # Two conditions on the type: both must hold.
    return _Matcher(rule, frozenset(set.intersection(*types)) if types else frozenset(), frozenset(others))


def find_conflicts(rules: Iterable[RuleRow], manifests: Sequence[Manifest]) -> list[Conflict]:
    """Every pair of rules that stand in one manifest and match the same incident.

    Of the rules before it, a loser is listed with the first that shadows it, or else with the first that overlaps:
    the others before it never get to it either.

    Args:
        rules: the rules that may be in the manifests; only those found there count.
        manifests: as built, in the order in which the agents try the rules.

    Returns:
        By incident type, platform, winner and loser.
    """
    by_id = {rule.rule_id: rule for rule in rules}
    contents: dict[int, tuple[Manifest, int]] = {}
    for manifest in manifests:
        seen = contents.get(id(manifest.rules))
        contents[id(manifest.rules)] = (manifest, 1 + (seen[1] if seen else 0))
    matchers: dict[str, _Matcher] = {}
    buckets: dict[tuple[str, str], set[str]] = defaultdict(set)
    for manifest, _ in contents.values():
        for entry in manifest.rules:
            if entry["id"] not in matchers:
                found = matchers[entry["id"]] = _matcher(by_id[entry["id"]])
                for incident_type in found.types:
                    buckets[incident_type, str(found.rule.platform)].add(entry["id"])
    shared = {key: ids for key, ids in buckets.items() if len(ids) > 1}
    contested = set().union(*shared.values()) if shared else set()
    kinds: dict[ConflictKey, str] = {}
    appliances: Counter[ConflictKey] = Counter()
    for manifest, holders in contents.values():
        present = [entry["id"] for entry in manifest.rules if entry["id"] in contested]
        for (incident_type, platform), ids in shared.items():
            ahead: list[_Matcher] = []
            for rule_id in present:
                if rule_id not in ids:
                    continue
                this = matchers[rule_id]
                winner = next((m for m in ahead if m.others <= this.others), ahead[0] if ahead else None)
                if winner is not None:
                    key = ConflictKey(incident_type, platform, winner.rule.rule_id, rule_id)
                    kinds[key] = "shadowed" if winner.others <= this.others else "overlaps"
                    appliances[key] += holders
                # Who is shadowed shadows nobody that its winner does not.
                if winner is None or not winner.others <= this.others:
                    ahead.append(this)
    return [
        Conflict(
            key,
            by_id[key.winner_id].rule_version,
            by_id[key.loser_id].rule_version,
            kinds[key],
            by_id[key.winner_id].runbook_id == by_id[key.loser_id].runbook_id,
            appliances[key],
        )
        for key in sorted(kinds)
    ]


def write_conflicts(conn: sa.Connection, conflicts: Sequence[Conflict], batch_id: int) -> int:
    """Bring `rule_conflicts` in line; rows that are right already are not touched. Returns how many were written."""
    wanted = {c.key: c for c in conflicts}
    columns = "winner_version, loser_version, kind, same_runbook, appliances"
    standing: dict[ConflictKey, sa.RowMapping] = {
        ConflictKey(row["incident_type"], row["platform"], row["winner_id"], row["loser_id"]): row
        for row in conn.execute(
            sa.text(f"SELECT incident_type, platform, winner_id, loser_id, {columns} FROM rule_conflicts")  # noqa: S608
        ).mappings()
    }
    gone = [key._asdict() for key in standing.keys() - wanted.keys()]
    fresh = [
        {**key._asdict(), **values, "batch": batch_id}
        for key, conflict in wanted.items()
        if (
            values := {
                "winner_version": conflict.winner_version,
                "loser_version": conflict.loser_version,
                "kind": conflict.kind,
                "same_runbook": conflict.same_runbook,
                "appliances": conflict.appliances,
            }
        )
        and (key not in standing or any(standing[key][name] != value for name, value in values.items()))
    ]
    if gone:
        conn.execute(
            sa.text(
                "DELETE FROM rule_conflicts WHERE (incident_type, platform, winner_id, loser_id) "
                "= (:incident_type, :platform, :winner_id, :loser_id)"
            ),
            gone,
        )
    if fresh:
        conn.execute(
            sa.text(
                """
                INSERT INTO rule_conflicts (incident_type, platform, winner_id, loser_id, winner_version, loser_version,
                  kind, same_runbook, appliances, batch_id)
                VALUES (:incident_type, :platform, :winner_id, :loser_id, :winner_version, :loser_version,
                  :kind, :same_runbook, :appliances, :batch)
                ON CONFLICT (incident_type, platform, winner_id, loser_id) DO UPDATE SET
                  winner_version = excluded.winner_version, loser_version = excluded.loser_version, kind = excluded.kind,
                  same_runbook = excluded.same_runbook, appliances = excluded.appliances, batch_id = excluded.batch_id
                """
            ),
            fresh,
        )
    return len(gone) + len(fresh)
