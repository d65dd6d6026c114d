"""What agents report is hostile in a terminal too: markup in it is text, and the terminal obeys none of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import sqlalchemy as sa
from graph_runs import Environment, Flywheel
from rich.markup import escape
from rich.tree import Tree

from flywheel_pipeline.cli import terminal
from flywheel_pipeline.cli.terminal import SafeConsole, print_json, print_table

HOSTILE = [
    "\x1b]0;your bank\x07",  # the window's title
    "\x1b]52;c;cm0gLXJmIC8=\x07",  # the clipboard
    "\x1b[2K\x1b[1A\x1b[2Kall is well",  # erases the line above
    "\x9b2J",  # the same in one C1 character
    "a\rb",
    "a\x08\x08b",
    "gpj.\u202eexe",
    "\u2066left\u2069",
    "\u061cright",
]
#: Rich's own styles: colours, bold, links. Everything else that begins with ESC came from the text.
OWN = re.compile(r"\x1b\[[0-9;]*m")


def shown(monkeypatch: pytest.MonkeyPatch, *, wide: int = 200) -> tuple[SafeConsole, io.StringIO]:
    written = io.StringIO()
    console = SafeConsole(file=written, force_terminal=True, width=wide, highlight=False)
    monkeypatch.setattr(terminal, "out", console)
    return console, written


@pytest.mark.parametrize("text", HOSTILE)
def test_no_control_character_of_a_text_reaches_the_terminal(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console, written = shown(monkeypatch)
    print_table(f"of {text}", [{"host": text, "n": 3}], {"host": "host", "n": "rows"})
    console.print(text, markup=False)
    console.print(f"[bold]{escape(text)}[/]", soft_wrap=True)
    tree = Tree("rejects")
    tree.add(text)
    console.print(tree)
    plain = OWN.sub("", written.getvalue())
    assert all(character.isprintable() or character == "\n" for character in plain), repr(plain)
    assert OWN.search(written.getvalue())  # and our own styles are still there


@pytest.mark.parametrize("text", HOSTILE)
def test_json_sends_no_control_character_either_and_is_read_as_the_same_value(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, written = shown(monkeypatch)
    value = {f"host {text}": [text, f'Zürich \t\n"{text}\\']}
    print_json(value)
    plain = written.getvalue()
    assert all(character.isprintable() or character == "\n" for character in plain), repr(plain)
    assert json.loads(plain) == value
    assert "Zürich" in plain


def test_a_hostile_row_of_a_command_is_escaped_in_its_json(
    run_command: Flywheel, engine: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    host = "".join(HOSTILE)
    file = tmp_path / "posts.ndjson"
    file.write_text(json.dumps({"site_id": "clinic", "hostname": host}, ensure_ascii=False) + "\n", "utf-8")
    with environment(engine, tmp_path / "home"):
        assert run_command("import", file).code == 5
        with engine.begin() as connection:  # as an appliance may word it
            connection.execute(sa.text("UPDATE telemetry_rejects SET reason = :said"), {"said": f"unknown {host}"})
        answer = run_command("rejects", "list", "--json")
    assert all(character.isprintable() or character == "\n" for character in answer.out), repr(answer.out)
    assert [row["reason"] for row in json.loads(answer.out)] == [f"unknown {host}"]


def test_an_escape_is_shown_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    console, written = shown(monkeypatch)
    console.print("a\x1b[2Jb\u202ec", markup=False)
    assert written.getvalue() == "a\\x1b[2Jb\\u202ec\n"


@pytest.mark.parametrize(
    "text", ["[/]", "[/nothing]", "[link=http://evil.example]free[/link]", "[red]ok", "a[b]c", "Available: [x]"]
)
def test_markup_in_a_cell_is_text_and_breaks_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, written = shown(monkeypatch)
    print_table(text, [{"error": text}], {"error": "error"})
    plain = OWN.sub("", written.getvalue())
    assert plain.count(text) == 2
    assert "\x1b]8" not in written.getvalue()


def test_other_letters_than_ours_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    console, written = shown(monkeypatch)
    text = "Zürich\t✓ 北京 naïve – 100 %"
    console.print(text, markup=False)
    assert written.getvalue().expandtabs(8).split() == text.split()
