"""Why a rule fails: error templates, the waterfall from its raw to its adjusted rate, and the plot of it.

Belongs here: pure functions on messages and counts. Does not belong here: reading them (`failing_rules`) and
alerting. A template carries no host name, address, account or path, so it may leave its site.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flywheel_pipeline.sql_models.metadata import png_uri

# The order in which a class is taken out of the rate (gate.md section 1): first the rows that say nothing
# about the rule, last those it did not finish itself. failure and success stay and make the adjusted rate.
EXCLUDED_CLASSES: tuple[str, ...] = (
    "synthetic",
    "agent_unsupported",
    "not_applicable",
    "unreachable",
    "escalated",
    "suppressed",
    "unverified",
)
RATED_CLASSES: tuple[str, ...] = ("failure", "success")

ADVICE: Mapping[str, str] = {
    "synthetic": "these are test rows and count nowhere",
    "agent_unsupported": "update the agents there, or withhold the rule from them",
    "not_applicable": "narrow the rule's conditions to the hosts that can have this control",
    "unreachable": "restore access to these hosts: network, WinRM or SSH, credentials",
    "escalated": "the runbook hands these over to a person: use another one or route them to L3 at once",
    "suppressed": "find what reverts the fix on these hosts, such as a group policy",
    "failure": "the runbook itself does not heal these: correct or replace it, or quarantine the rule",
    "unverified": "let the agent verify the fix and report it",
    "success": "reported as not successful although its class is success: check the agent's report",
}

NO_MESSAGE = "(no message)"
MAX_TEMPLATE_CHARACTERS = 200
MAX_PLOT_BYTES = 30 * 1024

# Kept words stand aside as one private-use character each, which no mask matches.
_FIRST_KEPT = 0xE000
_KEPT = re.compile("[\ue000-\uf8ff]")

# Words that carry digits, tell causes apart and name no host or person.
VERBATIM = re.compile(
    r"\b(?:RB|L1|L2|LIN|MAC|AUTO|ESC|UNASSIGNED)-[A-Z][A-Z0-9_-]*\b"  # rule and runbook ids
    r"|\b(?i:http[a-z /]{0,24}(?:error|status|code):? ?[1-5][0-9]{2})\b"  # 401 is not 500
    r"|\b[A-Za-z]+(?:Status|State|Code)=[0-9]{1,3}\b"  # ProtectionStatus=0
    r"|\b(?:WinRM|SMB|TLS|SSL|TPM|IPv)[ v]?[0-9](?:\.[0-9])?\b"
    r"|\b(?:UTF|AES|SHA|RSA|ISO|CVE|KB)-?[0-9][0-9-]*\b"
)

_NAME = r"(?!<)(?=[\w.-]*\w)[\w.-]*\w(?::[0-9]{1,5})?"


def _mask_ipv6(match: re.Match[str]) -> str:
    """`<ip>` for what is an IPv6 address, dots and colons of the sentence around it kept; else what it was."""
    address = match[1].rstrip(".")
    for candidate in (address, address.removesuffix(":")):
        try:
            ipaddress.IPv6Address(candidate)
        except ValueError:
            continue
        return "<ip>" + match[1][len(candidate) :]
    return match[0]


# In this order: the longer and more specific forms first.
_MASKS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.I), "<url>"),
    (re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\b"), "<account>"),
    (re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.I), "<id>"),
    (re.compile(r"(?<![\w:.])(?=[^:\s]*:[^:\s]*:)([0-9a-f:.]{3,45})(?:%\w+)?(?![\w:])", re.I), _mask_ipv6),
    (re.compile(r"\bS-1-[0-9]+(?:-[0-9]+)+\b"), "<account>"),
    (re.compile(r"\b(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b", re.I), "<mac>"),
    (
        re.compile(
            r"\b[0-9]{4}-[0-9]{2}-[0-9]{2}"
            r"(?:[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?(?:Z|[+-][0-9]{2}:?[0-9]{2})?)?"
            r"|\b[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?\b"
        ),
        "<time>",
    ),
    (
        re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?:/[0-9]{1,2})?(?::[0-9]{1,5})?(?!\w|\.\w)"),
        "<ip>",
    ),
    (re.compile(r"(?<!\w)(?:[a-z]:|\\)\\[^\s\"'<>|:]+", re.I), "<path>"),
    (re.compile(r"(?<![\w/<])/(?:[\w.@+-]+/)+[\w.@+-]*"), "<path>"),
    (re.compile(r"\b[A-Z][A-Za-z0-9_-]*\\[\w.$-]+"), "<account>"),
    (
        re.compile(
            r"\b(user(?:name)?|account|login)(?:\s*[=:]\s*[\"']?|\s+[\"'])(?!<)[\w.$-]+[\"']?"
            r"|\b((?:for|as|by) user)\s+(?!<)[\w.$-]+",
            re.I,
        ),
        "user <account>",
    ),
    # People in plain words: a title before a name, and whose machine it is.
    (re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.? [A-Z][\w'’-]*"), "<account>"),
    (
        re.compile(
            r"\b[A-Z][\w-]*['’]s(?= (?:laptop|desktop|pc|computer|workstation|mac|macbook|imac|tablet)\b)", re.I
        ),
        "<account>",
    ),
    (re.compile(rf"(?:(?<=target not found: )|(?<=pin check for )|(?<=lookup )){_NAME}", re.I), "<host>"),
    (re.compile(r"(?<=\bhost )(?=[\w.-]*[0-9.]\w)[\w.-]*\w(?::[0-9]{1,5})?", re.I), "<host>"),
    (
        re.compile(
            r"\b(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+"
            r"(?:local|lan|internal|corp|home|localdomain|com|net|org|io|example|test)\b(?!\.\w)(?::[0-9]{1,5})?",
            re.I,
        ),
        "<host>",
    ),
    # NetBIOS style: WS-01, DESKTOP-A1B2C3, NVDC01.
    (re.compile(r"\b(?:[A-Z]{2,15}-(?=[A-Z0-9-]*[0-9])[A-Z0-9-]{1,15}|[A-Z]{2,13}[0-9]{2,3})\b"), "<host>"),
    (re.compile(r"\b0x[0-9a-f]+\b", re.I), "<hex>"),
    (re.compile(r"\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{8,}\b", re.I), "<hex>"),
    (re.compile(r"(?<![\w<])[0-9]+(?:[.,][0-9]+)*(?=(?:ms|s|m|h|d|kb|mb|gb)?\b)", re.I), "<n>"),
)
_LISTED = re.compile(r"(?<=: )\[[^\[\]…]+\]")  # "Available: [LIN-SSH-001 …]"
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class ErrorTemplate:
    """Failures whose messages differ only in what was masked.

    Attributes:
        template: the masked message.
        outcome_class: the class of these executions; the same words may fall into two classes.
        count: executions; hosts: distinct hosts they came from; share: fraction of all failures given.
    """

    template: str
    outcome_class: str
    count: int
    hosts: int
    share: float


@dataclass(frozen=True)
class WaterfallStep:
    """The rate after a class was taken out of it.

    Attributes:
        label: `all executions`, or the class that was taken out.
        removed: executions taken out by this step; removed_successes: those of them reported as success.
        executions: executions that remain; successes: those of them reported as success.
        rate: fraction successes / executions; None over nothing.
    """

    label: str
    removed: int
    removed_successes: int
    executions: int
    successes: int
    rate: float | None


def mask(message: str | None, hosts: Iterable[str] = ()) -> str:
    """Reduce an error message to its template.

    The first line that says something, with addresses, hosts, accounts, paths, times, hex, ids and numbers
    masked; runbook and rule ids, HTTP status codes and protocol names stay. Masking a template changes
    nothing.

    Args:
        message: as reported; None or blank gives `(no message)`.
        hosts: host names known to occur, masked wherever they stand as a word, with or without their domain.

    Returns:
        At most 200 characters.
    """
    return _mask(message, known_hosts(hosts))


def known_hosts(hosts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for host names as words, in any case; None where there are none."""
    names = sorted({h.strip() for h in hosts if h.strip()}, key=lambda h: (-len(h), h))
    if not names:
        return None
    words = "|".join(re.escape(name) for name in names)
    return re.compile(rf"(?<![\w<-])(?:{words})(?:\.\w[\w.-]*)?(?![\w-])(?<![.-])", re.IGNORECASE)


