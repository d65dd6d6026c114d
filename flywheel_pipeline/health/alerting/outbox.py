"""The outbox: claim, send, mark.

Belongs here: delivery by Apprise, at least once. Does not belong here: what is told (`record`, `text`).

A claim is committed before the message leaves and taken away after Apprise said true, so that two senders never send
the same row. A sender that is killed leaves its claim behind: its rows are in doubt, wait until the claim has run out,
and are then sent in a message of their own that says so. One kill thus repeats at most what was in flight, once.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa

from flywheel_pipeline.health.alerting.channels import Alerting, Channel
from flywheel_pipeline.health.alerting.text import Message, compose

Clock = Callable[[], dt.datetime]

SEND_SECONDS: Final = 20.0  # for one message; Apprise itself waits 4 s for a connection and 4 s for an answer
CLAIM_SECONDS: Final = 60.0  # longer than a send can take, and the wait after a kill
FIRST_BACKOFF_SECONDS: Final = 15.0
LONGEST_BACKOFF_SECONDS: Final = (
    300.0  # a receiver that is back hears within five minutes, after an outage of any length
)
LARGEST_GROUP: Final = 40  # events in one message
MARK_SECONDS: Final = 30.0  # a database that restarts is back by then
LONGEST_ERROR: Final = 300


def utc_now() -> dt.datetime:
    """Return the present."""
    return dt.datetime.now(dt.UTC)


@dataclass
class Drained:
    """What a drain did: notifications by what became of them, messages sent, and the error of each failing channel."""

    sent: int = 0
    failed: int = 0
    messages: int = 0
    waiting: int = 0
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Claim:
    token: uuid.UUID
    rows: Sequence[Any]
    in_doubt: bool


def backoff_seconds(attempts: int) -> float:
    """Return how long to wait after so many failed attempts: 15 s, doubled each time, at most five minutes."""
    return float(min(FIRST_BACKOFF_SECONDS * 2 ** min(max(attempts - 1, 0), 20), LONGEST_BACKOFF_SECONDS))


def drain(engine: sa.Engine, alerting: Alerting, *, clock: Clock = utc_now, budget_seconds: float = 30.0) -> Drained:
    """Send what is due, one message per channel and group, until nothing is or `budget_seconds` are over.

    A channel that fails is left for this time; its rows wait longer after each failure, and all of them leave at once
    when it answers again.
    """
    done = Drained()
    deadline = time.monotonic() + budget_seconds
    for channel in alerting.channels:
        while time.monotonic() < deadline:
            claim = _claim(engine, channel.alias, clock())
            if claim is None:
                break
            message = compose([row._mapping for row in claim.rows], alerting.ui_url, in_doubt=claim.in_doubt)
            error = send(channel, message)
            _settle(engine, channel.alias, claim, error, clock())
            if error is not None:
                done.failed += len(claim.rows)
                done.errors[channel.alias] = error
                break
            done.sent += len(claim.rows)
            done.messages += 1
    with engine.connect() as connection:
        done.waiting = connection.execute(
            sa.text("SELECT count(*) FROM notifications WHERE sent_at IS NULL")
        ).scalar_one()
    return done


def _claim(engine: sa.Engine, alias: str, now: dt.datetime) -> _Claim | None:
    """Claim the due rows of a channel: first the new ones, then, apart from them, those that a killed sender left."""
    token = uuid.uuid4()
    for in_doubt in (False, True):
        with engine.begin() as connection:
            rows = connection.execute(
                sa.text(
                    """
                    WITH due AS (
                      SELECT notification_id FROM notifications
                      WHERE channel = :channel AND sent_at IS NULL AND not_before <= :now AND next_attempt_at <= :now
                        AND (claimed_until IS NULL OR claimed_until <= :now)
                        AND (in_doubt OR claim IS NOT NULL) = :in_doubt
                      ORDER BY notification_id LIMIT :most
                      FOR UPDATE SKIP LOCKED
                    ), claimed AS (
                      UPDATE notifications AS n
                      SET claim = :token, claimed_until = :until, attempts = n.attempts + 1, in_doubt = :in_doubt
                      FROM due WHERE n.notification_id = due.notification_id
                      RETURNING n.event_id
                    )
                    SELECT e.* FROM claimed JOIN alert_events AS e USING (event_id) ORDER BY e.event_id
                    """
                ),
                {
                    "channel": alias,
                    "now": now,
                    "in_doubt": in_doubt,
                    "most": LARGEST_GROUP,
                    "token": token,
                    "until": now + dt.timedelta(seconds=CLAIM_SECONDS),
                },
            ).all()
        if rows:
            return _Claim(token, rows, in_doubt)
    return None


def _settle(engine: sa.Engine, alias: str, claim: _Claim, error: str | None, now: dt.datetime) -> None:
    """Note what became of a claim; tried again while the database restarts, since the message has left already."""
    deadline = time.monotonic() + MARK_SECONDS
    while True:
        try:
            with engine.begin() as connection:
                if error is None:
                    connection.execute(
                        sa.text(
                            "UPDATE notifications SET sent_at = :now, claim = NULL, claimed_until = NULL, error = NULL "
                            "WHERE claim = :token"
                        ),
                        {"now": now, "token": claim.token},
                    )
                    # It answers again: what waits for a later attempt need not wait.
                    connection.execute(
                        sa.text(
                            "UPDATE notifications SET next_attempt_at = :now "
                            "WHERE channel = :channel AND sent_at IS NULL AND claim IS NULL AND next_attempt_at > :now"
                        ),
                        {"now": now, "channel": alias},
                    )
                else:
                    attempts = {
                        row.attempts
                        for row in connection.execute(
                            sa.text("SELECT attempts FROM notifications WHERE claim = :token"), {"token": claim.token}
                        )
                    }
                    wait = dt.timedelta(seconds=backoff_seconds(max(attempts, default=1)))
                    connection.execute(
                        sa.text(
                            "UPDATE notifications SET claim = NULL, claimed_until = NULL, error = :error, "
                            "next_attempt_at = :next WHERE claim = :token"
                        ),
                        {"error": error, "next": now + wait, "token": claim.token},
                    )
            return
        except sa.exc.OperationalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def send(channel: Channel, message: Message) -> str | None:
    """Send one message now; return None when Apprise said it was delivered, else why not, without credentials."""
    import apprise  # 1 s of CPU: only where there is something to send

    with _apprise_log() as said:
        try:
            service = apprise.Apprise()
            if not service.add(channel.url):
                return "Apprise cannot read the URL of this channel"
            delivered = bool(
                service.notify(
                    body=message.body,
                    title=message.title,
                    notify_type=apprise.NotifyType(message.kind),
                    body_format=apprise.NotifyFormat.TEXT,
                    timeout=SEND_SECONDS,
                )
            )
        except Exception as error:  # noqa: BLE001  # a plug-in's own error; its text may hold the URL
            return f"Apprise failed with {type(error).__name__}"
    if delivered:
        return None
    reason = said[-1] if said else "no reason given"
    return f"not delivered: {channel.redact(' '.join(reason.split()))}"[:LONGEST_ERROR]


class _Ear(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


@contextmanager
def _apprise_log() -> Iterator[list[str]]:
    """Hear what Apprise and its HTTP client log, and keep it from every other log: their debug lines hold URLs."""
    said: list[str] = []
    ear = _Ear(said)
    loggers = [logging.getLogger(name) for name in ("apprise", "urllib3", "requests")]
    before = [(logger.propagate, logger.handlers[:], logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [ear]
        logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        for logger, (propagate, handlers, level) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers
            logger.setLevel(level)
