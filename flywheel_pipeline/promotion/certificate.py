"""The certificate of a promotion: all that is needed to recompute its verdict, offline, by anybody.

Belongs here: building the document and verifying it without a database. Does not belong here: storing it (the ledger
does) and deciding (`gates.py`, which the verification runs again). A certificate proves that its verdict follows from
its evidence under its policy, and that nothing in it was changed; that the evidence is what the log held is proved by
the ledger, which keeps the same document, and by a recount.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import ValidationError

from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.promotion.gates import Decision, PatternEvidence, SiteEvidence, decide_pattern
from flywheel_pipeline.promotion.ledger import content_hash
from flywheel_pipeline.promotion.plain import plain
from flywheel_pipeline.promotion.policy import Policy, canonical, document_hash

FORMAT = "flywheel-certificate/1"


def _hash(document: Mapping[str, Any]) -> str:
    body = {key: value for key, value in document.items() if key != "certificate_hash"}
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def build(
    decision: Decision,
    evidence: PatternEvidence,
    policy: Policy,
    *,
    rule_id: str,
    rule_version: int,
    definition: Mapping[str, Any],
    batch_id: int,
    run_id: str,
    decided_at: dt.datetime,
) -> dict[str, Any]:
    """Return the certificate of a promotion as JSON types, with its own hash.

    It holds the policy in full, the rule's definition, the capped evidence by site, every gate, and the figures of
    the test as decimal text.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "rule_id": rule_id,
        "rule_version": rule_version,
        "definition": plain(definition),
        "content_hash": content_hash(definition),
        "policy": policy.model_dump(mode="json"),
        "policy_hash": policy.policy_hash,
        "evidence": plain(evidence),
        "verdict": decision.verdict,
        "target_state": decision.target_state,
        "reason": decision.reason,
        "gates": plain(decision.gates),
        "figures": dict(decision.figures),
        "batch_id": batch_id,
        "run_id": run_id,
        "decided_at": decided_at.isoformat(),
    }
    document["certificate_hash"] = _hash(document)
    return document


def verify(document: Mapping[str, Any] | bytes | str) -> list[str]:
    """Recompute a certificate; return what does not fit, nothing if it is valid. Needs no database.

    Every hash is recomputed, and the gates are run again on the evidence under the policy that the document carries.
    Every figure must recompute exactly: the figures of the test are text with nine decimals, the fractions are the
    shortest decimals of their binary values, so that no digit can be changed without a trace.

    Args:
        document: the parsed document, or the bytes or text of the file as exported.
    """
    if isinstance(document, (bytes, str)):
        try:
            document = json.loads(
                document, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_exact_float
            )
        except (ValueError, RecursionError) as error:
            return [f"it is not sound JSON: {error}"]
    if not isinstance(document, Mapping):
        return ["it is not a JSON object"]
    if document.get("format") != FORMAT:
        return [f"its format is {document.get('format')!r}, not {FORMAT!r}"]
    problems = []
    try:
        if _hash(document) != document["certificate_hash"]:
            problems.append("its own hash does not fit: something in it was changed")
        policy = Policy.model_validate(document["policy"])
        if document_hash(document["policy"]) != document["policy_hash"]:
            problems.append("the policy does not have the hash it claims")
        if content_hash(document["definition"]) != document["content_hash"]:
            problems.append("the rule's definition does not have the hash it claims")
        evidence = evidence_of(document["evidence"])
        definition = document["definition"]
        if not isinstance(definition, Mapping):
            return [*problems, "its definition is not an object"]
        for what, expected in (
            ("runbook_id", evidence.runbook_id),
            ("platform", evidence.platform),
            ("pattern_key", evidence.pattern_key),
        ):
            if definition.get(what) != expected:
                problems.append(f"the rule's {what} is another than the evidence speaks of")
        problems += _over_caps(evidence, policy)
        decision = decide_pattern(evidence, policy)
        for what, recomputed in (
            ("verdict", decision.verdict),
            ("target_state", decision.target_state),
            ("reason", decision.reason),
            ("gates", plain(decision.gates)),
            ("figures", dict(decision.figures)),
        ):
            if recomputed != document[what]:
                problems.append(f"{what} recomputes to something else than it says")
        if decision.verdict not in ("promote", "advance"):
            problems.append(f"its evidence does not promote: {decision.reason}")
    except KeyError as error:
        problems.append(f"it lacks {error}")
    except (TypeError, ValueError, ArithmeticError, FlywheelError, ValidationError) as error:
        problems.append(f"it cannot be read: {str(error).splitlines()[0]}")
    return problems


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice among {', '.join(sorted(set(keys)))}")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _exact_float(text: str) -> float:
    value = float(text)
    # 0.95238095238095231 and …30 are one binary fraction: only its shortest decimal is accepted, in any notation.
    if Decimal(text) != Decimal(repr(value)):
        raise ValueError(f"{text} is not the exact decimal of a figure")
    return value


def _over_caps(evidence: PatternEvidence, policy: Policy) -> list[str]:
    """Name the sites that count more episodes than the policy's caps allow."""
    if policy.kind != "sequential":
        return []
    caps = policy.evidence
    return [
        f"site {site.site_id} counts {site.successes + site.failures} episodes of {site.hosts} hosts, above the caps"
        for site in evidence.sites
        if site.successes + site.failures > min(caps.episodes_per_site, caps.episodes_per_host * site.hosts)
    ]


def evidence_of(stored: Mapping[str, Any]) -> PatternEvidence:
    """Return the evidence as the gates take it, from its JSON form.

    Raises:
        TypeError, KeyError: the document does not hold the evidence's fields, or not in their types.
    """
    values = dict(stored)
    values["sites"] = tuple(SiteEvidence(**site) for site in values["sites"])
    for name in ("shadowed_rules", "approvers"):
        values[name] = tuple(values[name])
    evidence = PatternEvidence(**values)
    parts: list[PatternEvidence | SiteEvidence] = [evidence, *evidence.sites]
    for part in parts:
        for field in fields(part):
            value = getattr(part, field.name)
            if field.type == "int" and type(value) is not int:
                raise TypeError(f"{field.name} is a whole number, not {value!r}")
    return evidence
