"""What of a model an engine may compute: a list of what is known to give equal digits, and a refusal by name of all else.

Belongs here: the rules over the syntax tree, the same for every engine. Does not belong here: an engine's own words
(`dialects.py`), and where a model is taken apart (`plan.py`).

An engine gives counts, sums of integers and decimals, exact percentiles of stored values, dates, times and text it was
given. Division, averages, rounding, floating-point sums, numbers and times as text, and the order of text under a
language's rules are PostgreSQL's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.annotate_types import annotate_types
from sqlglot.optimizer.qualify import qualify

from flywheel_pipeline.database.tables import execution_telemetry, metadata

#: Marks what was `COLLATE "C"`: text in the order of its bytes, which is every engine's.
BYTES_ORDER = "FLYWHEEL_BYTES"

_TEXT = (exp.DataType.Type.TEXT, exp.DataType.Type.VARCHAR, exp.DataType.Type.CHAR, exp.DataType.Type.NCHAR)
_INTEGER = tuple(exp.DataType.INTEGER_TYPES)
_EXACT = (*_INTEGER, exp.DataType.Type.DECIMAL)
_TIMES = (exp.DataType.Type.TIMESTAMP, exp.DataType.Type.TIMESTAMPTZ, exp.DataType.Type.DATETIME)

_COMPARED = (*_EXACT, *_TIMES, exp.DataType.Type.DATE, exp.DataType.Type.BOOLEAN, exp.DataType.Type.DOUBLE)

# Nothing to decide about these: they mean the same everywhere.
_PLAIN = (
    exp.Select, exp.With, exp.CTE, exp.From, exp.Join, exp.Lateral, exp.Where, exp.Group, exp.Having, exp.Order,
    exp.Limit, exp.Subquery, exp.Table, exp.TableAlias, exp.Identifier, exp.Column, exp.Alias, exp.Literal,
    exp.Boolean, exp.Null, exp.And, exp.Or, exp.Not, exp.Paren, exp.Is, exp.EQ, exp.NEQ, exp.In, exp.Between,
    exp.Case, exp.If, exp.Coalesce, exp.Nullif, exp.Count, exp.LogicalOr, exp.LogicalAnd, exp.Filter, exp.Distinct,
    exp.Star, exp.DataType, exp.DataTypeParam, exp.Exists, exp.Union, exp.Tuple, exp.DPipe, exp.Var, exp.Array,
    exp.NullSafeEQ, exp.NullSafeNEQ, exp.RowNumber, exp.Lower, exp.Upper, exp.ILike, exp.Replace, exp.Window,
    exp.ArrayPosition,
)  # fmt: skip


class Refusal(Exception):
    """A construct that an engine may compute differently, in the words of the model."""

    def __init__(self, node: exp.Expr, why: str) -> None:
        said = " ".join(node.sql(dialect="postgres", comments=False).split())
        super().__init__(f"`{said if len(said) <= 120 else said[:117] + '...'}`: {why}")


def marked(tree: exp.Expr) -> exp.Expr:
    """Return the tree with `COLLATE "C"` as a mark; another collation is refused."""

    def mark(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Collate):
            if node.expression.name != "C":
                raise Refusal(node, "only the collation C is the same everywhere")
            return exp.Anonymous(this=BYTES_ORDER, expressions=[node.this])
        return node

    return tree.transform(mark)


def qualified(tree: exp.Expr, schema: Mapping[str, Mapping[str, str]]) -> exp.Expr:
    """Return the tree with each column under its relation, and with the types that follow from `schema`."""
    try:
        found = qualify(tree, schema=dict(schema), dialect="postgres", quote_identifiers=False, identify=False)
        return annotate_types(found, schema=dict(schema), dialect="postgres")
    except SqlglotError as error:
        raise Refusal(tree, f"it cannot be analysed ({error})") from error


def check(tree: exp.Expr) -> None:
    """Refuse the first construct that is not known to give the same result on every engine.

    Raises:
        Refusal: with the construct and why.
    """
    for node in tree.walk():
        rule = _RULES.get(type(node))
        if rule is not None:
            rule(node)
        elif not isinstance(node, _PLAIN):
            raise Refusal(node, f"{type(node).__name__} is not known to be the same on every engine")


def is_text(node: exp.Expr) -> bool:
    """Whether the expression is known to be text."""
    if isinstance(node, exp.Paren):
        return is_text(node.this)
    if isinstance(node, exp.Case):
        results = [branch.args["true"] for branch in node.args["ifs"]] + [node.args.get("default")]
        return all(part is None or isinstance(part, exp.Null) or is_text(part) for part in results)
    if isinstance(node, exp.Coalesce):
        return all(is_text(part) for part in (node.this, *node.expressions))
    if isinstance(node, exp.Nullif):
        return is_text(node.this)
    if isinstance(node, exp.Column) and _kind(node) in (None, exp.DataType.Type.UNKNOWN):
        return node.name in _text_names()
    return node.is_string or _kind(node) in _TEXT


@functools.cache
def _text_names() -> frozenset[str]:
    """Columns that are text in whatever table has them: their type is known even where no analysis follows them."""
    kinds: dict[str, set[bool]] = {}
    for table in metadata.tables.values():
        for column in table.columns:
            kinds.setdefault(column.name, set()).add(isinstance(column.type, sa.String))
    return frozenset(name for name, found in kinds.items() if found == {True})


def not_null(node: exp.Expr) -> bool:
    """Whether a column can never be null: in telemetry, and so wherever it is handed on under its name."""
    if isinstance(node, exp.Anonymous) and node.name == BYTES_ORDER:
        return not_null(node.expressions[0])
    column = execution_telemetry.columns.get(node.name) if isinstance(node, exp.Column) else None
    return column is not None and (not column.nullable or column.name == "event_at")


def _kind(node: exp.Expr) -> Any:
    kind = node.type
    return kind.this if isinstance(kind, exp.DataType) else None


def _ordered(node: exp.Expr) -> None:
    inner = (node.this if isinstance(node, exp.Ordered) else node).unnest()
    if isinstance(inner, exp.Anonymous) and inner.name == BYTES_ORDER:
        return
    if is_text(inner):
        raise Refusal(inner, 'the order of text depends on the database\'s language; say COLLATE "C"')
    if _kind(inner) not in _COMPARED and not isinstance(inner, exp.ArrayPosition | exp.Window):
        raise Refusal(inner, "its type is not known, and so neither its order")


def _compared(node: Any) -> None:
    for side in (node.left, node.right):
        _ordered(side)


def _sum(node: exp.Expr) -> None:
    if _kind(node.this) not in _EXACT:
        raise Refusal(node, "only sums of integers and decimals are exact in every order")


def _added(node: Any) -> None:
    sides = (node.left, node.right)
    if all(_kind(side) in _EXACT for side in sides):
        return
    if _kind(node.left) in _TIMES and isinstance(node.right, exp.Interval):
        return
    raise Refusal(node, "only integers, decimals, and times with an interval are added")


def _interval(node: exp.Expr) -> None:
    unit = node.text("unit").upper().rstrip("S")
    if unit not in ("SECOND", "MINUTE", "HOUR", "DAY") or not re.fullmatch(r"\d+", node.this.name):
        raise Refusal(node, "an interval is so many seconds, minutes, hours or days")


def _cast(node: Any) -> None:
    target, source = node.to.this, _kind(node.this)
    if target in _TEXT and is_text(node.this):
        return
    if target in _EXACT and source in _EXACT:
        return
    if target == exp.DataType.Type.BOOLEAN and source in (exp.DataType.Type.BOOLEAN, None):
        return
    if target == exp.DataType.Type.DATE and isinstance(node.this.unnest(), exp.AtTimeZone):
        return
    raise Refusal(node, "the cast is spelled or rounded differently elsewhere")


def _zone(node: exp.Expr) -> None:
    if node.args["zone"].name != "UTC" or _kind(node.this) != exp.DataType.Type.TIMESTAMPTZ:
        raise Refusal(node, "times are UTC; only AT TIME ZONE 'UTC' of a stored time is known everywhere")


def _trim(node: exp.Expr) -> None:
    if node.args.get("expression") is not None or node.args.get("position") not in (None, "BOTH"):
        raise Refusal(node, "only btrim of spaces is known everywhere")


def _like(node: exp.Expr) -> None:
    if node.expression.is_string and "\\" in node.expression.name and prefix_of(node.expression.name) is None:
        raise Refusal(node, "a backslash in a pattern is read differently elsewhere")


def _contains(node: exp.Expr) -> None:
    if true_key(node) is None:
        raise Refusal(node, "of jsonb, only `@> '{\"key\": true}'` with a plain key is known everywhere")


def _substring(node: exp.Expr) -> None:
    start = node.args.get("start")
    if node.args.get("length") is not None or not isinstance(start, exp.Literal):
        raise Refusal(node, "of substring, only that FROM a place or a regular expression is known everywhere")
    if not start.is_string:
        if not start.is_int or int(start.name) < 1:
            raise Refusal(node, "places before the first character are read differently elsewhere")
        return
    try:
        capture(start.name)
    except ValueError as error:
        raise Refusal(node, str(error)) from error


def _array_agg(node: exp.Expr) -> None:
    order = node.this
    above = node.parent.parent if isinstance(node.parent, exp.Filter) else node.parent
    while isinstance(above, exp.Paren):
        above = above.parent
    if not isinstance(order, exp.Order):
        raise Refusal(node, "without ORDER BY its order is chance")
    directions = {bool(key.args.get("desc")) for key in order.expressions}
    keys = [key.this for key in order.expressions]
    if not all(not_null(key) for key in keys):
        raise Refusal(node, "where its ORDER BY is null, engines differ")
    if isinstance(above, exp.Bracket):
        if [part.name for part in above.expressions] not in (["1"], ["0"]) or len(directions) != 1:
            raise Refusal(node, "of an array, only the first element in one direction is known everywhere")
    elif len(keys) != 1 or keys[0] != order.this or directions != {False}:
        raise Refusal(node, "an array is ordered by its own elements, ascending")


def _bracket(node: exp.Expr) -> None:
    inner = node.this.unnest()
    if not isinstance(inner.this if isinstance(inner, exp.Filter) else inner, exp.ArrayAgg):
        raise Refusal(node, "only the first element of an array_agg is known everywhere")


def _percentile(node: exp.Expr) -> None:
    if not isinstance(node.parent, exp.WithinGroup):
        raise Refusal(node, "a percentile stands WITHIN GROUP")


def _within(node: exp.Expr) -> None:
    # percentile_cont interpolates, and each engine rounds that in its own way; a stored value is nobody's to round.
    if not isinstance(node.this, exp.PercentileDisc) or not node.this.this.is_number:
        raise Refusal(node, "it interpolates in floating point; percentile_disc gives a stored value")
    for key in node.expression.expressions:
        if _kind(key.this) not in (exp.DataType.Type.DOUBLE, exp.DataType.Type.INT, exp.DataType.Type.SMALLINT):
            raise Refusal(node, "Spark takes percentiles of doubles alone, which hold an integer or a double exactly")
        if key.args.get("desc"):
            raise Refusal(node, "a percentile counts from below")


def _window_spec(node: exp.Expr) -> None:
    for side in ("start", "end"):
        bound = node.args.get(side)
        if isinstance(bound, exp.Literal) and bound.is_string and span(bound.name) is None:
            raise Refusal(node, "a frame is CURRENT ROW, UNBOUNDED, or so many seconds, minutes, hours or days")


def _anonymous(node: exp.Expr) -> None:
    if node.name == BYTES_ORDER:
        return
    raise Refusal(node, "it is a function of the database, and no plain expression that could stand in its place")


def _extreme(node: exp.Expr) -> None:
    _ordered(node.this)


def span(text: str) -> tuple[str, str] | None:
    """Return ('24', 'HOUR') for '24 hours'; None for an interval that engines may count differently."""
    match = re.fullmatch(r"(\d+) (second|minute|hour|day)s?", text.strip())
    return (match[1], match[2].upper()) if match else None


def prefix_of(pattern: str) -> tuple[str, int] | None:
    """Return (literal, n) for a LIKE pattern of a literal beginning, n times `_` and a `%`; None for any other.

    A backslash makes the next character literal, whatever it is.
    """
    literal, rest = "", pattern
    while rest and rest[0] not in "%_":
        if rest[0] == "\\":
            rest = rest[1:]
            if not rest:
                return None
        literal, rest = literal + rest[0], rest[1:]
    more = len(rest) - len(rest.lstrip("_"))
    return (literal, more) if literal and rest[more:] == "%" else None


def true_key(node: exp.Expr) -> str | None:
    """Return K where a containment is `@> '{"K": true}'` with a plain key; else None."""
    match = re.fullmatch(r'\{"([A-Za-z0-9_]+)": ?true\}', node.expression.name)
    return match[1] if match and node.expression.is_string else None


_ATOM = re.compile(r"\[[a-z_A-Z0-9-]+\]|\(\?:[A-Za-z0-9_|]+\)|[A-Za-z0-9_ :-]|\.")


def capture(pattern: str) -> tuple[str, str]:
    """Take a PostgreSQL pattern of one group apart: (literal that any match begins with, the pattern for RE2 and Java).

    Known are `^` at the start, `$` at the end, plain characters, sets, alternatives of plain words, one group that is never
    empty, and `.`, `+`, `*`, `?`. In PostgreSQL `.` is any character and `$` the very end; said so for the others.

    Raises:
        ValueError: anything else is in the pattern.
    """
    if not pattern.startswith("^"):
        raise ValueError("a pattern begins with ^")
    rest, out, prefix, literal, groups = pattern[1:], "\\A", "", True, 0
    while rest:
        if rest[0] == "$" and len(rest) == 1:
            out, rest = out + "\\z", ""
            continue
        if rest[0] == "(" and not rest.startswith("(?"):
            groups, literal, out, rest = groups + 1, False, out + "(", rest[1:]
            first = _ATOM.match(rest)
            if first is None or rest[first.end() :][:1] in ("*", "?"):
                raise ValueError("the group of a pattern may not be empty")
            continue
        if rest[0] == ")":
            out, rest = out + ")", rest[1:]
            if rest[:1] in ("*", "?", "+", "{"):
                raise ValueError("the group of a pattern is not repeated")
            continue
        atom = _ATOM.match(rest)
        if atom is None:
            raise ValueError(f"{rest[0]!r} in a pattern is not known to be the same everywhere")
        rest = rest[atom.end() :]
        repeat = rest[0] if rest[:1] in ("*", "+", "?") else ""
        rest = rest[len(repeat) :]
        if rest[:1] in ("*", "+", "?", "{"):
            raise ValueError("a repetition that is not greedy, or counted, is not known to be the same everywhere")
        literal = literal and len(atom[0]) == 1 and atom[0] != "." and not repeat
        prefix += atom[0] if literal else ""
        out += ("(?s:.)" if atom[0] == "." else atom[0]) + repeat
    if groups != 1:
        raise ValueError("a pattern has one group")
    return prefix, out


_RULES: dict[type[exp.Expr], Callable[[Any], None]] = {
    exp.Ordered: _ordered,
    exp.Max: _extreme,
    exp.Min: _extreme,
    exp.GT: _compared,
    exp.GTE: _compared,
    exp.LT: _compared,
    exp.LTE: _compared,
    exp.Sum: _sum,
    exp.Add: _added,
    exp.Sub: _added,
    exp.Interval: _interval,
    exp.Cast: _cast,
    exp.AtTimeZone: _zone,
    exp.Trim: _trim,
    exp.Like: _like,
    exp.ArrayContainsAll: _contains,
    exp.Substring: _substring,
    exp.ArrayAgg: _array_agg,
    exp.Bracket: _bracket,
    exp.PercentileDisc: _percentile,
    exp.PercentileCont: _percentile,
    exp.WithinGroup: _within,
    exp.WindowSpec: _window_spec,
    exp.Anonymous: _anonymous,
}
