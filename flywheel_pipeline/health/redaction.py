"""What may leave a site: values of conditions, without what names a host, an account or a person.

Belongs here: the test of a value. Error messages are masked by `attribution.mask`; hosts are counted, never named. A
condition is only ever named where at least three hosts share it, so a model name that looks like a host name may pass; a
host name that is known, an address, an account or a path may not, however many hosts report it.
"""

from __future__ import annotations

import re

from flywheel_pipeline.health.attribution import mask

WITHHELD = "(withheld)"
LONGEST = 60
_VERSION = re.compile(r"v?[0-9]{1,4}(?:\.[0-9]{1,5}){0,2}(?:[-+](?:rc|alpha|beta|dev|build)?\.?[0-9]{0,5})?", re.I)
_TELLING = ("<ip>", "<account>", "<mac>", "<url>", "<path>", "<id>", "<hex>", "<time>")
_DOTTED = re.compile(r"[a-z][\w-]*\.[a-z]", re.I)
_PERSONAL = re.compile(r"['’]s\b|\b(?:dr|mr|mrs|ms|prof)\.? [A-Z]|\b(?:user|owner|for|by)\b", re.I)


def public_value(dimension: str, value: str, hosts: re.Pattern[str] | None) -> str:
    """The value of a condition as it may be shown to the whole fleet.

    Args:
        dimension: agent_version, os, hardware; site ids and days are public by nature.
        value: as the agent reported it.
        hosts: the known host names (`attribution.known_hosts`).

    Returns:
        The value itself, or `(withheld)`.
    """
    if dimension == "agent_version":
        return value if _VERSION.fullmatch(value) else WITHHELD
    if dimension not in ("os", "hardware"):
        return value
    masked = mask(value)
    telling = any(form in masked for form in _TELLING) or bool(_DOTTED.search(value)) or bool(_PERSONAL.search(value))
    unclean = len(value) > LONGEST or not value.isprintable() or any(c in value for c in "|<>`@\\")
    known = hosts is not None and hosts.search(value) is not None
    return WITHHELD if telling or unclean or known else value
