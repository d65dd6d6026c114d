"""The threat model of the README: each line names tests, and those tests are there and say something."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def threats() -> list[tuple[str, str, list[str]]]:
    """(threat, what stands against it, files that test it), as the table of the README says."""
    text = (ROOT / "README.md").read_text("utf-8")
    table = text.partition("| threat |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]
    return [(threat, answer, re.findall(r"`([^`]+)`", tests)) for threat, answer, tests in rows]


@pytest.mark.parametrize(("threat", "answer", "files"), threats(), ids=[threat for threat, _, _ in threats()])
def test_each_threat_has_an_answer_and_tests_that_are_there(threat: str, answer: str, files: list[str]) -> None:
    assert answer
    assert files
    for name in files:
        tree = ast.parse((ROOT / "tests" / name).read_text("utf-8"))
        tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert tests, name
        assert any(isinstance(node, ast.Assert) for test in tests for node in ast.walk(test)), name


def test_the_table_covers_what_the_product_defends() -> None:
    found = " ".join(threat for threat, _, _ in threats())
    for word in (
        "another site",
        "token",
        "hostile",
        "floods",
        "by SQL",
        "history",
        "pipeline process",
        "secrets",
        "dependency",
    ):
        assert word in found
