"""Grouping error messages: masks, and a merge of what only differs in a word that varies, behind one interface.

Belongs here: how messages become templates, and the families of causes that templates belong to. Does not belong here:
the masks themselves (`attribution`) and counting.

`MergedTemplates` is the one in use. benchmarks/bench_templates.py holds it against the masks alone and drain3 (MIT, last
release July 2022; no dependency) on a labelled log set.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flywheel_pipeline.health.attribution import ADVICE, VERBATIM, ErrorTemplate, masks

VARIES = 5  # values of one word among templates that are the same else: then it is a variable, whatever it looks like
ANY = "<*>"
_CODE = re.compile(rf"{VERBATIM.pattern}|^\W*[0-9]{{1,3}}\W*$")  # what the masks kept: 401 is not 500, whatever varies
_IDENTIFIER = re.compile(r"[0-9_/\\.@#$:=-]|[a-z][A-Z]|<")


class Templates(Protocol):
    """Gives each message the template of its group."""

    def of(self, messages: Sequence[str | None], hosts: Iterable[str] = ()) -> list[str]:
        """One template a message, in order. Messages of one template are one group."""
        ...


class MaskedTemplates:
    """Masks alone: addresses, hosts, accounts, paths, times, ids and numbers."""

    def of(self, messages: Sequence[str | None], hosts: Iterable[str] = ()) -> list[str]:
        """One template a message."""
        seen = masks(messages, hosts)
        return [seen[message] for message in messages]


class MergedTemplates:
    """Masks, then a merge: templates that differ in one word become one, where that word is a variable.

    A word is a variable where it takes many values (five or more) between the same words, or where it looks like an
    identifier each time. Two plain words in one place stay two templates: `Phase 'verify' failed` is not `Phase
    'remediate' failed`. What the masks keep since it tells causes apart (runbook ids, status codes) is never one.
    """

    def of(self, messages: Sequence[str | None], hosts: Iterable[str] = ()) -> list[str]:
        """One template a message."""
        masked = MaskedTemplates().of(messages, hosts)
        merged = merge(set(masked))
        return [merged[template] for template in masked]


def merge(templates: Iterable[str]) -> dict[str, str]:
    """Map each masked template to the merged one of its group."""
    words = {template: template.split(" ") for template in templates}
    current = {template: tuple(parts) for template, parts in words.items()}
    for _ in range(4):  # a second variable shows once the first is one
        distinct = set(current.values())
        replaced: dict[tuple[str, ...], tuple[str, ...]] = {}
        around: dict[tuple[int, tuple[str, ...]], list[tuple[str, ...]]] = defaultdict(list)
        for parts in distinct:
            for i in range(len(parts)):
                around[i, (*parts[:i], ANY, *parts[i + 1 :])].append(parts)
        # Largest groups first, so that a template joins the one in which its word varies most.
        for (i, joined), members in sorted(around.items(), key=lambda item: (-len(item[1]), item[0])):
            free = [
                parts for parts in members if parts not in replaced and parts[i] != ANY and not _CODE.search(parts[i])
            ]
            if len(joined) < 2 or not free:
                continue
            values = {parts[i] for parts in free}
            known = joined in distinct
            if len(values) >= VARIES or ((len(values) > 1 or known) and all(_IDENTIFIER.search(v) for v in values)):
                for parts in free:
                    replaced[parts] = joined
        if not replaced:
            break
        current = {template: replaced.get(parts, parts) for template, parts in current.items()}
    return {template: " ".join(parts) for template, parts in current.items()}


def grouping_accuracy(groups: Sequence[str], labels: Sequence[str]) -> float:
    """Fraction of messages whose group holds exactly the messages of their label; 1 over nothing.

    Raises:
        ValueError: not one group and one label a message.
    """
    of_group: dict[str, set[int]] = defaultdict(set)
    of_label: dict[str, set[int]] = defaultdict(set)
    for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
        of_group[group].add(i)
        of_label[label].add(i)
    right = sum(len(members) for members in of_label.values() if of_group[groups[min(members)]] == members)
    return right / len(labels) if labels else 1.0


@dataclass(frozen=True)
class CauseFamily:
    """Failures with one remedy: an outcome class, or a part of one that its words tell apart.

    Attributes:
        family: a short name; what: the cause in words; advice: what to do.
        failures, hosts: of it; share: fraction of all failures.
        rate_if_fixed: success rate of the rule if this and all families before it were gone.
        template: its most frequent error.
    """

    family: str
    what: str
    advice: str
    failures: int
    share: float
    rate_if_fixed: float
    template: str


# (family, classes, words, what, advice): the first that applies. The words stand in templates of `attribution.mask`.
_FAMILIES: tuple[tuple[str, frozenset[str], re.Pattern[str], str, str], ...] = (
    (
        "no_runbook",
        frozenset({"failure", "agent_unsupported"}),
        re.compile(r"^Runbook not found: "),
        "the rule names a runbook that does not exist",
        "point the rule at a runbook of the catalogue, or quarantine it",
    ),
    (
        "missing_component",
        frozenset({"failure", "not_applicable"}),
        re.compile(
            r"No encryptable volumes|is not recognized|WMI query failed|ProtectionStatus=|Phase '?verify'? failed", re.I
        ),
        "a cmdlet, volume or service that the runbook relies on is missing, or its check did not pass",
        "let the runbook test for what it needs first, and report not applicable where it is missing",
    ),
)
_CLASS_WORDS = {
    "agent_unsupported": "the agent is too old for the action",
    "not_applicable": "the host cannot have this control",
    "unreachable": "the host could not be reached",
    "escalated": "the runbook hands over to a person",
    "suppressed": "held back after repeated fixes",
    "unverified": "success was not verified",
    "failure": "the runbook failed",
    "success": "reported as failed, though verified",
}


def family_of(error: ErrorTemplate) -> tuple[str, str, str]:
    """(family, what, advice) of an error template."""
    for family, classes, words, what, advice in _FAMILIES:
        if error.outcome_class in classes and words.search(error.template):
            return family, what, advice
    return error.outcome_class, _CLASS_WORDS[error.outcome_class], ADVICE[error.outcome_class]


def cause_families(errors: Sequence[ErrorTemplate], successes: int, executions: int) -> list[CauseFamily]:
    """Rank the causes that the errors name, most failures first, each with the rate if it were gone.

    Args:
        errors: all error templates of the rule.
        successes: of the rule; the rate if fixed counts the failures of a cause as healed.
        executions: of the rule.
    """
    groups: dict[str, list[ErrorTemplate]] = defaultdict(list)
    words: dict[str, tuple[str, str]] = {}
    for error in errors:
        family, what, advice = family_of(error)
        groups[family].append(error)
        words[family] = (what, advice)
    total = sum(error.count for error in errors)
    healed, found = successes, []
    for family in sorted(groups, key=lambda g: (-sum(e.count for e in groups[g]), g)):
        failures = sum(e.count for e in groups[family])
        healed += failures
        top = min(groups[family], key=lambda e: (-e.count, e.template))
        found.append(CauseFamily(family, *words[family], failures, failures / total, healed / executions, top.template))
    return found
