"""The pages of the rooms: each opens with its charter, and what a room holds stands on its page."""

from __future__ import annotations

import html
import importlib
import re
import sys
from pathlib import Path

import pytest

from flywheel_pipeline.sql_models.loader import load_models

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from rooms import BESIDE, PACKAGE, ROOMS, charter_of, write_rooms

REPOSITORY = Path(__file__).parents[1]
MODELS = tuple(load_models().models.values())


def text_of(page: Path) -> str:
    """The page as its reader sees it: no tags, one space between words."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text("utf-8"))).split())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    write_rooms(out, [*ROOMS, *BESIDE], modules=False)
    return out


def test_every_folder_of_the_package_is_a_room_with_a_page(pages: Path) -> None:
    folders = {path.parent.name for path in (REPOSITORY / PACKAGE).glob("*/__init__.py")}
    assert folders == {*ROOMS, *BESIDE}
    index = (pages / "index.html").read_text("utf-8")
    for room in folders:
        assert f'href="{PACKAGE}/{room}.html"' in index
        assert (pages / PACKAGE / f"{room}.html").is_file()


@pytest.mark.parametrize("room", [*ROOMS, *BESIDE])
def test_the_page_of_a_room_holds_its_charter_its_modules_and_its_models(pages: Path, room: str) -> None:
    package = importlib.import_module(f"{PACKAGE}.{room}")
    page = pages / PACKAGE / f"{room}.html"
    text = text_of(page)
    for line in charter_of(package).splitlines():
        assert " ".join(line.replace("`", "").split()) in text, line
    if room in ROOMS:
        assert "Belongs here:" in text
        assert "Does not belong here:" in text
    for path in Path(package.__path__[0]).glob("[a-z]*.py"):
        assert f"{PACKAGE}.{room}.{path.stem}:" in text, path.name
    for model in MODELS:
        assert (f"{model.name} ({model.file}, {model.materialized}):" in text) == (model.room == room), model.name
    addresses = re.findall(r'(?:src|href)="(https?:[^"]*)"', page.read_text("utf-8"))
    assert [a for a in addresses if not a.startswith("https://pdoc.dev")] == [], "the page opens offline"


def test_the_page_of_a_module_shows_its_functions(tmp_path: Path) -> None:
    write_rooms(tmp_path, ["candidates"])
    text = text_of(tmp_path / PACKAGE / "candidates" / "keys.html")
    assert "def pattern_key" in text
    with pytest.raises(ValueError, match="there is no room attic: the rooms are telemetry, aggregates"):
        write_rooms(tmp_path, ["attic"])
