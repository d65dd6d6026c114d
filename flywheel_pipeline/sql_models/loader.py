"""Reading `dbt_like_sql/`: each file parsed, held against the rules, and placed in the graph of models.

Belongs here: the parsed model, what it depends on, its lineage, its content hash, and every refusal that
needs no database. Does not belong here: the header's form (`header.py`) and anything that touches
PostgreSQL (`sync.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import graphlib
import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, NoReturn

from sqlglot import exp
from sqlglot.dialects.postgres import Postgres
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.scope import Scope, traverse_scope
from sqlglot.tokenizer_core import Token, TokenType

from flywheel_pipeline.errors import ModelError
from flywheel_pipeline.sql_models.header import Header, read_header

ROOT_PACKAGE = "dbt_like_sql"
TELEMETRY = "execution_telemetry"
SCOPE_TABLES = frozenset({"scope_taken", "scope_input", "scope_telemetry", "scope_days", "scope_months", "scope_sites"})
SCOPE_COLUMNS: dict[str, tuple[str, ...]] = {
    "day": ("site_id", "day"),
    "month": ("site_id", "month"),
    "site": ("site_id",),
}

Materialization = Literal["view", "table", "cell"]
CellKind = Literal["day", "month", "site"]
_COARSER: dict[str, int] = {"day": 0, "month": 1, "site": 2}

# A cell must give the same rows whenever it is recomputed: nothing that reads clock, chance or session.
_CLOCK = ("now", "clock_timestamp", "statement_timestamp", "transaction_timestamp", "timeofday")
_CHANCE = ("random", "random_normal", "gen_random_uuid", "uuidv4", "uuidv7", "uuid_generate_v4")
_SESSION = ("nextval", "currval", "lastval", "txid_current", "pg_current_xact_id", "pg_backend_pid")
_CALLED = frozenset((*_CLOCK, *_CHANCE, *_SESSION))
_BARE = frozenset({"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"})
_CLOCK_LITERALS = frozenset({"now", "today", "tomorrow", "yesterday"})
_PLAIN = "A model is a plain SELECT that can be pasted into psql."
_WRITES = (exp.Insert, exp.Update, exp.Delete, exp.Merge, exp.Create, exp.Drop, exp.Alter, exp.Command)


@dataclass(frozen=True)
class SqlModel:
    """One file of `dbt_like_sql/`, parsed and checked.

    `columns` maps each output column, in order, to (PostgreSQL type, description). `sql` is the SELECT as
    written, without header and trailing semicolon. `file` is how messages name it, `path` where it lies on
    this machine, `first_line` the line of the file on which `sql` begins. `content_hash` (SHA-256) covers
    the SQL's tokens without comments and white space, the materialization, the columns' names and types,
    the key and the indexes.
    """

    name: str
    room: str
    materialized: Materialization
    cell: CellKind | None
    grain: str
    description: str
    owner: str
    key: tuple[str, ...]
    columns: Mapping[str, tuple[str, str]]
    indexes: tuple[tuple[str, ...], ...]
    consumers: tuple[str, ...]
    tags: Mapping[str, str]
    sql: str
    file: str
    path: Path
    first_line: int
    dependencies: frozenset[str]
    content_hash: str
    expression: exp.Query = field(repr=False, compare=False)
    clock_reads: tuple[tuple[str, int], ...] = field(default=(), repr=False, compare=False)
    _lineage: Callable[[], dict[str, list[tuple[str, str]]]] = field(default=dict, repr=False, compare=False)

    @functools.cached_property
    def column_lineage(self) -> dict[str, list[tuple[str, str]]]:
        """Map each output column to the (relation, column) pairs it is computed from, sorted.

        Relations are the direct dependencies: models are not looked through. `count(*)` depends on no column.
        Computed on first use (about 10 ms a model), since most runs never ask.
        """
        return self._lineage()

    @functools.cached_property
    def names_used(self) -> frozenset[str]:
        """Every column name in the SELECT, of whatever relation. Computed on first use: each refresh asks."""
        names = {column.name for column in self.expression.find_all(exp.Column)}
        names |= {column.name for join in self.expression.find_all(exp.Join) for column in join.args.get("using") or ()}
        return frozenset(names)

    @functools.cached_property
    def read_whole(self) -> frozenset[str]:
        """Relations of which the SELECT takes a star or the whole row. Computed on first use."""
        found: set[str] = set()
        for scope in traverse_scope(self.expression):
            names = {column.name for column in scope.expression.find_all(exp.Column)}
            stars = list(scope.expression.find_all(exp.Star))
            for alias, source in scope.sources.items():
                if isinstance(source, exp.Table) and (
                    alias in names
                    or any(
                        star.parent is scope.expression
                        or (isinstance(star.parent, exp.Column) and star.parent.table == alias)
                        for star in stars
                    )
                ):
                    found.add(source.name)
        return frozenset(found)

    @property
    def scope_columns(self) -> tuple[str, ...]:
        """Columns that name the cell of a row: (site_id, day), (site_id, month), (site_id,); none for other models."""
        return SCOPE_COLUMNS[self.cell] if self.cell else ()

    def refuse(self, problem: str, *, line: int | None = None, hint: str | None = None) -> NoReturn:
        """Raise ModelError naming this file, and the line if known."""
        raise ModelError(f"{self.file}:{line or self.first_line}: {problem}", hint=hint)


@dataclass(frozen=True)
class ModelGraph:
    """All models, each after those it reads, and the tables of the declared schema that they read."""

    models: Mapping[str, SqlModel]
    source_tables: frozenset[str]

    def __iter__(self) -> Iterator[SqlModel]:
        """Give the models in an order in which they can be created."""
        return iter(self.models.values())

    def dependants(self, name: str) -> list[SqlModel]:
        """Models that read `name` (a model or table), directly or through others, in creation order."""
        reached = {name}
        found = []
        for model in self:
            if model.dependencies & reached:
                reached.add(model.name)
                found.append(model)
        return found

    def inlined_path(self, model: SqlModel) -> list[SqlModel]:
        """What stands between a cell model and its scoped inputs, in creation order, the model itself left
        out.

        Views that lead to telemetry or to another cell model, and those cell models. What lies behind an
        upstream cell model is not on the path: its table is read. Views over other tables only are not on
        it either.
        """
        on_path: set[str] = set()

        def scoped(name: str) -> bool:
            if name == TELEMETRY:
                return True
            upstream = self.models.get(name)
            if upstream is None or upstream.materialized == "table":
                return False
            if upstream.materialized == "cell":
                on_path.add(name)
                return True
            leads_there = [scoped(below) for below in upstream.dependencies]  # a list: each must be visited
            if any(leads_there):
                on_path.add(name)
                return True
            return False

        for name in model.dependencies:
            scoped(name)
        return [m for m in self if m.name in on_path]

    def views_below(self, model: SqlModel) -> list[SqlModel]:
        """Views that PostgreSQL would expand when this model's SELECT runs, in creation order."""
        found: set[str] = set()
        waiting = list(model.dependencies)
        while waiting:
            upstream = self.models.get(waiting.pop())
            if upstream is not None and upstream.materialized == "view" and upstream.name not in found:
                found.add(upstream.name)
                waiting.extend(upstream.dependencies)
        return [m for m in self if m.name in found]


