"""Alerts: what is raised, by whom it is heard, what it says. Real PostgreSQL, real Apprise, a real receiver."""

from __future__ import annotations

import datetime as dt
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from receiver import Receiver

from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.health.alerting.channels import (
    Alerting,
    AlertRules,
    QuietHours,
    get_alerting,
    parse_channels,
    read_rules,
)
from flywheel_pipeline.health.alerting.outbox import CLAIM_SECONDS, Drained, backoff_seconds, drain, send
from flywheel_pipeline.health.alerting.quality import alerts_are_delivered
from flywheel_pipeline.health.alerting.record import (
    Observation,
    Outcome,
    Recorded,
    acknowledge,
    escalate,
    list_alerts,
    lock_pass,
    record,
)
from flywheel_pipeline.health.alerting.text import Message, compose, neutral
from flywheel_pipeline.health.alerting.watch import look

NOON = dt.datetime(2026, 2, 15, 12, 0, tzinfo=dt.UTC)
KEY = "check:rule_quarantines.no_failing_rules"


def after(**time: float) -> dt.datetime:
    return NOON + dt.timedelta(**time)


def seen(outcome: Outcome, at: dt.datetime, key: str = KEY, **other: Any) -> Observation:
    values: dict[str, Any] = {
        "kind": "check",
        "severity": "warning",
        "title": f"{key.rpartition('.')[2]} on rule_quarantines",
        "sentence": "RB-AUTO-BITLOCKE succeeded in 917 of 3,057 executions (30.0 %).",
        "details": {"statement": "No enabled rule heals fewer than half of what it matches."},
    }
    return Observation(key, outcome=outcome, at=at, **{**values, **other})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as listening:
        yield listening


def alerting(*receivers: Receiver, rules: Mapping[str, Any] | None = None) -> Alerting:
    """Channels called a, b, … for these receivers."""
    checked = AlertRules.model_validate(rules or {})
    words = " ".join(f"{chr(97 + n)}={r.url}" for n, r in enumerate(receivers))
    return Alerting(parse_channels(words, checked.channels), checked, "http://ui.example:3000/")


def note(engine: sa.Engine, channels: Alerting, *observations: Observation, now: dt.datetime | None = None) -> Recorded:
    with engine.begin() as connection:
        assert lock_pass(connection)
        return record(connection, observations, channels, now or max(o.at for o in observations))


