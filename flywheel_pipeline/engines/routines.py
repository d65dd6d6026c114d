"""The database's own functions as expressions: an engine has none of them, so their bodies stand in the query instead.

Belongs here: finding functions of `database/routines/` that are one plain expression, and putting them in place of their
calls. Does not belong here: what they compute; the text in `routines/` is the only one.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sqlglot import exp, parse_one

_FUNCTION = re.compile(
    r"CREATE OR REPLACE FUNCTION (?P<name>\w+)\((?P<parameters>[^()]*)\) RETURNS (?P<type>\w+)\s+"
    r"LANGUAGE sql IMMUTABLE PARALLEL SAFE AS \$\$(?P<body>.*?)\$\$;",
    re.DOTALL,
)


@dataclass(frozen=True)
class Routine:
    """A function of one expression over its parameters."""

    name: str
    parameters: tuple[str, ...]
    body: exp.Expr


@functools.cache
def routines() -> Mapping[str, Routine]:
    """Return the immutable SQL functions of the schema that are one expression, by name."""
    found = {}
    folder = importlib.resources.files("flywheel_pipeline.database") / "routines"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if not entry.name.endswith(".sql"):
            continue
        for match in _FUNCTION.finditer(entry.read_text(encoding="utf-8")):
            query = parse_one(match["body"], dialect="postgres")
            if not isinstance(query, exp.Select) or len(query.selects) != 1 or set(_given(query)) != {"expressions"}:
                continue
            parameters = tuple(part.split()[0] for part in match["parameters"].split(",") if part.strip())
            found[match["name"]] = Routine(match["name"], parameters, query.selects[0].unalias())
    return found


def _given(query: exp.Select) -> list[str]:
    return [name for name, value in query.args.items() if value]


def inline(tree: exp.Expr) -> exp.Expr:
    """Return the tree with the body of each such function in place of its calls, whatever they are nested in."""

    def replace(node: exp.Expr) -> exp.Expr:
        if not isinstance(node, exp.Anonymous) or node.name.lower() not in routines():
            return node
        routine = routines()[node.name.lower()]
        given = dict(zip(routine.parameters, (inline(argument) for argument in node.expressions), strict=True))

        def argument(part: exp.Expr) -> exp.Expr:
            if isinstance(part, exp.Column) and not part.table and part.name in given:
                value = given[part.name].copy()
                return value if isinstance(value, exp.Column | exp.Literal) else exp.Paren(this=value)
            return part

        # The arguments are inlined already; what is left to inline stands in the body.
        return exp.Paren(this=inline(routine.body.copy()).transform(argument))

    return tree.transform(replace)
