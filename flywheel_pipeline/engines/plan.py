"""What an engine computes of the models, in its own dialect, and what PostgreSQL does with what it gets.

Belongs here: which models go to the engine, in which order, and where one is taken apart. Does not belong here: what may
pass (`portable.py`), and an engine's words (`dialects.py`).

Models of cell day go to the engine: their rows depend on the telemetry of their own days alone. Months and all time also
add up days that are not recomputed, so PostgreSQL rolls them up from what landed, as in every refresh. Where the last
SELECT of a model says what only PostgreSQL says (a rate, a time as text), the engine gives what stands inside (sums, counts,
columns), and PostgreSQL the rest over those rows.
"""

# ruff: noqa: S608 (names come from checked model headers; there are no values in this SQL)
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlglot import exp

from flywheel_pipeline.database import tables
from flywheel_pipeline.engines.dialects import Dialect, render
from flywheel_pipeline.engines.errors import NotPortable
from flywheel_pipeline.engines.portable import Refusal, check, marked, qualified
from flywheel_pipeline.engines.routines import inline
from flywheel_pipeline.sql_models.cells import shared_views, view_columns
from flywheel_pipeline.sql_models.loader import TELEMETRY, ModelGraph, SqlModel, columns_read, telemetry_columns

_PARTIAL = "partial_"
TIME_COLUMNS = frozenset({"started_at", "completed_at", "created_at", "reported_at", "event_at"})
#: The database refuses an execution of before 0001-01-02 or after 9999-12-30 by these (`flywheel_refuse_days`).
_OF_THE_CALENDAR = frozenset({"started_at", "event_at"})
_COMPARISONS = (exp.LT, exp.LTE, exp.GT, exp.GTE, exp.EQ, exp.NEQ)


@dataclass(frozen=True)
class Step:
    """One relation that the engine makes, under its name, from those before it.

    `sql` is in the engine's dialect. `lands`: its rows go to PostgreSQL; else other steps read it. `typed` is the same
    query for PostgreSQL, over its own tables, for the types of the columns; `last`, what PostgreSQL selects from the landed
    rows `landed` to make the model's. `reads`: steps before it that it reads.
    """

    name: str
    sql: str
    reads: frozenset[str] = frozenset()
    lands: bool = False
    typed: str = ""
    last: str = ""


@dataclass(frozen=True)
class Plan:
    """What an engine does, in order, and what it reads: columns of telemetry, and of small tables of PostgreSQL.

    `compared`: times of telemetry that are only held against the start or the event time, which lie within the calendar;
    so the first and the last moment of it stand for all before and after.
    """

    dialect: Dialect
    steps: tuple[Step, ...]
    telemetry: tuple[str, ...]
    references: Mapping[str, tuple[str, ...]]
    compared: frozenset[str]

    @property
    def landing(self) -> tuple[Step, ...]:
        """The steps whose rows go to PostgreSQL, each of them a cell model."""
        return tuple(step for step in self.steps if step.lands)


def build_plan(graph: ModelGraph, dialect: Dialect) -> Plan:
    """Translate the models of cell day, and the views they read.

    Raises:
        NotPortable: naming the first model that cannot be translated faithfully, and the construct.
    """
    models = tuple(graph)
    key = (dialect, *(model.content_hash for model in models))
    if key not in _PLANS:
        _PLANS[key] = _build(graph, models, dialect)
    return _PLANS[key]


#: By dialect and the contents of the models: a plan takes a second to make.
_PLANS: dict[tuple[str, ...], Plan] = {}


def _build(graph: ModelGraph, models: tuple[SqlModel, ...], dialect: Dialect) -> Plan:
    schema = _schema(models)
    shared = shared_views(graph)
    chosen = [model for model in models if model.cell == "day"]
    bodies: list[SqlModel] = []
    named: set[str] = set()
    valued: set[str] = set()
    steps: list[Step] = []
    for view in shared:
        keep = [*view_columns(graph, view)]
        tree = _tree(graph, view, shared, schema, keep)
        steps.append(Step(view.name, _checked(view, tree, dialect), frozenset(_made(view, steps))))
        bodies.append(view)
        named |= {column.name for column in tree.find_all(exp.Column)}
        valued |= _valued(tree)
    taken_apart: set[str] = set()
    for model in chosen:
        for upstream in sorted(taken_apart & model.dependencies):
            _refuse(model, f"it reads {upstream}, whose last step only PostgreSQL computes", dialect)
        tree = _tree(graph, model, shared, schema)
        bodies += [model, *(m for m in graph.inlined_path(model) if m.materialized == "view" and m not in shared)]
        named |= {column.name for column in tree.find_all(exp.Column)}
        valued |= _valued(tree)
        part, last = _apart(tree)
        if last is not None:
            taken_apart.add(model.name)
        listed = ", ".join(f'"{column}"' for column in model.columns)
        steps.append(
            Step(
                model.name,
                _in_scope(_checked(model, part, dialect), apart=last is not None),
                frozenset(_made(model, steps)),
                lands=True,
                typed=part.sql(dialect="postgres").replace("FLYWHEEL_BYTES", ""),
                last=last or f"SELECT {listed} FROM landed",
            )
        )
    read = {name for body in bodies for name in body.dependencies}
    references = {
        name: tuple(column for column in columns_read(bodies, name, schema[name]) if column in named)
        for name in sorted(read - {TELEMETRY} - set(graph.models))
    }
    telemetry = tuple(column for column in telemetry_columns(bodies) if column in named)
    return Plan(dialect, tuple(steps), telemetry, references, TIME_COLUMNS - valued)


