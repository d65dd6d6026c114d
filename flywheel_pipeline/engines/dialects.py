"""An engine's own words for what `portable.py` lets pass, each of them held by a test.

Belongs here: rewriting a checked tree for DuckDB or Spark, and the few functions that a session needs for it. Does not
belong here: what may pass.

Where the two differ from PostgreSQL in silence: lower() and upper() fold by other tables, trim() of DuckDB takes more than
spaces, LIKE of DuckDB has no escape and that of Spark refuses some, a regular expression that does not match gives '' and
not null, array_position of Spark gives 0 and not null, its collect_list of nothing an empty array and not null, `.` and `$` of RE2 and Java mean less and more, and sqlglot turns
array_agg(... ORDER BY ...) into collect_list, and percentile_disc into an approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqlglot import exp, parse_one

from flywheel_pipeline.engines.portable import capture, prefix_of, span, true_key
from flywheel_pipeline.engines.values import BYTES_ORDER

Dialect = Literal["duckdb", "spark"]


@dataclass(frozen=True)
class Casing:
    """How the database folds the case of single characters: those of the first text become those of the second."""

    lower: tuple[str, str] = ("", "")
    upper: tuple[str, str] = ("", "")


def preamble(dialect: Dialect, casing: Casing) -> list[str]:
    """Return the statements that give a session the functions which `render` calls.

    Text of ASCII alone is folded by the engine, which every one does in the same way; the rest character by character, as
    the database does.
    """
    length, size = ("length(x)", "strlen(x)") if dialect == "duckdb" else ("char_length(x)", "octet_length(x)")
    bodies = {
        f"flywheel_{name}": f"CASE WHEN {size} = {length} THEN {name}(x) ELSE "
        f"translate(x, {_text(given, dialect)}, {_text(wanted, dialect)}) END"
        for name, (given, wanted) in (("lower", casing.lower), ("upper", casing.upper))
    }
    if dialect == "duckdb":
        bodies["flywheel_btrim"] = "trim(x, ' ')"
        made = [f"CREATE OR REPLACE TEMP MACRO {name}(x) AS {body}" for name, body in bodies.items()]
        made.append(r"CREATE OR REPLACE TEMP MACRO flywheel_like(x, p) AS x LIKE p ESCAPE '\'")
        return made
    bodies["flywheel_btrim"] = "trim(BOTH ' ' FROM x)"
    made = [
        f"CREATE OR REPLACE TEMPORARY FUNCTION {name}(x STRING) RETURNS STRING RETURN {body}"
        for name, body in bodies.items()
    ]
    # A backslash before any other character stands for nothing in PostgreSQL and is an error in Spark.
    made.append(
        "CREATE OR REPLACE TEMPORARY FUNCTION flywheel_like(x STRING, p STRING) RETURNS BOOLEAN "
        r"RETURN x LIKE regexp_replace(p, r'(\\[%_\\])|\\', '$1')"
    )
    return made


def _text(value: str, dialect: Dialect) -> str:
    return exp.Literal.string(value).sql(dialect=dialect)


def render(tree: exp.Expr, dialect: Dialect) -> str:
    """Return the SQL of a checked tree in an engine's dialect. Times are without a zone there, all of them UTC."""

    def rewrite(node: exp.Expr) -> exp.Expr:
        replaced = _common(node, dialect)
        made: exp.Expr = _spark(replaced) if dialect == "spark" else _duckdb(replaced)
        return made

    return _bottom_up(tree.copy(), rewrite).sql(dialect=dialect, pretty=True, comments=False)


def _bottom_up(node: exp.Expr, rewrite: Callable[[exp.Expr], exp.Expr]) -> exp.Expr:
    """Rewrite children before what holds them: what is made of two nodes sees them as the model has them."""
    for part in reversed(list(node.walk())):
        made = rewrite(part)
        if made is not part:
            if part is node:
                return made
            part.replace(made)
    return node


def _call(name: str, *arguments: exp.Expr) -> exp.Expr:
    return exp.Anonymous(this=name, expressions=list(arguments))


def _common(node: Any, dialect: Dialect) -> Any:
    if isinstance(node, exp.Anonymous) and node.name == BYTES_ORDER:
        return node.expressions[0]
    if isinstance(node, exp.AtTimeZone):
        return exp.Paren(this=node.this)
    if isinstance(node, exp.Lower):
        return _call("flywheel_lower", node.this)
    if isinstance(node, exp.Upper):
        return _call("flywheel_upper", node.this)
    if isinstance(node, exp.Trim):
        return _call("flywheel_btrim", node.this)
    if isinstance(node, exp.ILike):
        return _call("flywheel_like", _call("flywheel_lower", node.this), _call("flywheel_lower", node.expression))
    if isinstance(node, exp.Like):
        return _like(node, dialect)
    if isinstance(node, exp.ArrayContainsAll):
        return _has_true(node, dialect)
    if isinstance(node, exp.Substring) and node.args["start"].is_string:
        return _captured(node, dialect)
    if isinstance(node, exp.WindowSpec):
        for side in ("start", "end"):
            bound = node.args.get(side)
            if isinstance(bound, exp.Literal) and bound.is_string:
                number, unit = span(bound.name) or ("", "")
                node.set(side, exp.Interval(this=exp.Literal.string(number), unit=exp.Var(this=unit)))
    if isinstance(node, exp.Bracket):
        return _first_of(node, dialect)
    if isinstance(node, exp.CTE) and dialect == "spark":
        node.set("materialized", None)
    if isinstance(node, exp.Cast) and node.to.this in (exp.DataType.Type.TIMESTAMPTZ,):
        node.set("to", exp.DataType.build("TIMESTAMP"))
    return node


