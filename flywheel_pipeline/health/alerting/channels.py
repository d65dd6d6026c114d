"""Channels and the rules of who hears what and when.

Belongs here: reading FLYWHEEL_ALERT_URLS (secrets) and the file FLYWHEEL_ALERT_RULES (no secrets). Does not belong
here: sending. A channel is named by its alias everywhere; its URL stays in this process's memory.
"""

from __future__ import annotations

import datetime as dt
import re
import urllib.parse
import zoneinfo
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.errors import UsageError

Severity = Literal["info", "warning", "critical"]
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)
REDACTED: Final = "‹redacted›"

_ALIASED = re.compile(r"([a-z][a-z0-9_-]{0,62})=(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# A word of a URL that is this short cannot be a credential, and replacing it would spoil any sentence.
_SHORTEST_SECRET = 3


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuietHours(_Rule):
    """From `start` to `end`, local time of `timezone`, only critical alerts are sent; the rest waits for the end."""

    start: dt.time = Field(alias="from")
    end: dt.time = Field(alias="to")
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            zoneinfo.ZoneInfo(name)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"no time zone is called {name!r}") from error
        return name

    def end_after(self, now: dt.datetime) -> dt.datetime | None:
        """Return when the quiet hours that `now` lies in end; None outside of them."""
        local = now.astimezone(zoneinfo.ZoneInfo(self.timezone))
        for day in (local.date() - dt.timedelta(days=1), local.date()):
            begin = dt.datetime.combine(day, self.start, local.tzinfo)
            over = dt.datetime.combine(
                day + dt.timedelta(days=1) if self.end <= self.start else day, self.end, local.tzinfo
            )
            # Compared in UTC: on the day a clock changes, local times of one zone compare wrongly.
            if begin.astimezone(dt.UTC) <= now < over.astimezone(dt.UTC):
                return over.astimezone(dt.UTC)
        return None


class ChannelRule(_Rule):
    """What one channel hears: alerts of `min_severity` and above; `escalation`: only what nobody acknowledged in time."""

    min_severity: Severity = "info"
    escalation: bool = False


class AlertRules(_Rule):
    """The file FLYWHEEL_ALERT_RULES; every value has a default."""

    channels: Mapping[str, ChannelRule] = Field(default_factory=dict)
    quiet_hours: QuietHours | None = None
    escalate_after_minutes: Annotated[float, Field(gt=0)] = 60.0
    stuck_after_days: Annotated[float, Field(gt=0)] = 14.0
    daemon_stale_after_seconds: Annotated[float, Field(ge=60)] = 120.0  # it beats every 30 s


@dataclass(frozen=True)
class Channel:
    """One receiver. `url` holds its credentials and shows in no repr."""

    alias: str
    url: str = field(repr=False)
    rule: ChannelRule = field(default_factory=ChannelRule)

    def redact(self, text: str) -> str:
        """Replace in a text every part of this channel's URL that may be a credential, host and path included."""
        words = {self.url}
        for part in (self.url, urllib.parse.unquote(self.url), urllib.parse.unquote_plus(self.url)):
            rest = part.partition("://")[2]
            words |= {rest, *re.split(r"[/:@?&=,#]+", rest)}
        for word in sorted((w for w in words if len(w) >= _SHORTEST_SECRET), key=len, reverse=True):
            text = text.replace(word, REDACTED)
        return text


@dataclass(frozen=True)
class Alerting:
    """All that decides who hears what and when, and where the links lead."""

    channels: tuple[Channel, ...] = ()
    rules: AlertRules = field(default_factory=AlertRules)
    ui_url: str = "http://127.0.0.1:3000"

    def channel(self, alias: str) -> Channel | None:
        """Return the channel of this alias, or None."""
        return next((c for c in self.channels if c.alias == alias), None)

    def hearing(self, severity: Severity) -> tuple[str, ...]:
        """Return the aliases that hear a new alert of this severity."""
        return tuple(
            c.alias
            for c in self.channels
            if not c.rule.escalation and SEVERITIES.index(severity) >= SEVERITIES.index(c.rule.min_severity)
        )

    def escalating(self) -> tuple[str, ...]:
        """Return the aliases that hear of what nobody acknowledged: the escalation channels, or all where there is none."""
        return tuple(c.alias for c in self.channels if c.rule.escalation) or tuple(c.alias for c in self.channels)

    def not_before(self, severity: Severity, now: dt.datetime) -> dt.datetime:
        """Return when a notification may leave: now, or the end of the quiet hours unless it is critical."""
        quiet = self.rules.quiet_hours
        return now if quiet is None or severity == "critical" else quiet.end_after(now) or now