def load_models(root: Traversable | None = None) -> ModelGraph:
    """Read every `<room>/<name>.sql` under `root` and return the checked graph.

    Args:
        root: folder of rooms; None takes the installed `dbt_like_sql` package.

    Raises:
        ModelError: a file breaks a rule; the message names the file, the line where known, and the rule.
    """
    return _installed_models() if root is None else _load(root)


@functools.cache
def _installed_models() -> ModelGraph:
    """The models of the installed package, read once a process: they are part of the release."""
    return _load(importlib.resources.files(ROOT_PACKAGE))


def _load(root: Traversable) -> ModelGraph:
    found: list[tuple[str, str, Traversable]] = [
        (room.name, entry.name.removesuffix(".sql"), entry)
        for room in root.iterdir()
        if room.is_dir()
        for entry in room.iterdir()
        if entry.name.endswith(".sql")
    ]
    found.sort(key=lambda item: item[:2])
    tables = _declared_tables()
    places: dict[str, str] = {}
    for room, name, _ in found:
        file = f"{root.name}/{room}/{name}.sql"
        if name in places:
            raise ModelError(f"{file}:1: the name {name} is already taken by {places[name]}.")
        if name in tables or name in SCOPE_TABLES:
            raise ModelError(f"{file}:1: the name {name} is that of a table.", hint="Rename the model.")
        places[name] = file
    taken = frozenset(places) | frozenset(tables) | SCOPE_TABLES
    parsed = {name: _read(entry, root.name, room, name, taken) for room, name, entry in found}

    order = graphlib.TopologicalSorter(
        {name: sorted(model.dependencies & parsed.keys()) for name, model in parsed.items()}
    )
    try:
        ordered = list(order.static_order())
    except graphlib.CycleError as error:
        cycle = error.args[1]
        raise ModelError(
            f"{parsed[cycle[0]].file}:1: models read each other in a circle: {' -> '.join(cycle)}."
        ) from error
    known_columns: dict[str, dict[str, str]] = dict(tables)
    known_columns.update({m.name: {c: t for c, (t, _) in m.columns.items()} for m in parsed.values()})
    models = {name: _with_lineage(parsed[name], known_columns) for name in ordered}
    sources = frozenset(d for m in models.values() for d in m.dependencies) - models.keys()
    graph = ModelGraph(models, frozenset(sources))
    for model in graph:
        if model.cell:
            _check_cell(graph, model)
    return graph


