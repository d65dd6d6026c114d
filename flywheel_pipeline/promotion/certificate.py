"""The certificate of a promotion: all that is needed to recompute its verdict, offline, by anybody.

Belongs here: building the document and verifying it without a database. Does not belong here: storing it (the ledger
does) and deciding (`gates.py`, which the verification runs again).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flywheel_pipeline.promotion.gates import Decision, PatternEvidence, SiteEvidence, decide_pattern
from flywheel_pipeline.promotion.ledger import content_hash
from flywheel_pipeline.promotion.plain import plain
from flywheel_pipeline.promotion.policy import Policy, canonical

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
    """
    if isinstance(document, (bytes, str)):
        try:
            document = json.loads(document)
        except (ValueError, UnicodeDecodeError) as error:
            return [f"it is not JSON: {error}"]
    if not isinstance(document, Mapping):
        return ["it is not a JSON object"]
    if document.get("format") != FORMAT:
        return [f"its format is {document.get('format')!r}, not {FORMAT!r}"]
    problems = []
    try:
        if _hash(document) != document["certificate_hash"]:
            problems.append("its own hash does not fit: something in it was changed")
        policy = Policy.model_validate(document["policy"])
        if policy.policy_hash != document["policy_hash"]:
            problems.append("the policy does not have the hash it claims")
        if content_hash(document["definition"]) != document["content_hash"]:
            problems.append("the rule's definition does not have the hash it claims")
        evidence = evidence_of(document["evidence"])
        if document["definition"].get("runbook_id") != evidence.runbook_id:
            problems.append("the rule runs another runbook than the evidence speaks of")
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
    except KeyError as error:
        problems.append(f"it lacks {error}")
    except (TypeError, ValueError, ValidationError) as error:
        problems.append(f"it cannot be read: {str(error).splitlines()[0]}")
    return problems


def evidence_of(stored: Mapping[str, Any]) -> PatternEvidence:
    """Return the evidence as the gates take it, from its JSON form.

    Raises:
        TypeError, KeyError: the document does not hold the evidence's fields.
    """
    fields = dict(stored)
    fields["sites"] = tuple(SiteEvidence(**site) for site in fields["sites"])
    for name in ("shadowed_rules", "approvers"):
        fields[name] = tuple(fields[name])
    return PatternEvidence(**fields)