def _mask(message: str | None, hosts: re.Pattern[str] | None) -> str:
    plain = _KEPT.sub(" ", message or "")
    line = next((part for part in plain.splitlines() if part.strip()), "")
    text = _SPACES.sub(" ", line).strip()
    if not text:
        return NO_MESSAGE
    if hosts is not None:
        text = hosts.sub("<host>", text)
    for _ in range(5):  # one pass may bring a new word boundary; a template is a fixed point
        before, text = text, _mask_forms(text)
        if text == before:
            break
    return text


def _mask_forms(text: str) -> str:
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return chr(_FIRST_KEPT + len(kept) - 1)

    text = VERBATIM.sub(keep, _LISTED.sub("[…]", text)[:4000])
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    text = _KEPT.sub(lambda m: kept[ord(m[0]) - _FIRST_KEPT], text)
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        text = text[: MAX_TEMPLATE_CHARACTERS - 1].rstrip(" …") + "…"
    return text


def masks(messages: Iterable[str | None], hosts: Iterable[str] = ()) -> dict[str | None, str]:
    """The template of each distinct message, by message; `mask` for many at once."""
    pattern = known_hosts(hosts)
    return {message: _mask(message, pattern) for message in set(messages)}


def error_templates(
    failures: Iterable[tuple[str, str | None, str, int]],
    *,
    hosts: Iterable[str] = (),
    merge: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
) -> list[ErrorTemplate]:
    """Group failures by outcome class and template.

    Args:
        failures: (outcome class, error message, host name, executions), in any order and any grouping.
        hosts: further host names to mask; those of the failures are masked in any case.
        merge: maps masked templates to those of their groups (`templates.merge`); None leaves them as they are.

    Returns:
        The templates, most executions first; ties by class and template. The shares add up to 1.
    """
    rows = list(failures)
    templates = masks((row[1] for row in rows), [*hosts, *(row[2] for row in rows)])
    if merge is not None:
        merged = merge(set(templates.values()))
        templates = {message: merged[template] for message, template in templates.items()}
    counts: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = defaultdict(set)
    for outcome_class, message, host, executions in rows:
        key = (outcome_class, templates[message])
        counts[key] += executions
        where[key].add(host)
    total = sum(counts.values())
    found = [
        ErrorTemplate(template, outcome_class, count, len(where[outcome_class, template]), count / total)
        for (outcome_class, template), count in counts.items()
        if count > 0
    ]
    return sorted(found, key=lambda e: (-e.count, e.outcome_class, e.template))


