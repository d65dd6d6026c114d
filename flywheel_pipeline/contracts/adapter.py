"""The one door to Great Expectations: a declared contract and a frame of rows in, plain results out.

Belongs here: everything that knows its classes. Does not belong here: Dagster and any expectation. It is imported
inside the functions: that costs 4 to 6 seconds and 130 MB, and no run of the minute may pay it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from flywheel_pipeline.contracts.declared import Contract, Expectation, ExpectationResult
from flywheel_pipeline.quality import Finding

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_OFFENDERS: Final = 20


def read_rows(connection: sa.Connection, contract: Contract) -> pd.DataFrame:
    """The rows that the contract speaks of."""
    import pandas as pd

    result = connection.execute(sa.text(contract.query), dict(contract.parameters))
    return pd.DataFrame(result.fetchall(), columns=list(result.keys()))


@contextmanager
def _without_spark() -> Iterator[None]:
    """Have Great Expectations find no Spark while it is imported: what it judges here are pandas frames.

    Where PySpark is installed it would import all of it, and PySpark's `connect` package ends the process (`sys.exit(0)`)
    where the main module has neither a file nor a spec, as in a worker that was started by `python -c`.
    """
    hidden = ("pyspark", "pyspark.sql", "pyspark.sql.connect")
    there = {name: sys.modules[name] for name in hidden if name in sys.modules}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: its import fails
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(there)


def judge(
    frame: pd.DataFrame, expectations: Sequence[Expectation], *, key: Sequence[str] = ()
) -> list[ExpectationResult]:
    """Judge rows by expectations: exactly one result for each, in their order.

    An expectation that is unknown, raises, names a missing column, crashes the validation or is not answered gives a
    result with `error`; it is no pass. `key` names columns that identify a row in the samples.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read while Great Expectations is imported
    with _without_spark():
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("rows")
        .add_dataframe_asset("rows")
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": frame})
    )
    results: dict[int, ExpectationResult] = {}
    built: dict[int, Any] = {}
    for number, expectation in enumerate(expectations):
        try:
            built[number] = _build(expectation, number)
        except Exception as error:  # noqa: BLE001 (whatever it is, this expectation was not judged: an error result)
            results[number] = _not_judged(expectation, error)

    def validate(numbers: Sequence[int]) -> None:
        suite = gx.ExpectationSuite(name="contract", expectations=[built[number] for number in numbers])
        shape = {"result_format": "SUMMARY", "unexpected_index_column_names": [c for c in key if c in frame.columns]}
        answers: Any = batch.validate(suite, result_format=shape).results
        for answer in answers:  # in an order of their own
            number = int(answer.expectation_config.meta["number"])
            results[number] = _result(expectations[number], answer)

    try:
        validate(list(built))
    except Exception:  # noqa: BLE001 (one expectation crashed the whole suite: find out which)
        for number in built:
            try:
                validate([number])
            except Exception as error:  # noqa: BLE001 (it was not judged: an error result)
                results[number] = _not_judged(expectations[number], error)
    for number, expectation in enumerate(expectations):
        if number not in results:
            results[number] = _not_judged(expectation, RuntimeError("the validation gave no result for it"))
    return [results[number] for number in range(len(expectations))]


def judge_contract(connection: sa.Connection, contract: Contract, now: datetime) -> tuple[list[ExpectationResult], int]:
    """Judge the rows of now by a contract: the results, and how many rows were looked at."""
    frame = read_rows(connection, contract)
    return judge(frame, contract.expectations(now), key=contract.key), len(frame)