def rows(engine: sa.Engine, query: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


# -- the state machine ---------------------------------------------------------------------------------------------


def test_a_flip_is_one_alert_and_one_recovery_however_often_it_is_seen(engine: sa.Engine, receiver: Receiver) -> None:
    channels = alerting(receiver)
    failing = [seen("fail", after(seconds=n)) for n in range(3)]
    assert note(engine, channels, seen("pass", after(seconds=-1))) == Recorded()
    for _ in range(3):  # three watchers that see the same
        note(engine, channels, *failing)
    assert drain(engine, channels, clock=lambda: after(seconds=5)).sent == 1
    for _ in range(3):
        note(engine, channels, *failing, seen("pass", after(seconds=60)))
    drain(engine, channels, clock=lambda: after(seconds=65))
    assert rows(engine, "SELECT transition, observed FROM alert_events ORDER BY event_id") == [
        ("raised", "fail"),
        ("recovered", "pass"),
    ]
    assert [m["title"] for m in receiver.messages] == [
        "[Flywheel] FAILS (warning): no_failing_rules on rule_quarantines",
        "[Flywheel] RECOVERED: no_failing_rules on rule_quarantines",
    ]
    assert [m["type"] for m in receiver.messages] == ["warning", "success"]


def test_a_failure_and_its_recovery_between_two_looks_are_both_told_and_a_late_observer_changes_nothing(
    engine: sa.Engine, receiver: Receiver
) -> None:
    channels = alerting(receiver)
    note(engine, channels, seen("pass", after(seconds=2)), seen("fail", after(seconds=1)))
    assert note(engine, channels, seen("fail", after(seconds=1.5))) == Recorded()
    drain(engine, channels, clock=lambda: after(seconds=3))
    (message,) = receiver.messages
    assert message["title"] == "[Flywheel] 1 raised, 1 recovered"
    assert message["message"].index("FAILS (warning)") < message["message"].index("RECOVERED")
    assert list_alerts_of(engine)[0]["state"] == "recovered"


def list_alerts_of(engine: sa.Engine) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return list_alerts(connection, None)


def test_a_check_that_cannot_be_evaluated_any_more_is_told_apart_from_its_failure(
    engine: sa.Engine, receiver: Receiver
) -> None:
    channels = alerting(receiver)
    note(engine, channels, seen("fail", NOON))
    changed = note(engine, channels, seen("error", after(seconds=9), severity="critical", sentence="Step crashed."))
    assert changed == Recorded(changed=1)
    assert note(engine, channels, seen("error", after(seconds=19), severity="critical")) == Recorded()
    drain(engine, channels, clock=lambda: after(seconds=20))
    assert "NOT EVALUATED (critical): no_failing_rules" in receiver.text


def test_two_watchers_at_once_record_a_flip_once(engine: sa.Engine, receiver: Receiver) -> None:
    channels = alerting(receiver)
    start = threading.Barrier(4)

    def watch() -> None:
        start.wait()
        for _ in range(5):
            look(engine, lambda _c: [seen("fail", NOON)], channels, clock=lambda: after(seconds=1))

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows(engine, "SELECT transition FROM alert_events") == [("raised",)]
    assert len(receiver.messages) == 1


def test_the_lock_of_the_pass_lets_one_watcher_look(engine: sa.Engine, receiver: Receiver) -> None:
    with engine.begin() as first:
        assert lock_pass(first)
        done = look(engine, lambda _c: pytest.fail("looked"), alerting(receiver))
        assert done.recorded is None
        assert "another watcher is looking" in done.sentence


def test_an_event_is_never_changed_and_nothing_is_deleted(engine: sa.Engine, receiver: Receiver) -> None:
    note(engine, alerting(receiver), seen("fail", NOON))
    for statement in (
        "UPDATE alert_events SET sentence = 'fine'",
        "DELETE FROM alert_events",
        "DELETE FROM alerts",
        "DELETE FROM notifications",
    ):
        with pytest.raises(sa.exc.DBAPIError, match="kept for auditors"), engine.begin() as connection:
            connection.exec_driver_sql(statement)


# -- who hears what and when ---------------------------------------------------------------------------------------


def test_many_flips_in_one_pass_are_one_message_a_channel_with_the_critical_first(engine: sa.Engine) -> None:
    with Receiver() as team, Receiver() as oncall:
        channels = alerting(team, oncall, rules={"channels": {"b": {"min_severity": "critical"}}})
        many = [seen("fail", after(milliseconds=n), f"check:x.warns_{n:02}") for n in range(30)]
        note(engine, channels, *many, seen("fail", after(seconds=1), "check:x.breaks", severity="critical"))
        done = drain(engine, channels, clock=lambda: after(seconds=2))
        assert (done.sent, done.messages, done.waiting) == (32, 2, 0)
        (message,) = team.messages
        assert message["title"] == "[Flywheel] 31 raised"
        assert message["message"].startswith("FAILS (critical): breaks")
        assert all(f"warns_{n:02}" in message["message"] for n in range(30))
        assert len(message["message"]) < 12_000
        assert [m["title"] for m in oncall.messages] == ["[Flywheel] FAILS (critical): breaks on rule_quarantines"]
        # Who did not hear of it does not hear of its end.
        note(engine, channels, *[seen("pass", after(seconds=9), f"check:x.warns_{n:02}") for n in range(30)])
        drain(engine, channels, clock=lambda: after(seconds=9))
        assert (len(team.messages), len(oncall.messages)) == (2, 1)


QUIET = {"quiet_hours": {"from": "22:00", "to": "07:00", "timezone": "Europe/Berlin"}}


def test_quiet_hours_hold_what_is_not_critical_until_they_end(engine: sa.Engine, receiver: Receiver) -> None:
    channels = alerting(receiver, rules=QUIET)
    night = dt.datetime(2026, 2, 15, 23, 0, tzinfo=dt.UTC)  # midnight in Berlin
    note(engine, channels, seen("fail", night), seen("fail", night, "check:x.breaks", severity="critical"))
    assert drain(engine, channels, clock=lambda: night).sent == 1
    assert "breaks" in receiver.text
    assert drain(engine, channels, clock=lambda: night + dt.timedelta(hours=6, minutes=59)).sent == 0
    assert drain(engine, channels, clock=lambda: night + dt.timedelta(hours=7)).sent == 1
    with engine.connect() as connection:
        assert alerts_are_delivered(connection).passed


@pytest.mark.parametrize(
    ("start", "end", "timezone", "now", "until"),
    [
        ("22:00", "07:00", "UTC", "2026-02-15T21:59:59Z", None),
        ("22:00", "07:00", "UTC", "2026-02-15T22:00:00Z", "2026-02-16T07:00:00Z"),
        ("22:00", "07:00", "UTC", "2026-02-16T06:59:59Z", "2026-02-16T07:00:00Z"),
        ("22:00", "07:00", "UTC", "2026-02-16T07:00:00Z", None),
        ("12:00", "13:00", "UTC", "2026-02-16T12:30:00Z", "2026-02-16T13:00:00Z"),
        ("22:00", "07:00", "America/New_York", "2026-02-16T04:00:00Z", "2026-02-16T12:00:00Z"),
        # The night in which clocks go forward is an hour shorter.
        ("22:00", "07:00", "Europe/Berlin", "2026-03-28T22:00:00Z", "2026-03-29T05:00:00Z"),
    ],
)
def test_quiet_hours_are_of_the_wall_clock(start: str, end: str, timezone: str, now: str, until: str | None) -> None:
    quiet = QuietHours.model_validate({"from": start, "to": end, "timezone": timezone})
    expected = None if until is None else dt.datetime.fromisoformat(until)
    assert quiet.end_after(dt.datetime.fromisoformat(now)) == expected


def test_what_nobody_acknowledged_in_time_goes_to_the_escalation_channel_once_and_its_recovery_too(
    engine: sa.Engine,
) -> None:
    with Receiver() as team, Receiver() as boss:
        channels = alerting(team, boss, rules={"channels": {"b": {"escalation": True}}, "escalate_after_minutes": 30})
        note(engine, channels, seen("fail", NOON), seen("fail", NOON, "check:x.looked_after"))
        with engine.begin() as connection:
            acknowledge(connection, "check:x.looked_after", actor="ana", reason="on it", now=after(minutes=5))
            with pytest.raises(UsageError, match="acknowledged by ana already"):
                acknowledge(connection, "check:x.looked_after", actor="bo", reason="me too", now=after(minutes=6))

        def pass_at(now: dt.datetime) -> int:
            with engine.begin() as connection:
                escalated = escalate(connection, channels, now)
            drain(engine, channels, clock=lambda: now)
            return escalated

        assert [pass_at(after(minutes=m)) for m in (29, 30, 31, 300)] == [0, 1, 0, 0]
        (message,) = boss.messages
        assert message["title"] == "[Flywheel] STILL FAILS (warning): no_failing_rules on rule_quarantines"
        assert "Open since: 2026-02-15T12:00" in message["message"]
        # An acknowledgement silences the escalation and not the recovery.
        note(engine, channels, seen("pass", after(hours=6)), seen("pass", after(hours=6), "check:x.looked_after"))
        pass_at(after(hours=6))
        assert [m["title"] for m in team.messages] == ["[Flywheel] 2 raised", "[Flywheel] 2 recovered"]
        assert boss.messages[-1]["title"] == "[Flywheel] RECOVERED: no_failing_rules on rule_quarantines"
        # The next failure is a new one: nobody has acknowledged it.
        note(engine, channels, seen("fail", after(hours=7), "check:x.looked_after"))
        assert pass_at(after(hours=8)) == 1


@pytest.mark.parametrize(
    ("key", "actor", "reason", "words"),
    [
        (KEY, " ", "why", "needs an actor and a reason"),
        (KEY, "ana", "", "needs an actor and a reason"),
        ("check:x.nobody", "ana", "why", "No alert check:x.nobody is open"),
        ("check:x.over", "ana", "why", "it is recovered"),
    ],
)
def test_an_acknowledgement_is_signed_and_of_an_open_alert(
    engine: sa.Engine, receiver: Receiver, key: str, actor: str, reason: str, words: str
) -> None:
    over = [seen("fail", NOON, "check:x.over"), seen("pass", after(seconds=1), "check:x.over")]
    note(engine, alerting(receiver), seen("fail", NOON), *over)
    with pytest.raises(UsageError, match=words), engine.begin() as connection:
        acknowledge(connection, key, actor=actor, reason=reason, now=after(seconds=2))
    assert rows(engine, "SELECT 1 FROM alert_events WHERE transition = 'acknowledged'") == []


# -- delivery ------------------------------------------------------------------------------------------------------


def test_the_backoff_doubles_up_to_five_minutes() -> None:
    assert [backoff_seconds(n) for n in (1, 2, 3, 4, 5, 6, 1000)] == [15, 30, 60, 120, 240, 300, 300]


def test_a_receiver_down_for_an_hour_gets_everything_once_it_is_back_in_one_message(engine: sa.Engine) -> None:
    first = Receiver()
    channels, port = alerting(first), first.port
    first.close()
    clock = NOON
    tries = 0
    for minute in range(60):
        clock = after(minutes=minute)
        note(engine, channels, seen("fail", clock, f"check:x.flip_{minute:02}"))
        for second in (0, 10, 20, 30, 40, 50):
            done = drain(engine, channels, clock=lambda at=clock, s=second: at + dt.timedelta(seconds=s))
            assert done.sent == 0
            tries += done.failed > 0
    # Each new alert is tried at once, which also asks whether the receiver is back; old ones wait longer and longer.
    assert 60 <= tries < 360
    ((oldest, error),) = rows(engine, "SELECT attempts, error FROM notifications ORDER BY notification_id LIMIT 1")
    assert oldest < 25
    assert error.startswith("not delivered: ")
    with engine.connect() as connection:
        late = alerts_are_delivered(connection)
    assert (late.passed, late.offenders) == (False, 60)
    assert "60 alert notifications were not delivered; the channel a has waited" in late.sentence
    with Receiver(port=port) as back:
        for second in range(0, 310, 10):
            drain(engine, channels, clock=lambda s=second: after(hours=1, seconds=s))
        assert rows(engine, "SELECT count(*) FROM notifications WHERE sent_at IS NULL") == [(0,)]
        assert [back.text.count(f"FAILS (warning): flip_{m:02} on") for m in range(60)] == [1] * 60
        assert len(back.messages) <= 4


def test_a_channel_that_fails_does_not_hold_up_the_others(engine: sa.Engine) -> None:
    with Receiver() as broken, Receiver() as sound:
        broken.status = 500
        channels = alerting(broken, sound)
        note(engine, channels, seen("fail", NOON))
        done = drain(engine, channels, clock=lambda: NOON)
        assert (done.sent, done.failed, done.waiting) == (1, 1, 1)
        assert "500" in done.errors["a"]
        assert len(sound.messages) == 1


def test_what_a_killed_sender_left_is_sent_apart_after_its_claim_ran_out(engine: sa.Engine, receiver: Receiver) -> None:
    channels = alerting(receiver)
    note(engine, channels, seen("fail", NOON, "check:x.in_flight"))
    with engine.begin() as connection:  # as a sender killed in its send leaves it
        connection.exec_driver_sql(
            "UPDATE notifications SET claim = gen_random_uuid(), attempts = 1, claimed_until = %s",
            (after(seconds=CLAIM_SECONDS),),
        )
    note(engine, channels, seen("fail", after(seconds=1), "check:x.new"))
    assert drain(engine, channels, clock=lambda: after(seconds=2)) == Drained(sent=1, messages=1, waiting=1)
    assert drain(engine, channels, clock=lambda: after(seconds=CLAIM_SECONDS)).sent == 1
    assert "in_flight" not in receiver.bodies[0]
    assert receiver.bodies[1].startswith("This may be a repetition")


# -- secrets -------------------------------------------------------------------------------------------------------


def test_no_credential_reaches_a_table_a_log_an_error_or_a_repr(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with Receiver(token="Tok3n-very-secret") as receiver:  # noqa: S106
        for status in (401, 500, 302):
            receiver.status = status
            channels = alerting(receiver)
            told.append(str(send(channels.channels[0], Message("t", "b", "info"))))
    note(engine, channels, seen("fail", NOON))
    told.append(json.dumps(drain(engine, channels, clock=lambda: NOON).errors))  # refused: the receiver is gone
    unknown = parse_channels("nosuchscheme://Tok3n-very-secret/x", {})
    told.append(str(send(unknown[0], Message("t", "b", "info"))))
    slack = parse_channels("slack://Tok3n-very/secret/Tok3n-very-secret", {})
    told.append(str(send(slack[0], Message("t", "b", "info"))))
    told += [repr(channels), str(channels), repr(unknown)]
    told += [repr(Settings(home=tmp_path, alert_urls=receiver.url))]  # type: ignore[arg-type]
    for words in ("team=Tok3n-very-secret", f"a={receiver.url} a={receiver.url}"):
        with pytest.raises(UsageError) as refused:
            parse_channels(words, {})
        told.append(f"{refused.value.message} {refused.value.hint}")
    dump = rows(
        engine,
        "SELECT (SELECT json_agg(t)::text FROM alerts t), (SELECT json_agg(t)::text FROM alert_events t), "
        "(SELECT json_agg(t)::text FROM notifications t)",
    )
    everything = "\n".join([*told, caplog.text, str(dump)])
    assert "not delivered" in everything
    assert "Tok3n" not in everything
    assert "very-secret" not in everything
    assert str(receiver.port) not in "\n".join(told)
    assert logging.getLogger("apprise").propagate


# -- settings ------------------------------------------------------------------------------------------------------


def test_channels_are_named_by_alias_or_scheme() -> None:
    found = parse_channels("team=json://h/1  JSON://h/2\njson://h/3\tmailto://u:p@h?to=a,b=c", {})
    assert [c.alias for c in found] == ["team", "json", "json-2", "mailto"]
    assert found[3].url == "mailto://u:p@h?to=a,b=c"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("channels: {nobody: {}}", "does not have: nobody"),
        ("channels: {a: {min_severity: loud}}", "channels.a.min_severity"),
        ("quiet: 22-7", "quiet"),
        ("quiet_hours: {from: '22:00', to: '07:00', timezone: Mars/Base}", "no time zone is called 'Mars/Base'"),
        ("escalate_after_minutes: 0", "escalate_after_minutes"),
        ("[", "it is not YAML"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "alerts.yaml"
    file.write_text(rules)
    settings = Settings(home=tmp_path, alert_urls="a=json://localhost", alert_rules=file)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as refused:
        get_alerting(settings)
    assert words in refused.value.message


def test_each_value_of_the_rules_has_a_default_and_counts(tmp_path: Path) -> None:
    file = tmp_path / "alerts.yaml"
    file.write_text(
        "channels: {a: {min_severity: critical}, b: {escalation: true}}\n"
        "quiet_hours: {from: '22:00', to: '07:00'}\nescalate_after_minutes: 5\nstuck_after_days: 3\n"
    )
    found = get_alerting(Settings(home=tmp_path, alert_urls="a=json://h b=json://h", alert_rules=file))  # type: ignore[arg-type]
    assert (found.hearing("warning"), found.hearing("critical"), found.escalating()) == ((), ("a",), ("b",))
    assert read_rules(None) == AlertRules()
    assert Alerting().escalating() == ()


# -- words ---------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> <!channel> @everyone [free](http://evil.example) `rm -rf` **x** \x1b[31m\u202egnp.exe\nFAKE: ok"


def test_hostile_words_are_neither_markup_nor_mention_nor_link_nor_a_line_of_their_own() -> None:
    text = neutral(HOSTILE)
    for sign in ("<", ">", "@", "](", "://", "`", "*", "\x1b", "\u202e", "\n"):
        assert sign not in text
    assert "‹script›alert(1)‹/script›" in text
    assert neutral("audit_policy~RB-WIN-SEC-002~windows") == "audit_policy~RB-WIN-SEC-002~windows"
    assert len(neutral("x" * 5000)) == 700


def test_an_alert_says_what_fails_who_is_concerned_why_and_what_to_do() -> None:
    details = {
        "statement": "No enabled rule heals fewer than half of what it matches.",
        "observed": "4 rules below 50%",
        "required": "none",
        "offenders": ["RB-AUTO-BITLOCKE", HOSTILE, "L1-SUID-001"],
        "offender_count": 4,
        "explain": "RB-AUTO-BITLOCKE",
        "advice": "correct it and `flywheel readmit`",
        "run_id": "0a1b",
        "asset": "rule_quarantines",
        "check": "no_failing_rules",
    }
    event = {
        "transition": "raised",
        "observed": "fail",
        "severity": "warning",
        "title": "no_failing_rules on rule_quarantines",
        "sentence": HOSTILE,
        "details": details,
        "alert_key": KEY,
        "occurred_at": NOON,
    }
    body = compose([event], "http://ui.example:3000/").body
    lines = body.splitlines()
    assert lines[0] == "FAILS (warning): no_failing_rules on rule_quarantines"
    assert "Observed: 4 rules below 50%; required: none" in lines
    assert "Explain: flywheel explain RB-AUTO-BITLOCKE" in lines
    assert "Do: correct it and flywheel readmit" in lines
    assert "Run: http://ui.example:3000/runs/0a1b" in lines
    assert "Asset: http://ui.example:3000/assets/rule_quarantines?view=checks&checkDetail=no_failing_rules" in lines
    assert f"Acknowledge: flywheel alerts ack {KEY} --actor YOU --reason WHY" in lines
    assert body.count("://") == 2
    assert not any(line.startswith("FAKE") for line in lines)
    assert next(line for line in lines if line.startswith("Concerned: ")).endswith(", L1-SUID-001 and 1 more")


@pytest.mark.parametrize(
    ("rule", "argument"),
    [("RB-AUTO-X", "RB-AUTO-X"), ("x; rm -rf /", "'x; rm -rf /'"), ("$(reboot)", "'$(reboot)'"), ("a\nb", "…")],
)
def test_a_command_to_paste_runs_nothing_but_flywheel(rule: str, argument: str) -> None:
    event = {
        "transition": "raised", "observed": "fail", "severity": "info", "title": "t", "sentence": "s",
        "details": {"explain": rule}, "alert_key": "quarantine:x", "occurred_at": NOON,
    }  # fmt: skip
    assert f"Explain: flywheel explain {argument}\n" in compose([event], "http://ui").body
