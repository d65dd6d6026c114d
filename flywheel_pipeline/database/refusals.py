"""What PostgreSQL refuses a login for want of a right: one sentence, and which role has it.

Belongs here: knowing such an error of any driver in use, however it is wrapped, and naming the way out. Does not belong
here: the rights themselves (`roles.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from flywheel_pipeline.database.roles import AGENT_API, FUNCTIONS, GRANTS, PIPELINE, READER, SECRET_TABLES
from flywheel_pipeline.errors import DatabaseUnavailable

_INSUFFICIENT_PRIVILEGE: Final = "42501"
#: Where a schema may not be used, creating in it fails as if there were none: so Dagster's storage does as a reader.
_NO_SCHEMA: Final = "3F000"
_RELATION: Final = re.compile(r"(?:table|view|materialized view|sequence) \"?(\w+)\"?$")
_FUNCTION: Final = re.compile(r"(?:function|procedure) \"?(\w+)\"?$")
_OWNER: Final = "connect as the owner of the tables"


def refused(error: BaseException, login: str) -> DatabaseUnavailable | None:
    """Return the refusal that an error comes of, as a sentence for this login; None for an error of any other kind."""
    for cause in _causes(error):
        said = getattr(getattr(cause, "diag", None), "message_primary", None) or str(cause).strip().partition("\n")[0]
        # Of psycopg 2: nobody but Dagster speaks to the server by it.
        if getattr(cause, "pgcode", None) in (_INSUFFICIENT_PRIVILEGE, _NO_SCHEMA):
            return DatabaseUnavailable(
                f"The login {login} may not use Dagster's storage: {said}.",
                hint=f"Who runs the graph needs {PIPELINE}: an administrator grants it by `GRANT {PIPELINE} TO {login}`; or {_OWNER}.",
            )
        if getattr(cause, "sqlstate", None) == _INSUFFICIENT_PRIVILEGE:
            return DatabaseUnavailable(f"The login {login} may not do this: {said}.", hint=_way_out(said, login))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__  # not what was being handled meanwhile: that need not be the reason


def _way_out(said: str, login: str) -> str:
    relation, function = _RELATION.search(said), _FUNCTION.search(said)
    if relation is not None and relation[1] in SECRET_TABLES:
        return f"No role sees the tokens: {_OWNER}."
    if relation is not None:
        writers = [
            role  # the agent API's speaks for an appliance, never for a person
            for role, grants in GRANTS.items()
            if role != AGENT_API and {*grants.get(relation[1], ())} - {"SELECT"}
        ]
        needs = f"To read it takes {READER}" + (f", to write it {' or '.join(writers)}" if writers else "")
        return f"{needs}: an administrator grants a role by `GRANT {READER} TO {login}`; or {_OWNER}."
    if function is not None and (callers := [role for role, names in FUNCTIONS.items() if function[1] in names]):
        return (
            f"To call it takes {' or '.join(callers)}: an administrator grants it by `GRANT {callers[0]} TO {login}`."
        )
    return f"No role may (README, Trust, has what each is for): {_OWNER}."
