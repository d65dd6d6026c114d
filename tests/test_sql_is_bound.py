"""No value becomes part of an SQL text, anywhere in the package: values are bound, and names are listed here by reason.

The scan is of the source. It follows what a function or a module assigns and what a helper of the package hands on to
the database; it does not follow attributes, nor what a function returns, which is listed here where it is a whole text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from flywheel_pipeline.sql_models.relations import literal, quote

PACKAGE = Path(__file__).parents[1] / "flywheel_pipeline"
#: What takes an SQL text: of SQLAlchemy, psycopg, DuckDB and Spark, pandas.
RUNS_SQL = {
    "text",
    "execute",
    "executemany",
    "exec_driver_sql",
    "scalar",
    "scalars",
    "stream",
    "stream_scalars",
    "copy",
    "copy_expert",
    "sql",
    "SQL",
    "read_sql",
    "read_sql_query",
}
#: Names of the arguments that are the text. Any other one is a value, and may be composed as it likes.
TEXTS = {"query", "statement", "sql", "text", "operation", "obj", "sqlQuery"}
HANDLES = {"connection", "cursor", "session"}
NO_SQL = {"axes", "MetadataValue"}  # matplotlib's and Dagster's `text`
#: What quotes a name or a value: of psycopg, and the package's own, which are tried below.
QUOTED = {"Identifier", "Literal", "Placeholder", "quote", "literal", "_qualified"}
NUMBERS = {"int", "len", "float"}
SAME_TEXT = {"strip", "lstrip", "rstrip", "lower", "upper", "dedent"}
ADDS = {"append", "extend", "insert", "add", "update"}
SAME_ITEMS = {"sorted", "list", "tuple", "set", "dict", "reversed", "enumerate", "zip", "range"}


def called(node: ast.expr) -> str:
    """The last name of what is called."""
    if isinstance(node, ast.Call):
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return ""


Source = tuple[str, ast.expr]  # how a name came by it ("is" it, one "of" its items, has it as a "part"), and what


@dataclass
class Scope:
    """A module, or a function within one: what its names were given."""

    name: str
    outer: Scope | None = None
    names: dict[str, list[Source]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def give(self, target: ast.expr, how: str, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.names.setdefault(target.id, []).append((how, value))
        elif isinstance(target, (ast.Tuple, ast.List)):
            same = isinstance(value, (ast.Tuple, ast.List)) and how == "is" and len(value.elts) == len(target.elts)
            for n, part in enumerate(target.elts):
                self.give(part, how if same else "of", value.elts[n] if same else value)  # type: ignore[attr-defined]
        elif isinstance(target, ast.Starred):
            self.give(target.value, "of", value)
        elif isinstance(target, ast.Subscript):
            self.give(target.value, how, value)

    def find(self, name: str) -> tuple[list[Source], bool]:
        """What a name was given, and whether that is all: a parameter or an import brings more, which is not followed."""
        if name in self.parameters:
            return self.names.get(name, []), False
        if name in self.names:
            return self.names[name], True
        return self.outer.find(name) if self.outer is not None else ([], False)

    def is_of_the_module(self, name: str) -> bool:
        if name in self.parameters:
            return False
        return self.outer is None or (name not in self.names and self.outer.is_of_the_module(name))


def scopes(tree: ast.Module) -> Iterator[tuple[Scope, list[ast.AST]]]:
    """Each scope with the nodes that are its own."""

    def enter(scope: Scope, body: list[ast.AST]) -> Iterator[tuple[Scope, list[ast.AST]]]:
        own: list[ast.AST] = []
        inner: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
        waiting = list(body)
        while waiting:
            node = waiting.pop(0)
            own.append(node)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner.append(node)
                waiting += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
                continue
            waiting += ast.iter_child_nodes(node)
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    scope.give(target, "is", node.value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                scope.give(node.target, "is", node.value)
            elif isinstance(node, ast.AugAssign):
                scope.give(node.target, "part", node.value)
            elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
                scope.give(node.target, "of", node.iter)
            elif called(node) in ADDS and isinstance(node.func, ast.Attribute):  # type: ignore[attr-defined, arg-type]
                for argument in node.args:  # type: ignore[attr-defined]
                    scope.give(node.func.value, "is", argument)  # type: ignore[attr-defined]
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                scope.give(node.optional_vars, "of", node.context_expr)
        yield scope, own
        for function in inner:
            a = function.args
            names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p is not None]
            qualified = f"{scope.name}.{function.name}" if scope.outer else function.name
            yield from enter(Scope(qualified, scope, parameters=names), list(function.body))

    yield from enter(Scope("<module>"), list(tree.body))


def put_in(node: ast.expr, scope: Scope, *, inside: bool, seen: frozenset[str] = frozenset()) -> Iterator[ast.expr]:
    """What is put into the text that `node` gives, constants apart; `inside`: it is itself put into another one.

    A whole argument that nobody composed here (a parameter, a statement of SQLAlchemy) is no finding. Within a text,
    whatever is not known to be a constant is one.
    """

    def within(*parts: ast.expr) -> Iterator[ast.expr]:
        for part in parts:
            yield from put_in(part, scope, inside=True, seen=seen)

    name = called(node)
    method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if isinstance(node, ast.Constant):
        return
    if isinstance(node, ast.JoinedStr):
        yield from within(*(value.value for value in node.values if isinstance(value, ast.FormattedValue)))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        yield from within(node.left, node.right)
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        yield from within(*node.elts) if inside else ()
    elif isinstance(node, ast.Dict):
        yield from within(*(key for key in node.keys if key), *node.values) if inside else ()
    elif isinstance(node, ast.Starred):
        yield from within(node.value)
    elif isinstance(node, ast.IfExp):
        for branch in (node.body, node.orelse):
            yield from put_in(branch, scope, inside=inside, seen=seen)
    elif isinstance(node, ast.BoolOp):
        for branch in node.values:
            yield from put_in(branch, scope, inside=inside, seen=seen)
    elif isinstance(node, ast.NamedExpr):
        yield from put_in(node.value, scope, inside=inside, seen=seen)
    elif isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
        yield from within(node.elt) if inside else ()
    elif method and name in ("format", "format_map", "join", "replace"):
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Attribute)
        yield from within(node.func.value, *node.args, *(keyword.value for keyword in node.keywords))
    elif name in SAME_TEXT and isinstance(node, ast.Call):
        whole = node.func.value if isinstance(node.func, ast.Attribute) and name != "dedent" else node.args[0]
        yield from put_in(whole, scope, inside=inside, seen=seen)
    elif name in ("SQL", "text") and isinstance(node, ast.Call) and inside:
        yield from within(*node.args[:1])
    elif name in QUOTED or name in NUMBERS:
        return
    elif name == "map" and isinstance(node, ast.Call) and inside:
        if not (
            isinstance(node.args[0], (ast.Name, ast.Attribute)) and ast.unparse(node.args[0]).split(".")[-1] in QUOTED
        ):
            yield from within(*node.args)
    elif name in SAME_ITEMS and isinstance(node, ast.Call) and inside:
        yield from within(*node.args)
    elif method and name in ("items", "values", "keys") and isinstance(node.func, ast.Attribute) and inside:  # type: ignore[attr-defined]
        yield from within(node.func.value)  # type: ignore[attr-defined]
    elif isinstance(node, ast.Subscript) and inside:
        yield from within(node.value)
    elif isinstance(node, ast.Attribute):
        if inside and not (node.attr.isupper() and len(node.attr) > 1):
            yield node
    elif isinstance(node, ast.Name):
        given, that_is_all = scope.find(node.id)
        if node.id in seen or (node.id.isupper() and len(node.id) > 1 and scope.is_of_the_module(node.id)):
            return
        if inside and not that_is_all:
            yield node
        for how, value in given:
            if how != "of":
                yield from put_in(value, scope, inside=inside or how == "part", seen=seen | {node.id})
            elif inside:
                left = list(put_in(value, scope, inside=True, seen=seen | {node.id}))
                yield from [node] if left else []
    elif inside:
        yield node


@dataclass(frozen=True)
class Finding:
    """One value in one text."""

    function: str
    line: int
    value: str


def shown(value: ast.expr) -> str:
    """The expression; of a call, what is called."""
    return f"{ast.unparse(value.func)}()" if isinstance(value, ast.Call) else ast.unparse(value)


Helpers = Mapping[str, frozenset[str | int]]


def texts(call: ast.Call, helpers: Helpers) -> Iterator[ast.expr]:
    """The arguments of a call that are SQL texts."""
    name = called(call)
    if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value).rpartition(".")[2] in NO_SQL:
        return
    if name in RUNS_SQL:
        # `execute(connection, "…")` and `cursor.execute("…")`; a value of the second form is no text that is composed.
        yield from call.args[: 1 if isinstance(call.func, ast.Attribute) else 2]
        yield from (keyword.value for keyword in call.keywords if keyword.arg in TEXTS)
    for place in helpers.get(name, ()):
        if isinstance(place, int):
            yield from call.args[place : place + 1]
        else:
            yield from (keyword.value for keyword in call.keywords if keyword.arg == place)


def hands_on(tree: ast.Module) -> dict[str, frozenset[str | int]]:
    """Functions that hand a parameter on to the database as a text, and which parameter that is."""
    found: dict[str, frozenset[str | int]] = {}
    for scope, nodes in scopes(tree):
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            for argument in texts(call, {}):
                for value in (argument, *put_in(argument, scope, inside=False)):
                    if isinstance(value, ast.Name) and value.id in set(scope.parameters) - HANDLES:
                        name = scope.name.rpartition(".")[2]
                        place = scope.parameters.index(value.id) - (scope.parameters[0] == "self")
                        found[name] = found.get(name, frozenset()) | {value.id, place}
    return found


def imported(tree: ast.Module, of_modules: Mapping[str, Helpers]) -> Helpers:
    """The helpers that a module imports, by the names it has for them; those of a module it imports, by their own."""
    known: dict[str, frozenset[str | int]] = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            helper = of_modules.get(str(node.module), {}).get(alias.name)  # type: ignore[attr-defined]
            known |= {alias.asname or alias.name: helper} if helper else {}
            known |= of_modules.get(f"{node.module}.{alias.name}", {})  # type: ignore[attr-defined]
    return known


def is_made_by_a_function(call: ast.Call, argument: ast.expr) -> bool:
    """Whether a function gives the whole text, which is then judged as if it were put into one."""
    return isinstance(argument, ast.Call) and (
        isinstance(argument.func, ast.Name) or called(call) in ("text", "exec_driver_sql", "copy", "SQL")
    )


def findings(source: str, helpers: Helpers | None = None) -> list[Finding]:
    """What is put into the SQL texts of a module, by the line of the call that takes the text."""
    tree = ast.parse(source)
    known = {**(helpers or {}), **hands_on(tree)}
    return sorted(
        {
            Finding(scope.name, call.lineno, shown(value))
            for scope, nodes in scopes(tree)
            for call in nodes
            if isinstance(call, ast.Call)
            for argument in texts(call, known)
            for value in put_in(argument, scope, inside=is_made_by_a_function(call, argument))
        },
        key=lambda f: (f.line, f.value),
    )


MODELS = "names, columns and SQL of the model files of the package"
OWN_TABLES = "names of the package's own tables and columns"
TEMPORARY = "names of temporary tables, made of names of models"
CATALOG = "PostgreSQL quoted it: regclass::text or format('%I')"
PERIOD = "a condition over a column named here; its days are bound"
#: What may be put into an SQL text without being quoted or bound, by file and function: the expressions, and why.
ALLOWED: dict[tuple[str, str], tuple[set[str], str]] = {
    ("archive/export.py", "_control"): ({"columns.control_query()", "columns.unrepresentable_query()"}, OWN_TABLES),
    ("archive/stream.py", "day_batches"): ({"rows_query()"}, OWN_TABLES),
    ("aggregates/refresh.py", "refresh"): ({"model.name"}, TEMPORARY),
    ("aggregates/refresh.py", "_take"): ({"name"}, "columns of execution_telemetry that the models read"),
    ("aggregates/refresh.py", "_read_shared_views"): ({"table", "view_query()"}, MODELS),
    ("aggregates/refresh.py", "_drop_scope"): ({"name"}, TEMPORARY),
    ("aggregates/refresh.py", "_changed_keys"): ({"c", "m.name", "model.name"}, MODELS),
    ("database/adopt.py", "run"): ({"self.new_archive()"}, "flywheel_undone_ and a number"),
    ("database/adopt.py", "take_down_policies"): ({"policy.relation", "relation"}, CATALOG),
    ("database/adopt.py", "take_down_triggers"): ({"trigger.relation", "row.signature"}, CATALOG),
    ("database/adopt.py", "archive_added_columns"): ({"archive"}, "new_archive(): flywheel_undone_ and a number"),
    ("database/adopt.py", "remove_seeded"): ({"archive"}, "new_archive(): flywheel_undone_ and a number"),
    ("database/adopt.py", "restore_rules"): ({"name"}, "each was quoted where the list was made"),
    ("database/adopt_catalog.py", "as_written"): ({"re.sub()"}, "what pg_get_constraintdef printed of a constraint"),
    ("database/adopt_catalog.py", "set_aside"): ({"view.name"}, CATALOG),
    ("database/adopt_plan.py", "count"): ({"condition", "self.q"}, "a quoted table; callers are judged themselves"),
    ("database/adopt_plan.py", "judge_default"): ({"self.q"}, "the table's name, quoted"),
    ("database/adopt_plan.py", "judge_key"): ({"self.q"}, "the table's name, quoted"),
    ("database/adopt_plan.py", "judge_check"): ({"next()"}, "the text of a check constraint of tables.py"),
    ("database/drift.py", "_snapshot"): ({"schema"}, "callers are judged themselves"),
    ("database/migrations/versions/0008_manifests_by_content.py", "upgrade"): ({"_our_readers()"}, CATALOG),
    ("database/roles.py", "_say"): ({"composed.as_string()"}, "psycopg composed it of identifiers"),
    ("database/roles.py", "_open_dagster"): ({"kind"}, "words of GRANT from the lists of this module"),
    ("database/roles.py", "_grant"): ({"verb", "preposition", "word"}, "words of GRANT from the lists of this module"),
    ("delivery/tombstones.py", "compare_contents"): ({"changed"}, "callers are judged themselves"),
    ("doctor.py", "_cells_against_models"): ({"model.name", "model.key", "model.columns", "model.sql"}, MODELS),
    ("engines/duck.py", "compute"): ({"step.sql"}, MODELS),
    ("engines/duck.py", "prepare"): ({"telemetry_select()"}, "columns of execution_telemetry that the models read"),
    ("engines/landing.py", "land"): ({"table", "typed"}, "callers are judged themselves"),
    ("engines/source.py", "export_live"): (
        {"name", "_within()"},
        "columns of execution_telemetry that the models read",
    ),
    ("engines/source.py", "reference"): ({"column", "name", "_within()"}, OWN_TABLES),
    ("engines/source.py", "scope_table"): ({"name"}, TEMPORARY),
    ("engines/work.py", "compute_scope"): ({"step.name"}, TEMPORARY),
    ("report/overview.py", "_volume"): ({"within_day()"}, PERIOD),
    ("report/overview.py", "_decisions"): ({"within_time()"}, PERIOD),
    ("report/rule.py", "_history"): ({"within_time()"}, PERIOD),
    ("sql_models/cells.py", "take_empty"): ({"table", "names", "mode"}, MODELS),
    ("sql_models/cells.py", "recompute"): ({"model.name", "changed", "computed", "cell_query()"}, MODELS),
    ("sql_models/cells.py", "_write"): ({"changed", "statement"}, "callers are judged themselves"),
    ("sql_models/cells.py", "_write_differences"): ({"model.name", "column", "query", "_standing_rows()"}, MODELS),
    ("sql_models/cells.py", "_standing_rows"): ({"model.name", "scope.table"}, MODELS),
    ("sql_models/cells.py", "_renew_statistics"): ({"model.name"}, MODELS),
    ("sql_models/relations.py", "verify_columns"): ({"model.sql"}, MODELS),
    ("sql_models/relations.py", "create_view"): ({"model.sql"}, MODELS),
    ("sql_models/relations.py", "create_empty_table"): (
        {"declared"},
        "the quoted columns and types of a model's header",
    ),
    ("sql_models/relations.py", "drop"): ({"{'v': 'VIEW', 'm': 'MATERIALIZED VIEW'}.get()"}, "three constants"),
    ("sql_models/sync.py", "create_table_swap"): ({"model.sql"}, MODELS),
    ("sql_models/sync.py", "_fill"): ({"model.sql"}, MODELS),
    ("telemetry/quality.py", "_violations"): ({"where"}, "callers are judged themselves"),
}


@cache
def found_in_the_package() -> dict[tuple[str, str], dict[str, int]]:
    """By file and function: what is put into its texts, and where."""
    sources = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    of_modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): hands_on(ast.parse(source))
        for path, source in sources.items()
    }
    found: dict[tuple[str, str], dict[str, int]] = {}
    for path, source in sources.items():
        for one in findings(source, imported(ast.parse(source), of_modules)):
            place = (path.relative_to(PACKAGE).as_posix(), one.function.rpartition(".")[2])
            found.setdefault(place, {})[one.value] = one.line
    return found


def test_only_what_is_listed_is_put_into_an_sql_text() -> None:
    unlisted = [
        f"{file}:{line}: {function} puts {value} into an SQL text: bind it, or quote it"
        for (file, function), values in found_in_the_package().items()
        for value, line in values.items()
        if value not in ALLOWED.get((file, function), (set(), ""))[0]
    ]
    assert unlisted == []


def test_all_that_is_listed_is_there() -> None:
    found = found_in_the_package()
    stale = {place: left for place, (values, _) in ALLOWED.items() if (left := values - found.get(place, {}).keys())}
    assert stale == {}


def test_what_quotes_leaves_no_way_out() -> None:
    assert quote('a" FROM b; --') == '"a"" FROM b; --"'
    assert literal("a'; DROP TABLE b; --") == "'a''; DROP TABLE b; --'"


def test_where_appliances_speak_nothing_is_listed_but_conditions_of_the_module() -> None:
    hostile = ("delivery/api/", "delivery/tokens.py", "delivery/publish.py", "telemetry/")
    assert [place for place in ALLOWED if place[0].startswith(hostile)] == [("telemetry/quality.py", "_violations")]


@pytest.mark.parametrize(
    "source",
    [
        "connection.execute(sa.text(f'SELECT {name}'))",
        "connection.execute(sa.text('SELECT ' + name))",
        "cursor.execute('SELECT %s' % name)",
        "cursor.execute('SELECT %s, %s' % (a, name))",
        "connection.exec_driver_sql('SELECT {}'.format(name))",
        "connection.exec_driver_sql('SELECT {n}'.format(n=name))",
        "connection.exec_driver_sql('SELECT {n}'.format_map(values))",
        "execute(connection, f'SELECT {row.name}')",
        "execute('SELECT ' + name)",
        "execute(f'SELECT ' + name + ' FROM t')",
        "q = f'SELECT {name}'; execute(q)",
        "execute(query=f'SELECT {name}')",
        "connection.execute(statement=sa.text(text=f'SELECT {name}'))",
        "cursor.copy(f'COPY {name} FROM STDIN')",
        "cursor.stream(f'SELECT {name}')",
        "cursor.executemany(f'INSERT INTO {name} VALUES (%s)', rows)",
        "connection.scalar(sa.text(f'SELECT {name}'))",
        "cursor.execute(sql.SQL(f'SELECT {name}'))",
        "cursor.execute(sql.SQL('SELECT {}').format(sql.SQL(name)))",
        "cursor.execute(sql.SQL('SELECT ') + sql.SQL(name))",
        "session.sql(f'SELECT {name}')",
        "pd.read_sql(f'SELECT {name}', connection)",
        "cursor.execute(', '.join(names))",
        "cursor.execute('SELECT ' + ', '.join(n for n in names))",
        "cursor.execute('SELECT x'.replace('x', name))",
        "cursor.execute(f'SELECT {name}'.strip())",
        "cursor.execute('SELECT 1' if plain else f'SELECT {name}')",
        "cursor.execute((q := f'SELECT {name}'))",
        "def f(name):\n  q = 'SELECT '\n  q += name\n  execute(q)",
        "def f(q, name):\n  q = q + name\n  execute(q)",
        "def f(name):\n  parts = []\n  parts.append(name)\n  execute(' AND '.join(parts))",
        "def f(name):\n  parts = ['a', name]\n  execute(' AND '.join(parts))",
        "def f(name):\n  where = f'a = {name}'\n  q = f'SELECT 1 WHERE {where}'\n  execute(q)",
        "def f(name):\n  a, q = 1, f'SELECT {name}'\n  execute(q)",
        "def f(name):\n  NAME = name\n  execute(f'SELECT {NAME}')",
        "def f(rows):\n  for row in rows:\n    execute(f'SELECT {row[0]}')",
        "def f(name):\n  q = f'SELECT {name}'\n  def g():\n    execute(q)",
        "class C:\n  async def f(self, name):\n    await self.connection.execute(text(f'SELECT {name}'))",
        "def ask(connection, query):\n  connection.execute(query)\nask(c, f'SELECT {name}')",
        "def ask(connection, query):\n  connection.execute(query)\nask(c, query='SELECT ' + name)",
        "cursor.execute(composed(name))",
        "connection.execute(sa.text(module.composed(name)))",
        "def ask(c, where):\n  c.execute(f'SELECT 1 WHERE {where}')\ndef g(name):\n  ask(c, f'a = {name}')",
    ],
)
def test_the_scan_sees_a_value_in_a_text(source: str) -> None:
    values = {finding.value for finding in findings(source)}
    assert values & {
        "name",
        "names",
        "n",
        "values",
        "row[0]",
        "row",
        "rows",
        "row.name",
        "composed()",
        "module.composed()",
    }


@pytest.mark.parametrize(
    "source",
    [
        "connection.execute(sa.text('SELECT :name'), {'name': name})",
        "connection.execute(sa.text('SELECT :name'), {'name': f'%{name}%'})",
        "cursor.execute('SELECT %s', (name,))",
        "cursor.execute('SELECT 1' ' FROM t')",
        "_COLUMNS = 'a, b'\nexecute(f'SELECT {_COLUMNS} FROM t')",
        "execute(f'SET search_path = {declared.SCHEMA}')",
        "def f():\n  columns = 'a, b'\n  execute(f'SELECT {columns} FROM t')",
        "for table in ('a', 'b'):\n  execute(f'ANALYZE {table}')",
        "execute(', '.join(f'w{week}' for week in range(4)))",
        "execute(f'SELECT {int(name)}')",
        "cursor.execute(sql.SQL('SELECT {}').format(sql.Identifier(name)))",
        "cursor.execute(sql.SQL('SELECT {}').format(sql.SQL(', ').join(map(sql.Identifier, names))))",
        "execute(connection, f'DROP VIEW {quote(name)}')",
        "connection.execute(sa.select(table.c.a).where(table.c.b == name))",
        "q = sa.select(table)\nconnection.execute(q)",
        "def ask(connection, query):\n  connection.execute(query)\nask(c, 'SELECT 1')",
        "axes.text(0, 1, f'{name}')",
        "log.info(f'SELECT {name}')",
        "copy = dict(values).copy()",
        "with client.stream('GET', f'{address}/x') as answer: pass",
    ],
)
def test_the_scan_passes_over_what_is_bound_quoted_or_constant(source: str) -> None:
    assert findings(source) == []
