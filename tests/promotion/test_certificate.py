"""Certificates: they verify offline, and a changed digit fails."""

from __future__ import annotations

import copy
import datetime as dt
import json
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from evidence import pattern, sites
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.promotion import certificate
from flywheel_pipeline.promotion.gates import PatternEvidence, decide_pattern
from flywheel_pipeline.promotion.policy import load_policy

NOW = dt.datetime(2026, 2, 15, 18, 0, tzinfo=dt.UTC)


def certify(evidence: PatternEvidence, policy_name: str = "standard") -> dict[str, Any]:
    policy = load_policy(policy_name)
    return certificate.build(
        decide_pattern(evidence, policy),
        evidence,
        policy,
        rule_id=f"RB-AUTO-{evidence.pattern_key}",
        rule_version=1,
        definition={
            "incident_pattern": dict(evidence.conditions),
            "runbook_id": evidence.runbook_id,
            "platform": evidence.platform,
            "source": "promoted",
            "promoted_from_l2": True,
            "pattern_key": evidence.pattern_key,
            "confidence": None,
        },
        batch_id=7,
        run_id="2026-02-15-evening",
        decided_at=NOW,
    )


GOOD = pattern(
    stage="canary",
    sites=sites(*[(10, 0)] * 7, (9, 1)),
    capable_share=20 / 21,
    shadow_days=14.000011574074074,
    first_at=dt.datetime(2026, 1, 10, tzinfo=dt.UTC),
    last_at="2026-02-14T11:00:00+00:00",
)


