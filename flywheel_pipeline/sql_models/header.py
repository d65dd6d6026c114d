"""The header of a model file: `/*--- YAML ---*/` before the SELECT, strict.

Belongs here: the header's form, and refusals that point at its line. Does not belong here: anything that
needs the SQL itself (`loader.py`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NoReturn, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from flywheel_pipeline.errors import ModelError

_HEADER = re.compile(r"\A\ufeff?\s*/\*---[^\S\n]*\n(?P<yaml>.*?)^---\*/", re.DOTALL | re.MULTILINE)
_YAML_LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,49}$")]
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
TypeAndDescription = Annotated[list[Sentence], Field(min_length=2, max_length=2)]
# A type is pasted into CREATE TABLE: words, an optional precision, an optional array mark, nothing else.
_TYPE = re.compile(r"^[a-z][a-z0-9_ ]*(\(\d+(, ?\d+)?\))?( [a-z ]+)?(\[\])?$")


class Header(BaseModel):
    """What a model says about itself. An unknown or missing key is an error.

    `columns` maps each output column, in the order of the SELECT, to [PostgreSQL type, description]. `cell`
    says which cell a row of a cell model belongs to: a site's day, a site's month (the column `month` holds its first
    day), or a site. `indexes` are those that a cell model's table has beside its key.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Identifier
    room: Identifier
    materialized: Literal["view", "table", "cell"]
    cell: Literal["day", "month", "site"] | None = None
    grain: Sentence
    description: Sentence
    owner: Annotated[str, StringConstraints(pattern=r"^team:[a-z0-9][a-z0-9_-]*$")]
    key: Annotated[list[Identifier], Field(min_length=1)]
    columns: Annotated[dict[Identifier, TypeAndDescription], Field(min_length=1)]
    indexes: list[Annotated[list[Identifier], Field(min_length=1)]] = Field(default_factory=list)
    consumers: list[Sentence]
    tags: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.key)) != len(self.key):
            raise ValueError("key: a column stands in it twice")
        for column in self.key:
            if column not in self.columns:
                raise ValueError(f"key: {column} is not among the columns")
        for column, (given, _) in self.columns.items():
            if not _TYPE.match(given):
                raise ValueError(f"columns: {column} has the type {given!r}, which is no plain PostgreSQL type")
        if (self.materialized == "cell") != (self.cell is not None):
            raise ValueError("cell: a model of `materialized: cell` says `cell: day`, `month` or `site`, no other does")
        for index in self.indexes:
            if self.cell is None or not set(index) <= self.columns.keys():
                raise ValueError(f"indexes: {', '.join(index)} are not all columns of a cell model")
        needed = {"day": ("site_id", "day"), "month": ("site_id", "month"), "site": ("site_id",), None: ()}[self.cell]
        for column in needed:
            if column not in self.key:
                raise ValueError(f"key: a model of `cell: {self.cell}` needs {column} in its key")
        return self


def read_header(text: str, *, file: str, room: str, name: str) -> tuple[Header, int]:
    """Read the header of a model file.

    Args:
        text: the whole file.
        file: how messages name it.
        room: the folder it lies in; the header must say the same.
        name: the file's stem; the header must say the same.

    Returns:
        The header and the offset in `text` at which the SQL begins.

    Raises:
        ModelError: no header, bad YAML, an unknown or missing key, a wrong value; with file and line.
    """

    def refuse(problem: str, line: int = 1, hint: str | None = None) -> NoReturn:
        raise ModelError(f"{file}:{line}: {problem}", hint=hint)

    match = _HEADER.match(text)
    if match is None:
        refuse(
            "the file does not begin with a header.",
            hint="Begin it with a line `/*---`, then YAML, then a line `---*/`, then one SELECT.",
        )
    first_line = text.count("\n", 0, match.start("yaml")) + 1
    source = match["yaml"]
    try:
        node = yaml.compose(source, Loader=_YAML_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        refuse(f"the header is not valid YAML: {problem}.", first_line + (mark.line if mark else 0))
    if not isinstance(node, yaml.MappingNode):
        refuse("the header is not a mapping of keys to values.", first_line)
    lines = _lines(node, first_line, refuse)
    data = yaml.load(source, Loader=_YAML_LOADER)  # noqa: S506 (a safe loader)
    try:
        header = Header.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")  # a typo explains most
        where = tuple(str(part) for part in first["loc"] if part != "[key]")
        said = str(first["msg"]).removeprefix("Value error, ")
        if not where:
            where = (said.partition(":")[0],)
        else:
            said = f"{'.'.join(where)}: {said}"
        hint = None
        if first["type"] == "too_long" and where[0] == "columns":
            hint = "A column is [type, description]; put quotes around a description or type with a comma in it."
        line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), first_line)
        refuse(f"{said[0].lower()}{said[1:]}.", line, hint)
    if header.name != name:
        refuse(f"name: the header says {header.name}, the file is called {name}.sql.", lines[("name",)])
    if header.room != room:
        refuse(f"room: the header says {header.room}, the file lies in {room}/.", lines[("room",)])
    return header, match.end()


def _lines(node: yaml.MappingNode, first_line: int, refuse: Any) -> dict[tuple[str, ...], int]:
    """Map each key, and each key one level below, to its line in the file; refuse a key given twice."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(mapping: yaml.MappingNode, above: tuple[str, ...]) -> None:
        for key, value in mapping.value:
            path = (*above, str(key.value))
            line = first_line + key.start_mark.line
            if path in lines:
                refuse(f"{'.'.join(path)}: the key stands twice in the header.", line)
            lines[path] = line
            if isinstance(value, yaml.MappingNode):
                walk(value, path)

    walk(node, ())
    return lines
