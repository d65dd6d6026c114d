"""Keys of patterns and the rule ids derived from them.

Belongs here: the one typed function from a pattern's three parts to its key, and from a key to a rule id. The old
system cut incident types to 8 characters, so 46 promoted patterns shared 20 rules; these are injective.
"""

from __future__ import annotations


def _escape(part: str) -> str:
    return part.replace("%", "%25").replace("~", "%7E")


def pattern_key(incident_type: str, runbook_id: str, platform: str) -> str:
    """Return the key of a pattern, `<incident_type>~<runbook_id>~<platform>` with % and ~ escaped.

    Injective: equal keys mean equal parts. The SQL twin is `flywheel_pattern_key`.
    """
    return "~".join(_escape(part) for part in (incident_type, runbook_id, platform))


def parts_of_key(key: str) -> tuple[str, str, str]:
    """Return (incident_type, runbook_id, platform) of a pattern key, the inverse of `pattern_key`.

    Raises:
        ValueError: the text is no pattern key.
    """
    parts = key.split("~")
    if len(parts) != 3:
        raise ValueError(f"{key!r} is no pattern key: it needs incident type, runbook and platform")
    incident_type, runbook_id, platform = (p.replace("%7E", "~").replace("%25", "%") for p in parts)
    return incident_type, runbook_id, platform


def rule_id_of_pattern(key: str) -> str:
    """Return the id of the rule promoted from this pattern, `RB-AUTO-<pattern key>`; injective like the key."""
    return f"RB-AUTO-{key}"
