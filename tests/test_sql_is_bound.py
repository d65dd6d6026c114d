"""No value of an appliance becomes part of an SQL text. For the rest of the package the linter asks (rule S608)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flywheel_pipeline"
RUNS_SQL = {"text", "execute", "executemany", "exec_driver_sql", "scalar", "scalars"}
#: Rooms that read what appliances send. Nothing is put into an SQL text there but constants of the module.
HOSTILE = ("delivery/api", "delivery/tokens.py", "telemetry/landing.py", "telemetry/batch.py", "telemetry/rejects.py")


def sql_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in RUNS_SQL:
                for argument in node.args[:2]:
                    yield node, argument


def interpolated(argument: ast.expr) -> Iterator[ast.expr]:
    """What is put into the text: by an f-string, by + or %, or by .format()."""
    for node in ast.walk(argument):
        if isinstance(node, ast.FormattedValue):
            yield node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            yield node.right
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            yield from node.args
            yield from (keyword.value for keyword in node.keywords)


def is_constant(value: ast.expr) -> bool:
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return isinstance(value, ast.Constant) or (name.isupper() and len(name) > 1)


def findings(source: str) -> list[str]:
    return [
        f"line {call.lineno}: {ast.unparse(value)}"
        for call, argument in sql_calls(ast.parse(source))
        for value in interpolated(argument)
        if not is_constant(value)
    ]


@pytest.mark.parametrize("room", HOSTILE)
def test_where_appliances_speak_only_constants_are_put_into_sql(room: str) -> None:
    root = PACKAGE / room
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    assert files
    assert {file.name: f for file in files if (f := findings(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "connection.execute(sa.text(f'SELECT {name}'))",
        "cursor.execute('SELECT %s' % name)",
        "connection.exec_driver_sql('SELECT {}'.format(name))",
        "execute(connection, f'SELECT {row.name}')",
    ],
)
def test_the_test_sees_a_value_in_a_text(source: str) -> None:
    assert findings(source)