def _valued(tree: exp.Expr) -> set[str]:
    """The columns of which a tree wants more than how they stand to a time of the calendar."""
    return {column.name for column in tree.find_all(exp.Column) if not _is_compared(column)}


def _is_compared(column: exp.Column) -> bool:
    comparison = column.parent
    if not isinstance(comparison, _COMPARISONS):
        return False
    other = comparison.expression if comparison.this is column else comparison.this
    return isinstance(other, exp.Column) and other.name in _OF_THE_CALENDAR


def _made(model: SqlModel, steps: Iterable[Step]) -> set[str]:
    return {step.name for step in steps} & model.dependencies


def _schema(models: Iterable[SqlModel]) -> dict[str, dict[str, str]]:
    from sqlalchemy.dialects import postgresql

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    found = {
        table.name: {column.name: column.type.compile(dialect=dialect) for column in table.columns}
        for table in tables.metadata.tables.values()
    }
    found.update({model.name: {column: kind for column, (kind, _) in model.columns.items()} for model in models})
    return found


def _tree(
    graph: ModelGraph,
    model: SqlModel,
    shared: Sequence[SqlModel],
    schema: Mapping[str, Mapping[str, str]],
    keep: Sequence[str] | None = None,
) -> exp.Select:
    """The model's SELECT with the views that nobody else reads inside it, functions inlined, and only columns `keep`."""
    query = model.expression.copy()
    if not isinstance(query, exp.Select):
        raise NotPortable(f"{model.file}:{model.first_line}: an engine computes one SELECT, not a UNION.")
    if keep is not None:
        query.set("expressions", [part for part in query.expressions if part.output_name in keep])
    inside = [m for m in graph.inlined_path(model) if m.materialized == "view" and m not in shared]
    for view in reversed(inside):
        query = query.with_(
            view.name, as_=view.expression.copy(), copy=False
        )  # outermost last: each reads those before it
    for name in sorted(model.dependencies - {TELEMETRY}):
        upstream = graph.models.get(name)
        if upstream is not None and upstream.materialized != "cell" and upstream not in (*shared, *inside):
            _refuse(model, f"it reads the view {name}, which does not lead to telemetry", None)
    try:
        known = {name: schema[name] for m in (model, *inside) for name in m.dependencies}
        tree = qualified(marked(inline(query)), known)
    except Refusal as refusal:
        _refuse(model, str(refusal), None, refusal)
    assert isinstance(tree, exp.Select)  # noqa: S101
    return tree


def _checked(model: SqlModel, tree: exp.Expr, dialect: Dialect) -> str:
    try:
        check(tree)
    except Refusal as refusal:
        _refuse(model, str(refusal), dialect, refusal)
    return render(tree, dialect)


def _refuse(model: SqlModel, problem: str, dialect: str | None, cause: Exception | None = None) -> None:
    raise NotPortable(
        f"{model.file}:{model.first_line}: {model.name} cannot be computed by {dialect or 'an engine'}: {problem}.",
        hint="Say it in another way, or set FLYWHEEL_ENGINE=postgres.",
    ) from cause


def _in_scope(sql: str, *, apart: bool) -> str:
    site, day = (f"{_PARTIAL}site_id", f"{_PARTIAL}day") if apart else ("site_id", "day")
    return (
        f"SELECT m.* FROM (\n{sql}\n) AS m WHERE (m.{site}, m.{day}) IN (SELECT s.site_id, s.day FROM scope_days AS s)"
    )


def _apart(tree: exp.Select) -> tuple[exp.Select, str | None]:
    """Give what the engine selects, and what PostgreSQL selects from it where that is not the whole model."""
    if all(_passes(part) for part in tree.expressions):
        return tree, None
    if tree.args.get("distinct") or tree.args.get("order") or tree.args.get("limit"):
        return tree, None  # the check says what it is that does not pass
    engine = tree.copy()
    partials: dict[str, tuple[str, exp.Expr]] = {}

    def partial(node: exp.Expr, name: str | None = None) -> exp.Expr:
        key = node.sql(dialect="postgres")
        if key not in partials:
            partials[key] = (name or f"{_PARTIAL}{len(partials)}", node.copy())
        return exp.column(partials[key][0], table="landed")

    groups = tree.args.get("group")
    keys = {group.sql(dialect="postgres") for group in (groups.expressions if groups else ())}
    projections = {part.output_name: part for part in tree.expressions}
    for name in ("site_id", "day"):
        partial(projections[name].unalias(), f"{_PARTIAL}{name}")

    def split(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Avg) and not isinstance(node.parent, exp.Filter):
            total, count = exp.Sum(this=node.this.copy()), exp.Count(this=node.this.copy())
            total.type = exp.DataType.build("DECIMAL")
            return exp.Paren(
                this=exp.Div(
                    this=exp.cast(partial(total), "DECIMAL"),
                    expression=exp.Nullif(this=partial(count), expression=exp.Literal.number(0)),
                )
            )
        whole = isinstance(node, exp.AggFunc | exp.Filter | exp.Window) or node.sql(dialect="postgres") in keys
        if whole or isinstance(node, exp.Column):
            return partial(node)
        for name, value in list(node.args.items()):
            if isinstance(value, exp.Expr):
                node.set(name, split(value))
            elif isinstance(value, list):
                node.set(name, [split(part) if isinstance(part, exp.Expr) else part for part in value])
        return node

    last = [exp.alias_(split(part.unalias().copy()), part.output_name) for part in tree.expressions]
    engine.set("expressions", [exp.alias_(node, name) for name, node in partials.values()])
    query = exp.select(*last).from_("landed")
    return engine, query.sql(dialect="postgres")


def _passes(node: exp.Expr) -> bool:
    try:
        check(node)
    except Refusal:
        return False
    return True