def waterfall(counts: Mapping[str, tuple[int, int]]) -> list[WaterfallStep]:
    """The way from a rule's raw rate to its adjusted one, one step per outcome class taken out.

    Classes without executions give no step. The last step holds failure and success alone. (gate.md section
    6)

    Args:
        counts: by outcome class (executions, those of them reported as success).

    Returns:
        The steps, the first over all executions.

    Raises:
        ValueError: an unknown outcome class, or counts that cannot be.
    """
    unknown = sorted(set(counts) - set(EXCLUDED_CLASSES) - set(RATED_CLASSES))
    if unknown:
        raise ValueError(f"unknown outcome class: {', '.join(unknown)}")
    for outcome_class, (executions, successes) in counts.items():
        if not 0 <= successes <= executions:
            raise ValueError(f"{outcome_class}: {successes} successes of {executions} executions")
    executions = sum(n for n, _ in counts.values())
    successes = sum(s for _, s in counts.values())
    steps = [WaterfallStep("all executions", 0, 0, executions, successes, _rate(successes, executions))]
    for outcome_class in EXCLUDED_CLASSES:
        removed, removed_successes = counts.get(outcome_class, (0, 0))
        if removed:
            executions -= removed
            successes -= removed_successes
            rate = _rate(successes, executions)
            steps.append(WaterfallStep(outcome_class, removed, removed_successes, executions, successes, rate))
    return steps


def _rate(successes: int, executions: int) -> float | None:
    return successes / executions if executions else None


def percent(rate: float | None) -> str:
    """A fraction for the screen: `30.0 %`, or `no data` over nothing."""
    return "no data" if rate is None else f"{rate * 100:.1f} %"


def waterfall_markdown(steps: Sequence[WaterfallStep]) -> str:
    """The waterfall as a Markdown table, rates in percent."""
    lines = ["| taken out | executions | remaining | successes | rate |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {s.label.replace('_', ' ') if s.removed else ''} | {s.removed or ''} "
        f"| {s.executions} | {s.successes} | {percent(s.rate)} |"
        for s in steps
    ]
    return "\n".join(lines)


def plot_waterfall(steps: Sequence[WaterfallStep], title: str) -> str:
    """Draw the waterfall: a bar per step, the rate over it.

    Returns:
        A PNG as a `data:` URI of at most 30 KB, for `MetadataValue.md("![](…)")`.

    Raises:
        ValueError: no steps.
    """
    if not steps:
        raise ValueError("a waterfall needs at least its first step")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s: not at import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 0.9 + 0.42 * len(steps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(steps))
    axes.barh(places, [s.executions for s in steps], color="#d7dbe0", height=0.66)
    axes.barh(places, [s.successes for s in steps], color="#2f7d5b", height=0.66)
    labels = [s.label if s.removed == 0 else f"without {s.label.replace('_', ' ')}" for s in steps]
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.invert_yaxis()
    widest = max(max(s.executions for s in steps), 1)
    for place, step in zip(places, steps, strict=True):
        axes.text(step.executions + widest * 0.01, place, percent(step.rate), va="center", fontsize=8)
    axes.set_xlim(0, widest * 1.14)
    axes.set_xlabel("executions (green: reported as success)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return png_uri(figure, MAX_PLOT_BYTES)
