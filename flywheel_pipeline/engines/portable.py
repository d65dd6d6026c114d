"""What of a model an engine may compute: a list of what is known to give equal digits, and a refusal by name of all else.

Belongs here: the rules over the syntax tree, the same for every engine. Does not belong here: an engine's own words
(`dialects.py`), and where a model is taken apart (`plan.py`).

An engine gives counts, sums of integers and decimals, exact percentiles of stored values, dates, times and text it was
given. Division, averages, rounding, floating-point sums, numbers and times as text, and the order of text under a
language's rules are PostgreSQL's. So is what PostgreSQL itself leaves to chance: the first of equals.

A value comes out of parts of one type only, since PostgreSQL keeps the digits of each and an engine brings all to one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.annotate_types import annotate_types
from sqlglot.optimizer.qualify import qualify

from flywheel_pipeline.engines.values import (
    BYTES_ORDER,
    COMPARED,
    DECIMAL,
    DOUBLE,
    EXACT,
    INTEGER,
    PRECISION,
    TEXT,
    TIMES,
    UNIQUE,
    declared_digits,
    digits_of,
    is_text,
    kind_of,
    not_null,
    ordered_by,
    sort_of,
    told_apart_by,
)

#: What holds two values against each other.
_COMPARISONS = (
    exp.EQ, exp.NEQ, exp.NullSafeEQ, exp.NullSafeNEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.In, exp.Between,
)  # fmt: skip

#: So many significant digits make the same double by any way of reading them.
_DOUBLE_DIGITS = 15

# Nothing to decide about these: they mean the same everywhere.
_PLAIN = (
    exp.Select, exp.CTE, exp.From, exp.Join, exp.Lateral, exp.Where, exp.Having, exp.Order, exp.Subquery, exp.Table,
    exp.TableAlias, exp.Alias, exp.Boolean, exp.Null, exp.And, exp.Or, exp.Not, exp.Paren, exp.Is, exp.If, exp.Count,
    exp.LogicalOr, exp.LogicalAnd, exp.Filter, exp.Star, exp.DataType, exp.DataTypeParam, exp.Exists, exp.Var,
    exp.Lower, exp.Upper, exp.ILike, exp.Replace, exp.Window,
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


def _united(node: exp.Expr, parts: Iterable[exp.Expr]) -> None:
    """Refuse values of several types where one comes out: PostgreSQL keeps the digits of each, an engine those of one."""
    values = [part for part in parts if not isinstance(part.unnest(), exp.Null)]
    sorts = {sort_of(part) for part in values}
    if "" in sorts:
        raise Refusal(node, "the type of a part of it is not known")
    if "double" in sorts and sorts <= {"double", "integer", "fraction"}:
        return
    if sorts == {"decimal"}:
        found = [digits_of(part) for part in values]
        if len(values) == 1 or (all(found) and len({told[1] for told in found if told}) == 1):
            return
    elif len(sorts) <= 1 and sorts != {"fraction"}:
        return
    raise Refusal(node, "its parts are of different types, and engines give them other digits")


def _held_together(node: exp.Expr, *parts: exp.Expr) -> None:
    """Refuse a comparison of values that PostgreSQL and an engine bring to one type in different ways."""
    values = [part for part in parts if not isinstance(part.unnest(), exp.Null)]
    sorts = {sort_of(part) for part in values}
    if "" in sorts:
        raise Refusal(node, "the type of a side is not known")
    if (
        len(sorts) > 1
        and not sorts <= {"integer", "double", "fraction"}
        and not sorts <= {"integer", "decimal", "fraction"}
    ):
        raise Refusal(node, "its sides are of different types, and a common one is found differently elsewhere")
    if "decimal" in sorts:
        found = [digits_of(part) for part in values]
        told = [one for one in found if one is not None]
        if len(told) < len(found) or max(one[0] for one in told) + max(one[1] for one in told) > PRECISION:
            raise Refusal(node, f"decimals of more than {PRECISION} digits together are rounded differently elsewhere")


def _ordered(node: exp.Expr) -> None:
    inner = (node.this if isinstance(node, exp.Ordered) else node).unnest()
    if isinstance(inner, exp.Anonymous) and inner.name == BYTES_ORDER:
        return
    if is_text(inner):
        raise Refusal(inner, 'the order of text depends on the database\'s language; say COLLATE "C"')
    if kind_of(inner) not in COMPARED and not isinstance(inner, exp.ArrayPosition):
        raise Refusal(inner, "its type is not known, and so neither its order")


def _compared(node: Any) -> None:
    for side in (node.left, node.right):
        _ordered(side)
    _held_together(node, node.left, node.right)


def _equal(node: Any) -> None:
    _held_together(node, node.left, node.right)


def _between(node: Any) -> None:
    if node.args.get("symmetric"):
        raise Refusal(node, "BETWEEN SYMMETRIC is not known everywhere")
    parts = (node.this, node.args["low"], node.args["high"])
    for part in parts:
        _ordered(part)
    _held_together(node, *parts)


def _in(node: Any) -> None:
    query = node.args.get("query")
    if query is None:
        _held_together(node, node.this, *node.expressions)
        return
    if not _filters_rows(node):
        raise Refusal(node, "a null that IN meets is FALSE elsewhere, unless it stands in WHERE by itself; say EXISTS")
    _held_together(node, node.this, query.unnest().selects[0].unalias())


def _filters_rows(node: exp.Expr) -> bool:
    """Whether it is one condition of a WHERE, or the opposite of one: null is then as good as false."""
    above = _above_parens(node)
    if isinstance(above, exp.Not):
        above = _above_parens(above)
    while isinstance(above, exp.And):
        above = _above_parens(above)
    return isinstance(above, exp.Where) and isinstance(above.parent, exp.Select)


def _above_parens(node: exp.Expr) -> exp.Expr | None:
    above = node.parent
    while isinstance(above, exp.Paren):
        above = above.parent
    return above


def _sum(node: exp.Expr) -> None:
    if kind_of(node.this) not in EXACT:
        raise Refusal(node, "only sums of integers and decimals are exact in every order")


def _added(node: Any) -> None:
    sides = (node.left, node.right)
    if kind_of(node.left) in TIMES and isinstance(node.right, exp.Interval):
        return
    if not all(kind_of(side) in EXACT for side in sides):
        raise Refusal(node, "only integers, decimals, and times with an interval are added")
    if any(kind_of(side) == exp.DataType.Type.SMALLINT for side in sides):
        raise Refusal(node, "a smallint with a number is an integer, and in DuckDB a smallint still; say ::integer")
    if any(kind_of(side) == DECIMAL for side in sides):
        digits = digits_of(node)
        if digits is None or sum(digits) > PRECISION:
            raise Refusal(node, f"a decimal of more than {PRECISION} digits loses some elsewhere")


def _interval(node: exp.Expr) -> None:
    unit = node.text("unit").upper().rstrip("S")
    if unit not in ("SECOND", "MINUTE", "HOUR", "DAY") or not re.fullmatch(r"\d+", node.this.name):
        raise Refusal(node, "an interval is so many seconds, minutes, hours or days")
    if not isinstance(node.parent, exp.Add | exp.Sub):
        raise Refusal(node, "an interval by itself is another thing elsewhere; it is added to a time")


def _cast(node: Any) -> None:
    target, source = node.to.this, kind_of(node.this)
    if target in TEXT and is_text(node.this):
        if node.to.expressions:
            raise Refusal(node, "PostgreSQL cuts text to a length, an engine does not")
        return
    if target in INTEGER and source in INTEGER:
        return
    if target in INTEGER and source == DECIMAL:
        raise Refusal(node, "a decimal is rounded to an integer differently elsewhere")
    if target == DECIMAL and source in EXACT:
        wanted, found = declared_digits(node.to), digits_of(node.this)
        if wanted is None:
            raise Refusal(node, f"numeric without digits, or with more than {PRECISION}, is another type elsewhere")
        if found is None or wanted[0] < found[0] or wanted[1] < found[1]:
            raise Refusal(node, "what it casts may have more digits than it has, which is not the same everywhere")
        return
    if target == source == exp.DataType.Type.BOOLEAN:
        return
    if target == exp.DataType.Type.DATE and isinstance(node.this.unnest(), exp.AtTimeZone):
        return
    raise Refusal(node, "the cast is spelled or rounded differently elsewhere")


def _literal(node: exp.Expr) -> None:
    if node.is_string:
        return
    if node.is_int:
        if int(node.name) >= 1 << 63:
            raise Refusal(node, "an integer of more than 64 bits is another type elsewhere")
        return
    if not re.fullmatch(r"\d*\.\d*", node.name) or len(node.name.replace(".", "").lstrip("0")) > _DOUBLE_DIGITS:
        raise Refusal(
            node, f"a number with an exponent, or more than {_DOUBLE_DIGITS} digits, is read differently elsewhere"
        )
    beside = (*_COMPARISONS, exp.Coalesce, exp.Nullif, exp.If, exp.Case, exp.PercentileDisc, exp.PercentileCont)
    if not isinstance(_above_parens(node), beside):
        raise Refusal(node, "a fraction by itself is of another type elsewhere; compare with it")


def _identifier(node: exp.Expr) -> None:
    if node.args.get("quoted") and node.name != node.name.lower():
        raise Refusal(node, "elsewhere a name is the same in capitals")


def _column(node: exp.Expr) -> None:
    if isinstance(node.this, exp.Star):
        raise Refusal(node, "a whole row is another thing elsewhere")


def _with(node: exp.Expr) -> None:
    if node.args.get("recursive"):
        raise Refusal(node, "recursion is not known everywhere")


def _distinct(node: exp.Expr) -> None:
    if node.args.get("on") is not None:
        raise Refusal(node, "the row that DISTINCT ON takes is chance; say (array_agg(... ORDER BY ...))[1]")
    if isinstance(node.parent, exp.Select):
        _told_apart(node, (part.unalias() for part in node.parent.expressions))


def _group(node: exp.Expr) -> None:
    _told_apart(node, node.expressions)


def _told_apart(node: exp.Expr, parts: Iterable[exp.Expr]) -> None:
    if any(kind_of(part) == DOUBLE for part in parts):
        raise Refusal(node, "-0 and 0 are one value, and engines show another of them")


def _union(node: Any) -> None:
    sides = [side.unnest().selects for side in (node.left, node.right)]
    for left, right in zip(*sides, strict=True):
        _united(node, (left.unalias(), right.unalias()))
        if node.args.get("distinct"):
            _told_apart(node, (left.unalias(), right.unalias()))


def _dpipe(node: Any) -> None:
    for side in (node.left, node.right):
        if not is_text(side):
            raise Refusal(
                node, "|| joins what is known to be text; arrays and numbers are joined differently elsewhere"
            )


def _coalesce(node: Any) -> None:
    _united(node, (node.this, *node.expressions))


def _nullif(node: Any) -> None:
    _united(node, (node.this,))
    _held_together(node, node.this, node.expression)


def _case(node: Any) -> None:
    branches = node.args["ifs"]
    default = node.args.get("default")
    _united(node, [*(branch.args["true"] for branch in branches), *([default] if default is not None else ())])
    if node.this is not None:
        _held_together(node, node.this, *(branch.this for branch in branches))


def _tuple(node: exp.Expr) -> None:
    if not (isinstance(node.parent, exp.Distinct) and isinstance(node.parent.parent, exp.Count)):
        raise Refusal(node, "of rows with nulls in them, engines think differently; compare column by column")


def _array(node: exp.Expr) -> None:
    if not isinstance(node.parent, exp.ArrayPosition) or node.parent.this is not node:
        raise Refusal(node, "an array stands in array_position alone")
    if not all(isinstance(part, exp.Literal) for part in node.expressions):
        raise Refusal(node, "where an array holds null, engines differ: it is one of literals")


def _array_position(node: Any) -> None:
    if not isinstance(node.this, exp.Array):
        raise Refusal(node, "array_position is known of an array of literals")
    if node.args.get("zero_based") is not None or len([value for value in node.args.values() if value is not None]) > 2:
        raise Refusal(node, "array_position from a place on is not known everywhere")
    _held_together(node, node.expression, *node.this.expressions)


def _limit(node: Any) -> None:
    select = node.parent
    if not isinstance(node.expression, exp.Literal) or not node.expression.is_int:
        raise Refusal(node, "a limit is a number")
    if not isinstance(select, exp.Select) or select.args.get("order") is None:
        raise Refusal(node, "without ORDER BY, the rows that it keeps are chance")
    keys = [key.this for key in select.args["order"].expressions]
    given = {part.output_name: part.unalias() for part in select.expressions}
    for key in keys:
        for column in key.find_all(exp.Column):
            named = given.get(column.name)
            if (
                not column.table
                and column is not key
                and not (isinstance(named, exp.Column) and named.name == column.name)
            ):
                raise Refusal(
                    key, "in an expression PostgreSQL takes a name for the column's, an engine for the alias'"
                )
    if told_apart_by(select.args["order"]):
        return
    ordered = set(ordered_by(keys))
    for name, part in given.items():
        if not {name, part.sql()} & ordered:
            raise Refusal(node, f"of rows that its ORDER BY does not tell apart, it keeps any; order by {name} too")


def _row_number(node: exp.Expr) -> None:
    window = node.parent
    if not isinstance(window, exp.Window) or not told_apart_by(window.args.get("order")):
        raise Refusal(
            node, f"the number of rows that its ORDER BY does not tell apart is chance; order by {UNIQUE} too"
        )


def _zone(node: exp.Expr) -> None:
    if node.args["zone"].name != "UTC" or kind_of(node.this) != exp.DataType.Type.TIMESTAMPTZ:
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
    above = _above_parens(node.parent if isinstance(node.parent, exp.Filter) else node)
    if not isinstance(order, exp.Order):
        raise Refusal(node, "without ORDER BY its order is chance")
    directions = {bool(key.args.get("desc")) for key in order.expressions}
    keys = [key.this for key in order.expressions]
    if not all(not_null(key) for key in keys):
        raise Refusal(node, "where its ORDER BY is null, engines differ")
    if isinstance(above, exp.Bracket):
        # The parser counts from 0.
        if [part.name for part in above.expressions] != ["0"] or len(directions) != 1:
            raise Refusal(node, "of an array, only the first element in one direction is known everywhere")
        if not told_apart_by(order) and order.this not in keys:
            raise Refusal(
                node, f"the first of those that its ORDER BY does not tell apart is chance; order by {UNIQUE} too"
            )
    elif len(keys) != 1 or keys[0] != order.this or directions != {False}:
        raise Refusal(node, "an array is ordered by its own elements, ascending")
    elif sort_of(order.this) not in ("integer", "time", "date"):
        raise Refusal(node, "only arrays of integers, times and dates come back from an engine")


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
    # 0.07 of 100 rows is the 8th in PostgreSQL, which multiplies doubles, and the 7th in DuckDB.
    part = Fraction(node.this.this.name)
    if part.denominator & (part.denominator - 1) or part > 1:
        raise Refusal(node, "a fraction that is no sum of halves, quarters ... is multiplied differently elsewhere")
    for key in node.expression.expressions:
        if kind_of(key.this) not in (exp.DataType.Type.DOUBLE, exp.DataType.Type.INT, exp.DataType.Type.SMALLINT):
            raise Refusal(node, "Spark takes percentiles of doubles alone, which hold an integer or a double exactly")
        if key.args.get("desc"):
            raise Refusal(node, "a percentile counts from below")


def _window_spec(node: Any) -> None:
    if node.args.get("exclude") is not None or node.args.get("kind") not in ("RANGE", "ROWS"):
        raise Refusal(node, "a frame is of RANGE or ROWS, without EXCLUDE")
    if node.args["kind"] == "ROWS" and not told_apart_by(node.parent.args.get("order")):
        raise Refusal(node, f"rows that its ORDER BY does not tell apart stand in any order; order by {UNIQUE} too")
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
    exp.Literal: _literal,
    exp.Identifier: _identifier,
    exp.Column: _column,
    exp.With: _with,
    exp.Distinct: _distinct,
    exp.Group: _group,
    exp.Union: _union,
    exp.Limit: _limit,
    exp.EQ: _equal,
    exp.NEQ: _equal,
    exp.NullSafeEQ: _equal,
    exp.NullSafeNEQ: _equal,
    exp.In: _in,
    exp.Between: _between,
    exp.Case: _case,
    exp.Coalesce: _coalesce,
    exp.Nullif: _nullif,
    exp.DPipe: _dpipe,
    exp.Tuple: _tuple,
    exp.Array: _array,
    exp.ArrayPosition: _array_position,
    exp.RowNumber: _row_number,
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
