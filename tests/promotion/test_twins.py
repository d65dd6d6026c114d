"""Each function that exists twice, in Python and in SQL, says the same on any input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flywheel_pipeline.candidates.keys import parts_of_key, pattern_key, rule_id_of_pattern
from flywheel_pipeline.delivery.manifest import UnservableRule, normalise_conditions
from flywheel_pipeline.promotion.ledger import ENABLED_STATES, content_hash
from flywheel_pipeline.promotion.runbook_ids import PLACEHOLDER_IDS, PLACEHOLDER_PREFIXES, is_placeholder

# What PostgreSQL can store: no NUL, no lone surrogates.
TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=30)
RUNBOOKS = st.one_of(
    TEXT,
    st.builds(
        lambda pad, head, tail: pad + head + tail,
        st.sampled_from(["", " ", "  ", "\t", "\u00a0"]),
        st.sampled_from(
            [*PLACEHOLDER_PREFIXES, *PLACEHOLDER_IDS, "auto-", "Esc-", "RB-AUTO-", "eſc-", "ESCALATE ", "gENERAL"]
        ),
        TEXT,
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def connection(shared_engine: sa.Engine) -> Iterator[sa.Connection]:
    with shared_engine.connect() as opened:
        yield opened


def ask(connection: sa.Connection, expression: str, **values: Any) -> Any:
    return connection.execute(sa.text(f"SELECT {expression}"), values).scalar_one()


@given(runbook_id=st.none() | RUNBOOKS)
@example(runbook_id="eſc-001")  # upper() of the long s is S, outside ASCII
@example(runbook_id="unassıgned-x")  # and that of the dotless i is I
@example(runbook_id="\tAUTO-X")
@settings(max_examples=300, deadline=None)
def test_placeholders_are_the_same_in_sql(connection, runbook_id):
    assert ask(connection, "flywheel_is_placeholder(CAST(:r AS text))", r=runbook_id) is is_placeholder(runbook_id)


@given(parts=st.tuples(TEXT, TEXT, TEXT))
@example(parts=("a~b", "%7E", "%25"))
@settings(max_examples=300, deadline=None)
def test_pattern_keys_are_the_same_in_sql_and_give_their_parts_back(connection, parts):
    key = pattern_key(*parts)
    assert ask(connection, "flywheel_pattern_key(:a, :b, :c)", a=parts[0], b=parts[1], c=parts[2]) == key
    assert parts_of_key(key) == parts


@given(one=st.tuples(TEXT, TEXT, TEXT), other=st.tuples(TEXT, TEXT, TEXT))
def test_two_patterns_never_share_a_rule_id(one, other):
    same = rule_id_of_pattern(pattern_key(*one)) == rule_id_of_pattern(pattern_key(*other))
    assert same == (one == other)


def test_the_collisions_of_the_old_rule_ids_are_gone():
    types = ["firewall", "firewall_status", "service_dns", "service_netlogon", "service_spooler"]
    ids = {rule_id_of_pattern(pattern_key(t, "RB-WIN-SEC-001", "windows")) for t in types}
    assert len(ids) == len(types)


@given(definition=st.dictionaries(TEXT, JSON, max_size=6))
@example(definition={"b": 1, "aa": 2, "é": 3, "zz": 4, "": 5})
@example(definition={"text": '\\ " / \b\f\n\r\t\x01\x1f\x7f\u2028 ü 🙂', "deep": [{"k": [None, True, -0]}]})
@settings(max_examples=300, deadline=None)
def test_content_hashes_are_the_same_in_sql(connection, definition):
    in_sql = ask(connection, "flywheel_content_hash(CAST(:d AS jsonb))", d=json.dumps(definition))
    assert in_sql == content_hash(definition)


@given(definition=st.dictionaries(TEXT, JSON, min_size=1, max_size=5), change=JSON, which=st.integers(0, 4))
def test_any_changed_part_is_another_content(definition, change, which):
    key = sorted(definition)[which % len(definition)]
    changed = {**definition, key: change}
    # True == 1 in Python and not in JSON: the texts say what is equal.
    same = json.dumps(changed, sort_keys=True) == json.dumps(definition, sort_keys=True)
    assert (content_hash(changed) == content_hash(definition)) == same


def test_a_definition_with_a_float_is_refused_rather_than_hashed_two_ways():
    with pytest.raises(TypeError, match="floating point"):
        content_hash({"confidence": 0.97})


VALUES = st.sampled_from(["firewall", "", " ", None, 5, {}, []]) | st.lists(
    st.sampled_from(["firewall", "audit", "", None, 1]), max_size=2
)
PART = st.one_of(
    st.dictionaries(st.sampled_from(["incident_type", "check_type", "hostname", "platform"]), VALUES, max_size=3),
    st.builds(
        lambda field, operator, value: {"field": field, "operator": operator, "value": value},
        st.sampled_from(["incident_type", "check_type", "hostname"]),
        st.sampled_from(["eq", "in", "ne", "regex"]),
        VALUES,
    ),
    st.sampled_from([None, "firewall", 1, []]),
)


@given(conditions=PART | st.lists(PART, max_size=3))
@settings(max_examples=300, deadline=None)
def test_what_the_ledger_takes_as_conditions_delivery_can_serve(connection, conditions):
    empty = ask(connection, "flywheel_conditions_empty(CAST(:c AS jsonb))", c=json.dumps(conditions))
    try:
        normalise_conditions(conditions, "windows")
    except UnservableRule:
        assert empty
    else:
        assert not empty


@pytest.mark.parametrize(
    "state", ["none", "proposed", "shadow", "canary", "ring", "fleet", "quarantined", "retired", ""]
)
def test_the_states_in_service_are_the_same_in_sql(connection, state):
    assert ask(connection, "flywheel_state_is_enabled(:s)", s=state) is (state in ENABLED_STATES)