def _like(node: Any, dialect: Dialect) -> Any:
    """A pattern in a column goes by PostgreSQL's escapes; one with a backslash in it is the beginning that it stands for."""
    if not node.expression.is_string:
        return _call("flywheel_like", node.this, node.expression)
    known = prefix_of(node.expression.name) if "\\" in node.expression.name else None
    if known is None:
        return node
    literal, more = known
    starts, length = ("starts_with", "length") if dialect == "duckdb" else ("startswith", "char_length")
    enough = f" AND {length}(x) >= {len(literal) + more}" if more else ""
    return _template(f"{starts}(x, {_text(literal, dialect)}){enough}", node.this, dialect)


def _has_true(node: Any, dialect: Dialect) -> Any:
    """`x @> '{"key": true}'`: the words are sought first, in jsonb's own spelling; JSON is read only where they stand."""
    key, words = true_key(node) or "", f'"{true_key(node)}": true'
    if dialect == "duckdb":
        found = f"json_extract(x, '$.\"{key}\"') = 'true'"
    else:
        found = (
            f"schema_of_variant(variant_get(try_parse_json(x), '$.{key}')) = 'BOOLEAN' "
            f"AND get_json_object(x, '$.{key}') = 'true'"
        )
    return _template(
        f"CASE WHEN contains(x, '{words}') THEN coalesce({found}, FALSE) ELSE x <> x END", node.this, dialect
    )


def _captured(node: Any, dialect: Dialect) -> Any:
    """`substring(x FROM '^prefix(...)')`: null where it does not match. The prefix is sought first: that costs least."""
    prefix, pattern = capture(node.args["start"].name)
    starts = "starts_with" if dialect == "duckdb" else "startswith"
    quoted = _text(pattern, dialect)
    return _template(
        f"CASE WHEN {starts}(x, {_text(prefix, dialect)}) THEN nullif(regexp_extract(x, {quoted}, 1), '') END",
        node.this,
        dialect,
    )


def _template(text: str, value: exp.Expr, dialect: Dialect) -> exp.Expr:
    def put(part: exp.Expr) -> exp.Expr:
        return value.copy() if isinstance(part, exp.Column) and part.name == "x" and not part.table else part

    return exp.Paren(this=parse_one(text, dialect=dialect).transform(put))


def _first_of(node: Any, dialect: Dialect) -> Any:
    """`(array_agg(x ORDER BY a DESC, b DESC))[1]`: the x of the greatest (a, b), be it null."""
    inner = node.this.unnest()
    aggregate = inner.this if isinstance(inner, exp.Filter) else inner
    order = aggregate.this
    keys = [key.this.copy() for key in order.expressions]
    descending = bool(order.expressions[0].args.get("desc"))
    names = {"duckdb": ("arg_max_null", "arg_min_null", "row"), "spark": ("max_by", "min_by", "struct")}[dialect]
    key = keys[0] if len(keys) == 1 else _call(names[2], *keys)
    picked = _call(names[0] if descending else names[1], order.this.copy(), key)
    return exp.Filter(this=picked, expression=inner.expression.copy()) if isinstance(inner, exp.Filter) else picked


def _duckdb(node: Any) -> Any:
    if isinstance(node, exp.WithinGroup):
        return _call("quantile_disc", node.expression.expressions[0].this, node.this.this)
    return node


def _spark(node: Any) -> Any:
    if isinstance(node, exp.ArrayPosition):
        return exp.Nullif(this=_call("array_position", node.this, node.expression), expression=exp.Literal.number(0))
    if isinstance(node, exp.Window) and isinstance(node.this, exp.Filter):
        # A window function of Spark takes no FILTER. An aggregate passes over null, and count(*) counts ones.
        aggregate, condition = node.this.this, node.this.expression.this
        value = exp.Literal.number(1) if isinstance(aggregate.this, exp.Star) else aggregate.this
        aggregate.set("this", exp.Case(ifs=[exp.If(this=condition.copy(), true=value.copy())]))
        node.set("this", aggregate)
        return node
    if isinstance(node, exp.ArrayAgg) and isinstance(node.this, exp.Order) and not _is_indexed(node):
        gathered = _call("collect_list", node.this.this)
        return gathered if isinstance(node.parent, exp.Filter) else _sorted(gathered)
    if isinstance(node, exp.Filter) and isinstance(node.this, exp.Anonymous) and node.this.name == "collect_list":
        return _sorted(node.copy())
    if isinstance(node, exp.WithinGroup):
        value = node.expression.expressions[0].this
        exact = f"percentile_disc({node.this.this.sql()}) WITHIN GROUP (ORDER BY x)"
        # Not parsed: sqlglot would give it back as an approximation. It is a double there, whatever went in.
        return exp.Cast(
            this=exp.Var(this=exact.replace("(ORDER BY x)", f"(ORDER BY {value.sql(dialect='spark')})")), to=value.type
        )
    return node


def _sorted(gathered: exp.Expr) -> exp.Expr:
    """Spark gathers nothing into an empty array, where PostgreSQL gives null."""
    return exp.Nullif(this=_call("array_sort", gathered), expression=_call("array"))


def _is_indexed(node: exp.Expr) -> bool:
    above = node.parent
    while isinstance(above, exp.Filter | exp.Paren):
        above = above.parent
    return isinstance(above, exp.Bracket)
