"""A page per room from the code's own docstrings: `make docs`, or `python docs/rooms.py`; no database, no network.

Each room's page opens with its charter, then lists its modules with theirs and its SQL models with their grain; the pages
of the modules show every public function and class. Written are HTML files that open offline.
"""

from __future__ import annotations

import argparse
import html
import importlib
import inspect
import pkgutil
import shutil
import warnings
from pathlib import Path
from types import ModuleType

import pdoc.doc
import pdoc.extract
import pdoc.render

from flywheel_pipeline.sql_models.loader import ModelGraph, load_models

PACKAGE = "flywheel_pipeline"
#: In flow order; the rest of the package is what they share.
ROOMS = ("telemetry", "aggregates", "candidates", "promotion", "delivery", "health")
BESIDE = ("archive", "engines", "sql_models", "contracts", "report", "simulation", "database", "orchestration", "cli")
DEFAULT = Path(__file__).parent.parent / "build" / "docs"


def main() -> None:
    """Write the pages of all rooms."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help="only these rooms")
    options = parser.parse_args()
    print(f"{write_rooms(options.out, options.rooms or [*ROOMS, *BESIDE])}: open this page")


def write_rooms(out: Path, rooms: list[str], *, modules: bool = True) -> Path:
    """Write a page per room, and one per module of it, under `out`; return the page that lists the rooms.

    Args:
        out: made if it is not there; what it holds of this package is replaced.
        rooms: names, in the order of the list.
        modules: whether their modules get pages too, which are most of the work.

    Raises:
        ValueError: there is no such room, or one has no charter.
    """
    unknown = sorted(set(rooms) - {*ROOMS, *BESIDE})
    if unknown:
        raise ValueError(f"there is no room {', '.join(unknown)}: the rooms are {', '.join((*ROOMS, *BESIDE))}")
    graph = load_models()
    if (out / PACKAGE).is_dir():
        shutil.rmtree(out / PACKAGE)  # pages of modules that are no more
    packages = [importlib.import_module(f"{PACKAGE}.{room}") for room in rooms]
    charters = {package: package.__doc__ for package in packages}
    pdoc.render.configure(docformat="google", search=False, show_source=False)
    try:
        for room, package in zip(rooms, packages, strict=True):
            package.__doc__ = room_page(room, package, graph)
        with warnings.catch_warnings():
            # Names that are imported for type checkers alone stand in the pages as they are written.
            warnings.filterwarnings("ignore", category=UserWarning, module="pdoc")
            names = [package.__name__ for package in packages]
            found = {
                name: pdoc.doc.Module.from_name(name) for name in (pdoc.extract.walk_specs(names) if modules else names)
            }
            for name, module in found.items():
                page = out / f"{name.replace('.', '/')}.html"
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(pdoc.render.html_module(module, found), "utf-8")
    finally:
        for package, charter in charters.items():
            package.__doc__ = charter
    index = out / "index.html"
    index.write_text(_index(rooms, packages), "utf-8")
    return index


def charter_of(module: ModuleType) -> str:
    """Return the docstring of a module.

    Raises:
        ValueError: it has none.
    """
    if not module.__doc__:
        raise ValueError(f"{module.__name__} says nowhere what belongs in it: it needs a docstring")
    return inspect.cleandoc(module.__doc__)


def room_page(room: str, package: ModuleType, graph: ModelGraph) -> str:
    """Return what stands at the head of a room's page, as Markdown: charter, modules, SQL models."""
    parts = [charter_of(package), "## Modules"]
    rows = []
    for found in pkgutil.iter_modules(package.__path__):
        if found.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        first = charter_of(module).split("\n\n")[0].replace("\n", " ")
        rows.append(f"- `{package.__name__}.{found.name}`: {first}")
    parts.append("\n".join(rows))
    models = [model for model in graph.models.values() if model.room == room]
    if models:
        parts.append("## SQL models")
        parts.append(
            "\n".join(
                f"- **{model.name}** (`{model.file}`, {model.materialized}): {' '.join(model.description.split())} "
                f"Grain: {model.grain}."
                for model in sorted(models, key=lambda model: model.name)
            )
        )
    return "\n\n".join(parts)


def _index(rooms: list[str], packages: list[ModuleType]) -> str:
    items = "\n".join(
        f'<li><a href="{PACKAGE}/{room}.html">{room}</a> {html.escape(charter_of(package).split(chr(10) * 2)[0])}</li>'
        for room, package in zip(rooms, packages, strict=True)
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Flywheel: the rooms</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:3rem auto;padding:0 1rem;color:#1b2430}"
        "li{margin:.5rem 0}a{color:#2b5c9e;font-weight:600;margin-right:.4rem}</style>"
        f"<h1>Flywheel: the rooms</h1><p>In flow order, then what they share.</p><ul>{items}</ul></html>\n"
    )


if __name__ == "__main__":
    main()