def telemetry_columns(models: Iterable[SqlModel]) -> list[str]:
    """Columns of execution_telemetry that these models may read, in the table's order: a safe superset."""
    return columns_read(models, TELEMETRY, _declared_tables()[TELEMETRY])


def columns_read(models: Iterable[SqlModel], relation: str, columns: Iterable[str]) -> list[str]:
    """Those `columns` of a relation that these models may read, in the given order: a safe superset.

    All of them where a model takes a star or the whole row of the relation.
    """
    columns = list(columns)
    used: set[str] = set()
    for model in models:
        if relation not in model.dependencies:
            continue
        if relation in model.read_whole:
            return columns
        used |= model.names_used
    return [column for column in columns if column in used]


@functools.cache
def _declared_tables() -> dict[str, dict[str, str]]:
    """Map each declared table to its columns and their types, as sqlglot's schema wants them."""
    from sqlalchemy.dialects import postgresql

    from flywheel_pipeline.database.tables import metadata

    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return {
        table.name: {column.name: column.type.compile(dialect=dialect) for column in table.columns}
        for table in metadata.tables.values()
    }


def _read(
    entry: Traversable,
    root_name: str,
    room: str,
    name: str,
    taken: frozenset[str],
) -> SqlModel:
    file = f"{root_name}/{room}/{name}.sql"
    try:
        text = entry.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}:1: the file is not UTF-8 ({error.reason} at byte {error.start}).") from error
    header, body_start = read_header(text, file=file, room=room, name=name)

    def refuse(problem: str, line: int, hint: str | None = None) -> NoReturn:
        raise ModelError(f"{file}:{line}: {problem}", hint=hint)

    lines_before = text.count("\n", 0, body_start)
    body = text[body_start:]
    leading = body[: len(body) - len(body.lstrip())]
    first_line = lines_before + leading.count("\n") + 1
    body = body.strip()
    try:
        tokens = Postgres().tokenize(body)
    except SqlglotError as error:
        refuse(f"the SQL cannot be read: {error}.", first_line)
    while tokens and tokens[-1].token_type == TokenType.SEMICOLON:
        body = body[: tokens[-1].start].rstrip()
        tokens = tokens[:-1]
    if not tokens:
        refuse("no SELECT follows the header.", first_line)

    def line_of(token: Token) -> int:
        return first_line + body.count("\n", 0, token.start)

    for left, right in itertools.pairwise(tokens):
        braces = left.token_type == right.token_type == TokenType.L_BRACE
        if braces or left.token_type == TokenType.BLOCK_START:
            refuse("the SQL has a template in it.", line_of(left), _PLAIN)
    try:
        statements = Postgres().parse(body)
    except SqlglotError as error:
        detail = getattr(error, "errors", None) or [{}]
        where = first_line + int(detail[0].get("line") or 1) - 1
        said = detail[0].get("description") or "not valid PostgreSQL"
        near = detail[0].get("highlight") or ""
        refuse(f"the SQL does not parse: {said}" + (f" (near {near!r})." if near else "."), where)
    if len(statements) != 1:
        semicolon = next(t for t in tokens if t.token_type == TokenType.SEMICOLON)
        refuse(f"a model is one SELECT; this file has {len(statements)} statements.", line_of(semicolon))
    query = statements[0]
    if isinstance(query, exp.Query) and not isinstance(query, exp.Subquery | exp.Values | exp.Table):
        expression = query
    else:
        refuse("a model is one SELECT, which may begin with WITH.", first_line)
    _check_select(expression, refuse, first_line, taken)
    _check_columns(header, expression, refuse, first_line)
    dependencies = _dependencies(expression, refuse, first_line)
    for dependency in sorted(dependencies - taken):
        refuse(
            f"{dependency} is neither a model nor a table of the declared schema.",
            _line_of_name(tokens, dependency, line_of, first_line),
            "Tables are declared in flywheel_pipeline/database/tables.py, models in dbt_like_sql/.",
        )
    for dependency in sorted(dependencies & SCOPE_TABLES):
        refuse(
            f"{dependency} is a table of the refresh, which no model may read.",
            _line_of_name(tokens, dependency, line_of, first_line),
        )
    return SqlModel(
        name=name,
        room=room,
        materialized=header.materialized,
        cell=header.cell,
        grain=header.grain,
        description=" ".join(header.description.split()),
        owner=header.owner,
        key=tuple(header.key),
        columns={column: (given[0], given[1]) for column, given in header.columns.items()},
        indexes=tuple(tuple(index) for index in header.indexes),
        consumers=tuple(header.consumers),
        tags=dict(header.tags),
        sql=body,
        file=file,
        path=Path(str(entry)),
        first_line=first_line,
        dependencies=dependencies,
        content_hash=_content_hash(header, body, tokens),
        expression=expression,
        clock_reads=tuple(_clock_reads(expression, tokens, line_of, first_line)),
    )


