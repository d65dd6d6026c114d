"""The words of an alert: what fails, what was observed, who is concerned, what to do, where to look.

Belongs here: rendering events as plain text. Does not belong here: sending. Rule ids, messages and reasons come from
agents and people: each passes `neutral` before it stands in a text, since a channel may read it as Markdown or HTML.
"""

from __future__ import annotations

import datetime as dt
import shlex
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

LONGEST_SENTENCE: Final = 700
LONGEST_WORD: Final = 200
FULL: Final = 5  # events told in full in one message; further ones in a line each
REPETITION: Final = "This may be a repetition: the sender was stopped before it could note the delivery."

_SIGNS: Final = str.maketrans(
    {"<": "‹", ">": "›", "`": "ʼ", "@": "＠", "*": "∗"}  # tags, code, mentions, bold
)
_VERBS: Final = {
    ("raised", "fail"): "FAILS",
    ("raised", "error"): "NOT EVALUATED",
    ("changed", "fail"): "FAILS",
    ("changed", "error"): "NOT EVALUATED",
    ("escalated", "fail"): "STILL FAILS",
    ("escalated", "error"): "STILL NOT EVALUATED",
}


@dataclass(frozen=True)
class Message:
    """One message to one channel; `kind` is Apprise's: info, success, warning or failure."""

    title: str
    body: str
    kind: str


def neutral(text: object, longest: int = LONGEST_SENTENCE) -> str:
    """Return a text in which nothing is markup, a mention or a link, on one line and without invisible characters.

    `audit_policy` keeps its underscore: emphasis changes the look, and nothing else.
    """
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in str(text).replace("\n", " "))
    plain = " ".join(plain.split()).translate(_SIGNS)
    plain = plain.replace("](", "] (").replace("://", ":⁄⁄")
    if plain.lower().startswith(("javascript:", "data:")):
        plain = plain.replace(":", "∶", 1)
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def _argument(text: object) -> str:
    """Return an argument of a command line that a person may paste: quoted, and refused where it could not be typed."""
    given = str(text)
    quoted = shlex.quote(given)
    return quoted if given == neutral(given, LONGEST_WORD) else "…"


def compose(events: Sequence[Mapping[str, Any]], ui_url: str, *, in_doubt: bool = False) -> Message:
    """Render events of one channel as one message: the worst first, recoveries last.

    Each event has transition, observed, severity, title, sentence, details, alert_key, occurred_at.
    """
    if not events:
        raise ValueError("a message needs at least one event")
    ranks = {"critical": 0, "warning": 1, "info": 2}
    ordered = sorted(
        events,
        key=lambda e: (e["transition"] == "recovered", ranks[e["severity"]], e["occurred_at"], e["alert_key"]),
    )
    blocks = [_block(event, ui_url) for event in ordered[:FULL]]
    lines = [f"{_verb(e)}: {neutral(e['title'], LONGEST_WORD)} - {neutral(e['sentence'], 160)}" for e in ordered[FULL:]]
    if lines:
        blocks.append("\n".join(["And:", *lines, "All of it: flywheel alerts list --state all"]))
    if in_doubt:
        blocks.insert(0, REPETITION)
    bad = [e for e in ordered if e["transition"] != "recovered"]
    kind = "success" if not bad else "failure" if any(e["severity"] == "critical" for e in bad) else "warning"
    return Message(_title(ordered), "\n\n".join(blocks), kind)


def _title(events: Sequence[Mapping[str, Any]]) -> str:
    if len(events) == 1:
        return f"[Flywheel] {_verb(events[0])}: {neutral(events[0]['title'], LONGEST_WORD)}"
    counts = Counter(str(e["transition"]) for e in events)
    words = [f"{counts[t]} {t}" for t in ("raised", "changed", "escalated", "recovered") if counts[t]]
    return f"[Flywheel] {', '.join(words)}"


def _verb(event: Mapping[str, Any]) -> str:
    if event["transition"] == "recovered":
        return "RECOVERED"
    return f"{_VERBS[event['transition'], event['observed']]} ({event['severity']})"


def _block(event: Mapping[str, Any], ui_url: str) -> str:
    details: Mapping[str, Any] = event["details"]
    lines = [f"{_verb(event)}: {neutral(event['title'], LONGEST_WORD)}"]

    def add(label: str, text: object, longest: int = LONGEST_SENTENCE) -> None:
        if text:
            lines.append(f"{label}: {neutral(text, longest)}")

    recovered = event["transition"] == "recovered"
    add("Statement", details.get("statement"))
    add("Now" if recovered else "Why", event["sentence"])
    if not recovered:
        observed = details.get("observed")
        if observed:
            required = details.get("required")
            add("Observed", f"{observed}; required: {required}" if required else observed)
        offenders = [neutral(o, LONGEST_WORD) for o in details.get("offenders") or ()]
        more = int(details.get("offender_count") or 0) - len(offenders)
        if offenders:
            lines.append("Concerned: " + ", ".join(offenders) + (f" and {more:,} more" if more > 0 else ""))
        add("Open since", details.get("open_since"))
        if details.get("advice"):  # ours: it holds commands in backquotes
            lines.append(f"Do: {str(details['advice']).replace('`', '')}")
    if details.get("explain"):
        lines.append(f"Explain: flywheel explain {_argument(details['explain'])}")
    lines += _links(details, ui_url)
    if not recovered:
        lines.append(f"Acknowledge: flywheel alerts ack {_argument(event['alert_key'])} --actor YOU --reason WHY")
    when: dt.datetime = event["occurred_at"]
    lines.append(f"At: {when.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC")
    return "\n".join(lines)


def _links(details: Mapping[str, Any], ui_url: str) -> list[str]:
    base = ui_url.rstrip("/")

    def quoted(text: object) -> str:
        return urllib.parse.quote(str(text), safe="")

    found = []
    if details.get("run_id"):
        found.append(f"Run: {base}/runs/{quoted(details['run_id'])}")
    if details.get("asset"):
        link = f"{base}/assets/{quoted(details['asset'])}"
        if details.get("check"):
            link += f"?view=checks&checkDetail={quoted(details['check'])}"
        found.append(f"Asset: {link}")
    return found
