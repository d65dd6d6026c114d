"""What a contract is: expectations as plain data, so that a room declares them without importing anything heavy.

Belongs here: the declaration and the result of judging it. Does not belong here: any expectation (each room's
`suite.py`) and Great Expectations (`adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Expectation:
    """One statement about a table.

    `kind` is a Great Expectations type, such as `expect_column_values_to_be_unique`, `arguments` are its own, and
    `why` says what goes wrong where it is broken. A broken critical one makes the check an error, any other a warning.
    """

    kind: str
    arguments: Mapping[str, Any]
    why: str
    severity: Severity = "critical"

    @property
    def name(self) -> str:
        """`expect_column_values_to_not_be_null`, column site_id -> `site_id values to not be null`."""
        columns = [self.arguments[key] for key in ("column", "column_A", "column_B") if key in self.arguments]
        words = self.kind.removeprefix("expect_").removeprefix("column_").replace("pair_", "").replace("_", " ")
        return " ".join([*columns, words])


@dataclass(frozen=True, slots=True)
class Contract:
    """The contract of one asset.

    `query` selects the rows that are judged, with columns derived where an expectation needs one; `parameters` are
    its bind parameters. `key` names the columns by which an offending row is found again. `expectations` are
    those as of a moment (aware): clocks are judged against it.
    """

    asset: str
    title: str
    scope: str
    query: str
    key: Sequence[str]
    expectations: Callable[[datetime], Sequence[Expectation]]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExpectationResult:
    """One expectation, judged.

    `passed` is False both when rows break it and when it could not be judged; then `error` says why and
    `observed` is empty. `offenders` counts breaking rows (None where the expectation is not about rows), and
    `sample` shows some of them by key and value.
    """

    name: str
    passed: bool
    severity: Severity
    observed: str
    offenders: int | None = None
    sample: tuple[str, ...] = ()
    error: str | None = None
    why: str = ""