def _content_hash(header: Header, body: str, tokens: list[Token]) -> str:
    """SHA-256 over tokens, materialization, columns and key.

    Tokens and not the syntax tree: the tree maps different spellings to one node (now() and
    CURRENT_TIMESTAMP), and a new sqlglot may print it differently. Unquoted words are compared in lower
    case, as PostgreSQL does.
    """
    raw = [body[token.start : token.end + 1] for token in tokens]
    spelled = [word if any(mark in word for mark in "'\"$") else word.lower() for word in raw]
    document = {
        "sql": spelled,
        "materialized": header.materialized,
        "cell": header.cell,
        "columns": [[column, given[0]] for column, given in header.columns.items()],
        "key": header.key,
    }
    if header.indexes:
        document["indexes"] = header.indexes
    return hashlib.sha256(json.dumps(document, ensure_ascii=False).encode()).hexdigest()


def _check_select(query: exp.Query, refuse: Callable[..., NoReturn], line: int, taken: frozenset[str]) -> None:
    for node in query.walk():
        if isinstance(node, _WRITES):
            refuse("a model only reads; this one has a data-modifying statement in it.", line)
        if isinstance(node, exp.Into):
            refuse("SELECT INTO creates a table; the header says how a model is materialized.", line)
        if isinstance(node, exp.Lock):
            refuse("a model takes no row locks (FOR UPDATE, FOR SHARE).", line)
        if isinstance(node, exp.Placeholder | exp.Parameter):
            refuse(
                f"the SQL has a placeholder in it ({node.sql(dialect='postgres')}).",
                line,
                _PLAIN,
            )
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier) and node.args.get("db"):
            refuse(
                f"{node.sql(dialect='postgres', comments=False)} is named with its schema.",
                line,
                "Leave the schema out: only then can a refresh put the touched cells in its place.",
            )
        if isinstance(node, exp.CTE) and node.alias in taken:
            refuse(f"the CTE {node.alias} hides a table or model of that name.", line, "Rename the CTE.")


