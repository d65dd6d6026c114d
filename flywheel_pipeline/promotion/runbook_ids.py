"""What a runbook id is: an executable script's name, or a placeholder that some report minted.

Belongs here: the test on the runbook field. Does not belong here: any test on a rule id (RB-AUTO-FIREWALL is a good
rule), and the catalogue, which is the database's.
"""

from __future__ import annotations

PLACEHOLDER_PREFIXES = ("AUTO-", "L2-", "ESC-", "UNASSIGNED-")
PLACEHOLDER_IDS = frozenset({"", "ESCALATE", "GENERAL", "UNKNOWN"})
_ASCII_UPPER = str.maketrans("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def is_placeholder(runbook_id: str | None) -> bool:
    """Return whether this runbook field names no script: anchored prefixes and known pseudo ids, never "contains".

    Case is that of ASCII alone, so that the SQL twin, `flywheel_is_placeholder`, agrees under any collation.
    """
    name = (runbook_id or "").strip(" ").translate(_ASCII_UPPER)
    return name in PLACEHOLDER_IDS or name.startswith(PLACEHOLDER_PREFIXES)