def parse_channels(text: str, rules: Mapping[str, ChannelRule]) -> tuple[Channel, ...]:
    """Read `[alias=]URL` words separated by white space.

    Without an alias a channel is called by the scheme of its URL (`slack`, `mailto`), a second one `slack-2`.

    Raises:
        UsageError: a word that is no URL, an alias given twice, or a rule for a channel that is not there. The
            message names a position, never the word.
    """
    found: list[Channel] = []
    for number, word in enumerate(text.split(), start=1):
        given = _ALIASED.match(word)
        url = word[given.end() :] if given else word
        scheme = _SCHEME.match(url)
        if scheme is None:
            raise UsageError(
                f"Word {number} of FLYWHEEL_ALERT_URLS is not a URL.",
                hint="Give Apprise URLs separated by spaces, each as URL or alias=URL; escape a space as %20.",
            )
        alias = given[1].lower() if given else scheme[1].lower()
        taken = {c.alias for c in found}
        if alias in taken:
            if given:
                raise UsageError(f"FLYWHEEL_ALERT_URLS names two channels {alias}.", hint="Give each its own alias.")
            alias = next(name for n in range(2, number + 2) if (name := f"{alias}-{n}") not in taken)
        found.append(Channel(alias, url, rules.get(alias, ChannelRule())))
    if unknown := sorted(set(rules) - {c.alias for c in found}):
        raise UsageError(
            f"FLYWHEEL_ALERT_RULES speaks of channels that FLYWHEEL_ALERT_URLS does not have: {', '.join(unknown)}.",
            hint="Channels there: " + (", ".join(c.alias for c in found) or "none") + ".",
        )
    return tuple(found)


def read_rules(file: Path | None) -> AlertRules:
    """Read the rules file; None gives the defaults.

    Raises:
        UsageError: it cannot be read, or a value in it makes no sense.
    """
    if file is None:
        return AlertRules()
    try:
        content: Any = yaml.safe_load(file.read_text("utf-8"))
        return AlertRules.model_validate({} if content is None else content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise UsageError(
            f"The alert rules {file} cannot be read: {reason}.", hint="Correct FLYWHEEL_ALERT_RULES."
        ) from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"The alert rules {file} are refused at {where}: {first['msg']}.") from error


def get_alerting(settings: Settings | None = None) -> Alerting:
    """Read settings and rules now.

    Raises:
        UsageError: as `parse_channels` and `read_rules`.
    """
    settings = settings or get_settings()
    rules = read_rules(settings.alert_rules)
    urls = settings.alert_urls.get_secret_value() if settings.alert_urls is not None else ""
    channels = parse_channels(urls, rules.channels) if urls or rules.channels else ()
    return Alerting(channels, rules, settings.ui_url or f"http://{settings.ui_host}:{settings.ui_port}")


def require_channels(alerting: Alerting, aliases: Iterable[str] = ()) -> tuple[Channel, ...]:
    """Return the channels of these aliases, or all.

    Raises:
        UsageError: no channel is configured, or an alias is unknown.
    """
    if not alerting.channels:
        raise UsageError(
            "No alert channel is configured.",
            hint="Set FLYWHEEL_ALERT_URLS to Apprise URLs, such as team=slack://… oncall=mailto://…",
        )
    known = ", ".join(c.alias for c in alerting.channels)
    chosen = []
    for alias in aliases:
        channel = alerting.channel(alias)
        if channel is None:
            raise UsageError("There is no such channel.", hint=f"Channels: {known}.")
        chosen.append(channel)
    return tuple(chosen) or alerting.channels