def _check_columns(header: Header, query: exp.Query, refuse: Callable[..., NoReturn], line: int) -> None:
    if any(select.is_star for branch in _branches(query) for select in branch.selects):
        refuse("SELECT * at the top level: name the columns.", line)
    real = [select.output_name for select in query.selects]
    if "" in real:
        refuse(f"column {real.index('') + 1} of the SELECT has no name.", line, "Give it one with AS.")
    repeated = sorted({column for column in real if real.count(column) > 1})
    if repeated:
        refuse(f"the SELECT gives the column {repeated[0]} twice.", line)
    declared = list(header.columns)
    if declared != real:
        missing = [column for column in declared if column not in real]
        extra = [column for column in real if column not in declared]
        if missing or extra:
            parts = []
            if missing:
                parts.append(f"declared but not selected: {', '.join(missing)}")
            if extra:
                parts.append(f"selected but not declared: {', '.join(extra)}")
            refuse(f"the columns differ from the header; {'; '.join(parts)}.", line)
        first = next(i for i, pair in enumerate(zip(declared, real, strict=True)) if pair[0] != pair[1])
        refuse(
            f"the columns stand in another order than in the header: column {first + 1} is declared as "
            f"{declared[first]} and selected as {real[first]}.",
            line,
        )


def _branches(query: exp.Expr) -> Iterator[exp.Select]:
    """Give the SELECTs of a top-level UNION, INTERSECT or EXCEPT, or the one SELECT."""
    if isinstance(query, exp.SetOperation):
        for side in (query.left, query.right):
            yield from _branches(side.unnest() if isinstance(side, exp.Subquery) else side)
    elif isinstance(query, exp.Select):
        yield query


def _dependencies(query: exp.Query, refuse: Callable[..., NoReturn], line: int) -> frozenset[str]:
    """Tables and models read: by scope, so that a CTE's name is never taken for a table's.

    A CTE may not carry a table's name, hence every other table node of the tree can be added: nothing that
    scope analysis passes over is missed.
    """
    try:
        scopes: list[Scope] = list(traverse_scope(query))
    except SqlglotError as error:
        refuse(f"the SQL cannot be analysed: {error}.", line)
    by_scope = {
        source.name
        for scope in scopes
        for source in scope.sources.values()
        if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier)
    }
    ctes = {cte.alias for cte in query.find_all(exp.CTE)}
    by_node = {table.name for table in query.find_all(exp.Table) if isinstance(table.this, exp.Identifier)}
    return frozenset(by_scope | (by_node - ctes))


def _line_of_name(tokens: list[Token], name: str, line_of: Callable[[Token], int], first_line: int) -> int:
    return next((line_of(token) for token in tokens if token.text.lower() == name), first_line)