def to_finding(contract: Contract, results: Sequence[ExpectationResult], rows: int) -> Finding:
    """What the check says: every expectation in the sample, the broken ones first, offenders as figures.

    Severe where a critical expectation is broken or any could not be judged; else a broken one is a warning.
    """
    broken = [r for r in results if not r.passed]
    errors = [r for r in broken if r.error is not None]
    critical = [r for r in broken if r.severity == "critical"]
    first = next(iter([*errors, *critical, *broken]), None)
    if first is None:
        sentence = f"All {len(results)} expectations hold over {contract.scope}: {rows:,} rows."
    elif first.error is not None:
        sentence = (
            f"{len(errors)} of {len(results)} expectations could not be judged, first {first.name}: {first.error}"
        )
    else:
        sentence = (
            f"{len(broken)} of {len(results)} expectations are broken, {len(critical)} of them critical, "
            f"first {first.name}: {first.observed}. {first.why}"
        )
    if not results:
        sentence = "The contract declares no expectation, which proves nothing."
    return Finding(
        passed=bool(results) and not broken,
        sentence=sentence,
        observed=f"{len(broken)} broken of {len(results)}",
        required=f"none broken, over {contract.scope}",
        offenders=len(broken),
        severe=bool(errors or critical or not results),
        sample=[
            {
                "expectation": r.name,
                "result": "error" if r.error is not None else "holds" if r.passed else "broken",
                "severity": r.severity,
                "observed": r.error if r.error is not None else r.observed,
                "offenders": r.offenders,
                "sample": "; ".join(r.sample[:5]),
                "why": r.why,
            }
            for r in sorted(results, key=lambda r: (r.passed, r.error is None, r.severity != "critical"))
        ],
        figures={
            "expectations": len(results),
            "broken": len(broken),
            "broken_critical": len(critical),
            "not_judged": len(errors),
            "rows": rows,
            **{f"offenders: {r.name}": r.offenders for r in results if r.offenders is not None},
        },
    )


def _build(expectation: Expectation, number: int) -> Any:
    registry: Any = import_module("great_expectations.expectations.registry")
    kind = registry.get_expectation_impl(expectation.kind)
    return kind(**expectation.arguments, severity=expectation.severity, meta={"number": number})


def _not_judged(expectation: Expectation, error: BaseException) -> ExpectationResult:
    said = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    return ExpectationResult(expectation.name, False, expectation.severity, "", error=said, why=expectation.why)


def _result(expectation: Expectation, answer: Any) -> ExpectationResult:
    error = _error(answer.exception_info)
    if error is not None:
        return ExpectationResult(expectation.name, False, expectation.severity, "", error=error, why=expectation.why)
    found: dict[str, Any] = dict(answer.result)
    offenders = found.get("unexpected_count")
    if offenders is None:
        observed = str(_plain(found.get("observed_value", "")))
    else:
        observed = f"{int(offenders):,} of {int(found.get('element_count', 0)):,} rows break it"
    shown = found.get("partial_unexpected_index_list") or found.get("partial_unexpected_list") or ()
    return ExpectationResult(
        expectation.name,
        bool(answer.success),
        expectation.severity,
        observed,
        offenders=None if offenders is None else int(offenders),
        sample=tuple(_shown(value, expectation) for value in shown[:_SHOWN_OFFENDERS]),
        why=expectation.why,
    )


def _shown(value: Any, expectation: Expectation) -> str:
    """An offender as text: its key, then the values that break the expectation."""
    if not isinstance(value, dict):
        return str(_plain(value))
    judged = [
        expectation.arguments[name] for name in ("column", "column_A", "column_B") if name in expectation.arguments
    ]
    keys = [str(_plain(item)) for column, item in value.items() if column not in judged]
    values = [f"{column}={_plain(value[column])}" for column in judged if column in value]
    return ": ".join(part for part in (" / ".join(keys), ", ".join(values)) if part)


def _plain(value: Any) -> Any:
    """Scalars of numpy as Python's own, a missing value as `null`."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    item = getattr(value, "item", None)
    plain = item() if callable(item) else value
    return "null" if plain is None or plain != plain else plain  # NaN and NaT are unlike themselves


def _error(info: Any) -> str | None:
    """The first exception in `exception_info`, which is either one record or one per metric."""
    if not info:
        return None
    for record in [info] if "raised_exception" in info else info.values():
        if record.get("raised_exception"):
            return str(record.get("exception_message") or "the expectation raised without a message")
    return None