def resealed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its own hash made to fit again, as a forger would."""
    document = copy.deepcopy(document)
    document["certificate_hash"] = certificate._hash(document)
    return document


def as_jsonb(value: Any) -> Any:
    """What PostgreSQL's jsonb gives back: keys in another order, numbers in plain notation without an exponent."""
    text = json.dumps(value, separators=(", ", ": "))

    def plain_notation(number: str) -> float:
        return float(format(Decimal(number), "f"))

    def reordered(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(sorted(pairs, key=lambda pair: (len(pair[0]), pair[0])))

    return json.loads(text, parse_float=plain_notation, object_pairs_hook=reordered)


@pytest.mark.parametrize(
    ("evidence", "policy"),
    [
        (GOOD, "standard"),
        (pattern(), "standard"),
        (pattern(stage="none"), "standard"),
        (pattern(approvers=("ana",), is_disruptive=True), "high_risk"),
        (pattern(stage="none", occurrences=5, successes=5, sites=()), "legacy"),
    ],
)
def test_a_certificate_verifies_from_its_own_bytes(evidence, policy):
    document = certify(evidence, policy)
    assert certificate.verify(document) == []
    assert certificate.verify(json.dumps(document)) == []
    assert certificate.verify(json.dumps(document, indent=2, ensure_ascii=False).encode()) == []
    assert certificate.verify(as_jsonb(document)) == []


def test_it_holds_what_a_recomputation_needs():
    document = certify(GOOD)
    assert document["verdict"] == "advance"
    assert document["policy"]["stages"]["ring"] == {"floor": 0.9, "alpha": 0.05}
    assert [site["successes"] for site in document["evidence"]["sites"]] == [10] * 7 + [9]
    assert {"log_e", "log_threshold", "log_e_leave_one_out"} <= document["figures"].keys()
    assert (document["evidence"]["first_at"], document["evidence"]["last_at"]) == (
        "2026-01-10T00:00:00+00:00",
        "2026-02-14T11:00:00+00:00",
    )


def digits(text: str) -> list[int]:
    return [i for i, c in enumerate(text) if c.isdigit()]


TEXT = json.dumps(certify(GOOD))
assert TEXT.count("0.9523809523809523") >= 1, "a fraction of 17 digits stands in the document"


@given(st.sampled_from(digits(TEXT)), st.integers(1, 9))
@settings(max_examples=400)
def test_any_changed_digit_fails(position, step):
    other = str((int(TEXT[position]) + step) % 10)
    assert certificate.verify(TEXT[:position] + other + TEXT[position + 1 :]) != []


def test_every_last_digit_of_the_longest_fraction_is_held():
    for digit in "0123456789":
        forged = TEXT.replace("0.9523809523809523", f"0.952380952380952{digit}")
        assert (certificate.verify(forged) == []) == (digit == "3")


FORGERIES = {
    "one more success": lambda d: d["evidence"]["sites"][7].update(successes=10),
    "a failure less": lambda d: d["evidence"]["sites"][7].update(failures=0),
    "a figure of the test": lambda d: d["figures"].update(log_e="4.151234567"),
    "a lower floor": lambda d: d["policy"]["stages"]["ring"].update(floor=0.85),
    "another verdict": lambda d: d.update(verdict="promote"),
    "a further target": lambda d: d.update(target_state="fleet"),
    "another reason": lambda d: d.update(reason="It is good."),
    "a gate that passed": lambda d: d["gates"][0].update(sentence="It is good."),
    "a gate left out": lambda d: d["gates"].pop(),
    "another runbook": lambda d: d["definition"].update(runbook_id="RB-WIN-SEC-002"),
    "another policy hash": lambda d: d.update(policy_hash="0" * 64),
    "another content hash": lambda d: d.update(content_hash="0" * 64),
    "a success of a half": lambda d: d["evidence"]["sites"][0].update(successes=9.5),
    "a success of yes": lambda d: d["evidence"]["sites"][0].update(hosts=True),
    "an unknown field": lambda d: d["evidence"].update(luck=1),
    "a missing field": lambda d: d["evidence"].pop("attempt"),
    "a negative count": lambda d: d["evidence"]["sites"][0].update(successes=-1),
    "an enormous count": lambda d: d["evidence"]["sites"][0].update(successes=10**400),
    "a definition that is text": lambda d: d.update(definition="RB-WIN-SEC-001"),
    "evidence that is a list": lambda d: d.update(evidence=[]),
    "sites that are numbers": lambda d: d["evidence"].update(sites=[1, 2]),
    "no policy": lambda d: d.pop("policy"),
    "a policy without stages": lambda d: d["policy"].update(stages={}),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forgery_fails_even_when_its_own_hash_was_made_to_fit(forge):
    document = copy.deepcopy(certify(GOOD))
    forge(document)
    assert certificate.verify(document) != []
    problems = certificate.verify(resealed(document))
    assert problems
    assert not any("its own hash" in problem for problem in problems)


def test_episodes_above_the_caps_do_not_verify():
    giant = pattern(stage="canary", sites=sites((200, 0, 40), *[(10, 0)] * 8))
    assert any("above the caps" in problem for problem in certificate.verify(certify(giant)))
    one_host = pattern(stage="canary", sites=sites(*[(10, 0, 3)] * 8))
    assert any("above the caps" in problem for problem in certificate.verify(certify(one_host)))


def test_a_decision_that_holds_makes_no_valid_certificate():
    held = certify(pattern(matched_incidents=0))
    (problem,) = certificate.verify(held)
    assert problem.startswith("its evidence does not promote")


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"format": "flywheel-certificate/2"}',
        b'{"format": "flywheel-certificate/1"}',
        b"[" * 100_000,
        TEXT[:-1].encode(),
        TEXT.replace('"batch_id": 7', '"batch_id": 8, "batch_id": 7').encode(),
        TEXT.replace('"batch_id": 7', '"batch_id": NaN').encode(),
    ],
    ids=["empty", "not UTF-8", "list", "null", "bare", "format", "hollow", "deep", "cut", "a key twice", "NaN"],
)
def test_what_is_no_certificate_is_said_to_be_none_without_a_traceback(document):
    assert certificate.verify(document) != []


def test_verification_needs_no_database_and_no_dagster(tmp_path):
    file = tmp_path / "certificate.json"
    file.write_text(TEXT, "utf-8")
    program = (
        "import pathlib, sys; from flywheel_pipeline.promotion import certificate; "
        f"print(certificate.verify(pathlib.Path({str(file)!r}).read_bytes()), 'dagster' in sys.modules, 'psycopg' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False False"