def _clock_reads(
    query: exp.Query, tokens: list[Token], line_of: Callable[[Token], int], first_line: int
) -> Iterator[tuple[str, int]]:
    """Give (what, line) for everything in the SQL whose value changes from one execution to the next."""
    for position, token in enumerate(tokens):
        word = token.text.lower()
        called = position + 1 < len(tokens) and tokens[position + 1].token_type == TokenType.L_PAREN
        is_string = token.token_type == TokenType.STRING
        if not is_string and ((word in _CALLED and called) or word in _BARE):
            yield (f"{word}()" if word in _CALLED else word), line_of(token)
        if is_string and word.strip() in _CLOCK_LITERALS:
            literal = next(
                (c for c in query.find_all(exp.Cast) if c.this.is_string and c.this.name == token.text), None
            )
            if literal is not None and literal.is_type("date", "timestamp", "timestamptz", "time", "timetz"):
                yield f"'{token.text}' as a time", line_of(token)
    if query.find(exp.TableSample):
        yield "TABLESAMPLE", first_line


def _check_cell(graph: ModelGraph, model: SqlModel) -> None:
    """Refuse a cell model whose rows would depend on more than its own cell, or on the moment."""
    for reader in (model, *graph.views_below(model)):
        via = "" if reader is model else f" (read by the cell model {model.name})"
        for what, line in reader.clock_reads:
            reader.refuse(
                f"a cell model must give the same rows whenever it runs; this uses {what}{via}.",
                line=line,
                hint="Compare with a stored time instead, or make it a view on top of the cells.",
            )
        for name in sorted(reader.dependencies):
            upstream = graph.models.get(name)
            if upstream is not None and upstream.materialized == "table":
                reader.refuse(
                    f"a cell model may not read {name}, which is rebuilt as a whole{via}.",
                    hint="A rebuilt table touches no cells. Make it a view or a cell model.",
                )
            if upstream is not None and upstream.cell and model.cell and _COARSER[upstream.cell] > _COARSER[model.cell]:
                reader.refuse(
                    f"a model of cell {model.cell} may not read {name}, of cell {upstream.cell}{via}.",
                    hint=f"One {model.cell} would change all other {model.cell}s of the {upstream.cell}.",
                )
            if name == TELEMETRY and model.cell != "day":
                reader.refuse(
                    f"a model of cell {model.cell} reads telemetry through a model of cell day, not directly{via}.",
                    hint="A refresh gives it the touched days of telemetry only.",
                )


def _with_lineage(model: SqlModel, known_columns: Mapping[str, Mapping[str, str]]) -> SqlModel:
    schema: dict[str, object] = {name: dict(known_columns[name]) for name in sorted(model.dependencies)}
    return dataclasses.replace(model, _lineage=functools.partial(_trace, model, schema))


def _trace(model: SqlModel, schema: dict[str, object]) -> dict[str, list[tuple[str, str]]]:
    from sqlglot.lineage import lineage
    from sqlglot.optimizer.qualify import qualify
    from sqlglot.optimizer.scope import build_scope

    try:
        qualified = qualify(
            model.expression.copy(),
            schema=schema,
            dialect="postgres",
            validate_qualify_columns=False,
            quote_identifiers=False,
            identify=False,
        )
        scope = build_scope(qualified)
        traced: dict[str, list[tuple[str, str]]] = {}
        for column in model.columns:
            node = lineage(
                column,
                qualified,
                scope=scope,
                schema=schema,
                dialect="postgres",
                trim_selects=False,
                copy=False,
            )
            pairs = [
                (leaf.source.name, leaf.name.rsplit(".", 1)[-1].strip('"'))
                for leaf in node.walk()
                if isinstance(leaf.source, exp.Table) and leaf.source.name in schema
            ]
            traced[column] = sorted(set(pairs))
    except SqlglotError as error:
        model.refuse(f"the column lineage cannot be read: {error}.")
    return traced
