"""What is known of an expression's value: its type, its digits, whether it may be null, what an order tells apart.

Belongs here: reading that from an analysed tree. Does not belong here: what may pass (`portable.py`).

Types are those that the analysis finds. It takes `0.5` for a double, which is numeric in PostgreSQL; such a literal is a
"fraction" here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlglot import exp

from flywheel_pipeline.database.tables import execution_telemetry, metadata

#: Marks what was `COLLATE "C"`: text in the order of its bytes, which is every engine's.
BYTES_ORDER = "FLYWHEEL_BYTES"

TEXT = (exp.DataType.Type.TEXT, exp.DataType.Type.VARCHAR)  # char(n) passes over blanks at the end
#: Decimal digits that hold any value of the type.
_WIDTHS = {exp.DataType.Type.SMALLINT: 5, exp.DataType.Type.INT: 10, exp.DataType.Type.BIGINT: 19}
INTEGER = tuple(_WIDTHS)
DECIMAL = exp.DataType.Type.DECIMAL
DOUBLE = exp.DataType.Type.DOUBLE
EXACT = (*INTEGER, DECIMAL)
TIMES = (exp.DataType.Type.TIMESTAMP, exp.DataType.Type.TIMESTAMPTZ, exp.DataType.Type.DATETIME)

COMPARED = (*EXACT, *TIMES, exp.DataType.Type.DATE, exp.DataType.Type.BOOLEAN, DOUBLE)
#: Digits of a decimal in DuckDB and Spark.
PRECISION = 38
#: Unique in telemetry: an order that ends in it leaves nothing to chance.
UNIQUE = "execution_id"


def is_text(node: exp.Expr) -> bool:
    """Whether the expression is known to be text."""
    if isinstance(node, exp.Paren):
        return is_text(node.this)
    if isinstance(node, exp.Anonymous) and node.name == BYTES_ORDER:
        return is_text(node.expressions[0])
    if isinstance(node, exp.Case):
        results = [branch.args["true"] for branch in node.args["ifs"]] + [node.args.get("default")]
        return all(part is None or isinstance(part, exp.Null) or is_text(part) for part in results)
    if isinstance(node, exp.Coalesce):
        return all(is_text(part) for part in (node.this, *node.expressions))
    if isinstance(node, exp.Nullif):
        return is_text(node.this)
    if isinstance(node, exp.Column) and kind_of(node) in (None, exp.DataType.Type.UNKNOWN):
        return node.name in _text_names()
    return node.is_string or kind_of(node) in TEXT


@functools.cache
def _text_names() -> frozenset[str]:
    """Columns that are text in whatever table has them: their type is known even where no analysis follows them."""
    kinds: dict[str, set[bool]] = {}
    for table in metadata.tables.values():
        for column in table.columns:
            kinds.setdefault(column.name, set()).add(isinstance(column.type, sa.String))
    return frozenset(name for name, found in kinds.items() if found == {True})


def not_null(node: exp.Expr) -> bool:
    """Whether it can never be null: a column that telemetry always has, as far as no outer join or function hands it on."""
    if isinstance(node, exp.Anonymous) and node.name == BYTES_ORDER:
        return not_null(node.expressions[0])
    if isinstance(node, exp.Paren | exp.Cast):
        return not_null(node.this)
    if isinstance(node, exp.Coalesce):
        return any(not_null(part) for part in (node.this, *node.expressions))
    if isinstance(node, exp.Literal):
        return True
    if not isinstance(node, exp.Column):
        return False
    select = node.find_ancestor(exp.Select)
    relation = _joined_whole(select, node.table) if select is not None else None
    if relation is None:
        return False
    query = _query_of(relation)
    if query is not None:
        return _gives_no_null(query, node.name)
    # What a model hands on under the name of a column of telemetry is that column.
    column = metadata.tables.get(relation.name, execution_telemetry).columns.get(node.name)
    return column is not None and (not column.nullable or column is execution_telemetry.columns.event_at)


def _joined_whole(select: exp.Select, name: str) -> Any:
    """The relation of this name in FROM, unless a join may put nulls in its place."""
    found = select.args["from_"].this if select.args.get("from_") else None
    found = found if found is not None and found.alias_or_name == name else None
    for join in select.args.get("joins") or ():
        if join.side in ("RIGHT", "FULL"):
            found = None
        if join.alias_or_name == name and join.side not in ("LEFT", "FULL"):
            found = join.this
    return found


def _query_of(relation: exp.Expr) -> exp.Expr | None:
    """The query that a relation of FROM stands for; None: it is a table, or another model by its name."""
    if isinstance(relation, exp.Subquery | exp.Lateral):
        return relation.this.unnest()  # type: ignore[no-any-return]
    below, above = relation, relation.parent
    while above is not None:
        # A CTE reads those before it: by its own name it means another relation.
        ctes = above.expressions if isinstance(above, exp.With) else ()
        within = above.args.get("with_")
        if within is not None and within is not below:
            ctes = within.expressions
        for cte in ctes:
            if cte is below:
                break
            if cte.alias == relation.name:
                return cte.this  # type: ignore[no-any-return]
        below, above = above, above.parent
    return None


def _gives_no_null(query: exp.Expr, name: str) -> bool:
    if isinstance(query, exp.Select):
        return any(part.output_name == name and not_null(part.unalias()) for part in query.expressions)
    return False


def kind_of(node: exp.Expr) -> Any:
    """The type that the analysis found, without its digits; None where it found none."""
    kind = node.type
    return kind.this if isinstance(kind, exp.DataType) else None


def is_fraction(node: exp.Expr) -> bool:
    """Whether it is a number with a point: numeric in PostgreSQL, whatever the analysis says."""
    return isinstance(node, exp.Literal) and not node.is_string and not node.is_int


def digits_of(node: exp.Expr) -> tuple[int, int] | None:
    """Digits before and after the point that any value of an exact number fits in; None where that is not known."""
    if isinstance(node, exp.Paren | exp.Max | exp.Min | exp.Filter | exp.Window | exp.Nullif):
        return digits_of(node.this)
    if isinstance(node, exp.Literal):
        whole, _, part = node.name.partition(".")
        return None if node.is_string else (len(whole), len(part))
    if isinstance(node, exp.Add | exp.Sub):
        sides = (digits_of(node.left), digits_of(node.right))
        if sides[0] is None or sides[1] is None:
            return None
        return max(sides[0][0], sides[1][0]) + 1, max(sides[0][1], sides[1][1])
    if isinstance(node, exp.Sum):
        inner = digits_of(node.this)
        if inner is not None and kind_of(node.this) == DECIMAL:
            return PRECISION - inner[1], inner[1]
        # The sum of bigint is numeric, of any digits.
        known = kind_of(node.this) in (exp.DataType.Type.SMALLINT, exp.DataType.Type.INT)
        return (_WIDTHS[exp.DataType.Type.BIGINT], 0) if known else None
    if kind_of(node) in _WIDTHS:
        return _WIDTHS[kind_of(node)], 0
    if kind_of(node) == DECIMAL and isinstance(node, exp.Cast | exp.Column):
        return declared_digits(node.type)
    return None


def declared_digits(kind: Any) -> tuple[int, int] | None:
    """(10, 2) of numeric(12, 2); None where there are no such digits, or an engine has no such type."""
    given = [int(part.name) for part in kind.expressions]
    if not given or not 0 < given[0] <= PRECISION:
        return None
    scale = given[1] if len(given) > 1 else 0
    return (given[0] - scale, scale) if scale <= given[0] else None


def sort_of(node: exp.Expr) -> str:
    """What kind of value it is, by which PostgreSQL and every engine unite or compare it; '' where that is not known."""
    inner = node.unnest()
    if isinstance(inner, exp.Null):
        return "null"
    if is_text(inner):
        return "text"
    if isinstance(inner, exp.AtTimeZone):
        return "local time"
    if is_fraction(inner):
        return "fraction"
    if isinstance(inner, exp.ArrayPosition):
        return "integer"
    kind = kind_of(inner)
    if kind in INTEGER:
        return "integer"
    if kind in TIMES:
        return "time" if kind == exp.DataType.Type.TIMESTAMPTZ else "local time"
    names = {
        DECIMAL: "decimal",
        DOUBLE: "double",
        exp.DataType.Type.DATE: "date",
        exp.DataType.Type.BOOLEAN: "boolean",
    }
    return names.get(kind, "boolean" if isinstance(inner, exp.Predicate | exp.Connector | exp.Not) else "")


def ordered_by(keys: Iterable[exp.Expr]) -> Iterator[str]:
    """The columns, as they stand there, that an order tells apart. array_position does: what a model ranks is listed."""
    for key in keys:
        inner = key.unnest()
        if isinstance(inner, exp.ArrayPosition):
            inner = inner.expression.unnest()
        if isinstance(inner, exp.Anonymous) and inner.name == BYTES_ORDER:
            inner = inner.expressions[0].unnest()
        yield inner.sql()


def told_apart_by(order: exp.Expr | None) -> bool:
    """Whether an ORDER BY leaves no two rows of telemetry equal."""
    keys = [key.this for key in order.expressions] if order is not None else []
    return any(key.rpartition(".")[2] == UNIQUE for key in ordered_by(keys))
