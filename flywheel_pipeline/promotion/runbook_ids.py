"""What a runbook id is: an executable script's name, or a placeholder that some report minted.

Belongs here: the test on the runbook field. Does not belong here: any test on a rule id (RB-AUTO-FIREWALL is a good
rule), and the catalogue, which is the database's.
"""

from __future__ import annotations

PLACEHOLDER_PREFIXES = ("AUTO-", "L2-", "ESC-", "UNASSIGNED-")
PLACEHOLDER_IDS = frozenset({"", "ESCALATE", "GENERAL", "UNKNOWN"})


def is_placeholder(runbook_id: str | None) -> bool:
    """Return whether this runbook field names no script: anchored prefixes and known pseudo ids, never "contains".

    The SQL twin is `flywheel_is_placeholder`.
    """
    name = (runbook_id or "").strip(" ").upper()
    return name in PLACEHOLDER_IDS or name.startswith(PLACEHOLDER_PREFIXES)
