"""Data Docs: what every contract demands, why, and whether it holds, as pages that open without a network.

Belongs here: the pages. Great Expectations' own pages load some 16 scripts, styles and fonts from other hosts, which an
offline reader never gets; these load nothing at all. Does not belong here: judging (`adapter`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from flywheel_pipeline.contracts.adapter import judge_contract
from flywheel_pipeline.contracts.declared import Contract, Expectation, ExpectationResult
from flywheel_pipeline.contracts.registry import CONTRACTS
from flywheel_pipeline.database.settings import Settings, get_settings

FOLDER: Final = "data_docs"
# The policy has the browser refuse any request, whatever a value in the data may look like.
_PAGE: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{title}</title><style>
:root {{ --ink: #1c2430; --dim: #5c6675; --line: #d9dee5; --good: #14713d; --bad: #b3261e; --warn: #8a5a00; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} p {{ margin: .3rem 0 1rem; }} a {{ color: inherit; }}
.dim {{ color: var(--dim); }} .holds {{ color: var(--good); }} .broken, .error {{ color: var(--bad); font-weight: 600; }}
.warning .broken {{ color: var(--warn); }}
table {{ border-collapse: collapse; width: 100%; }} th, td {{ text-align: left; vertical-align: top;
padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); }} th {{ color: var(--dim); font-weight: 500; }}
td.n {{ text-align: right; white-space: nowrap; }} td.result {{ white-space: nowrap; }}
code {{ font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }} pre {{ font-size: 13px; overflow-x: auto; }}
@media print {{ body {{ margin: 0; max-width: none; }} tr {{ break-inside: avoid; }} }}
</style></head><body>
{body}
</body></html>
"""


@dataclass(frozen=True, slots=True)
class Judged:
    """One contract as judged: its expectations, their results in the same order, and the rows looked at."""

    contract: Contract
    expectations: Sequence[Expectation]
    results: Sequence[ExpectationResult]
    rows: int

    @property
    def broken(self) -> int:
        """How many expectations do not hold, those that could not be judged included."""
        return sum(not result.passed for result in self.results)


def data_docs_folder(settings: Settings | None = None) -> Path:
    """Where the pages stand: `data_docs` under FLYWHEEL_HOME."""
    return (settings or get_settings()).home / FOLDER


def judge_all(engine: sa.Engine, now: datetime) -> list[Judged]:
    """Judge every contract by its rows of now."""
    judged = []
    for contract in CONTRACTS:
        with engine.connect() as connection:
            results, rows = judge_contract(connection, contract, now)
        judged.append(Judged(contract, contract.expectations(now), results, rows))
    return judged


def write_data_docs(judged: Sequence[Judged], folder: Path, *, at: datetime) -> Path:
    """Write `index.html` and a page per contract; return the path of the index.

    Each file is put in place whole, so a reader never sees half a page. `at` (aware) is printed on every page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for item in judged:
        _write(folder / f"{item.contract.asset}.html", _contract_page(item, at))
    index = folder / "index.html"
    _write(index, _index_page(judged, at))
    return index


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _stamp(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _page(title: str, body: str) -> str:
    return _PAGE.format(title=escape(title), body=body)


def _verdict(item: Judged) -> str:
    if not item.results:
        return '<span class="broken">nothing is expected</span>'
    if not item.broken:
        return f'<span class="holds">all {len(item.results)} hold</span>'
    return f'<span class="broken">{item.broken} of {len(item.results)} broken</span>'


def _index_page(judged: Sequence[Judged], at: datetime) -> str:
    rows = "".join(
        f'<tr><td><a href="{escape(item.contract.asset)}.html">{escape(item.contract.title)}</a></td>'
        f"<td><code>{escape(item.contract.asset)}</code></td><td>{escape(item.contract.scope)}</td>"
        f'<td class="n">{item.rows:,}</td><td>{_verdict(item)}</td></tr>'
        for item in judged
    )
    return _page(
        "Data contracts",
        f'<h1>Data contracts</h1><p class="dim">Judged {_stamp(at)}. A table keeps its contract when every expectation '
        "holds; one that could not be judged counts as broken.</p>"
        "<table><thead><tr><th>contract</th><th>table</th><th>judged over</th><th>rows</th><th>result</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>",
    )


def _contract_page(item: Judged, at: datetime) -> str:
    contract = item.contract
    rows = "".join(
        _row(expectation, result) for expectation, result in zip(item.expectations, item.results, strict=True)
    )
    return _page(
        contract.title,
        f"<h1>{escape(contract.title)}</h1>"
        f'<p><a href="index.html">All contracts</a> · <code>{escape(contract.asset)}</code> · {escape(contract.scope)}, '
        f'{item.rows:,} rows · {_verdict(item)} <span class="dim">· judged {_stamp(at)}</span></p>'
        "<table><thead><tr><th>expectation</th><th>severity</th><th>result</th><th>observed</th><th>offenders</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
        f"<details><summary>The rows judged, as SQL</summary><pre>{escape(contract.query.strip())}</pre></details>",
    )


def _row(expectation: Expectation, result: ExpectationResult) -> str:
    said = "error" if result.error is not None else "holds" if result.passed else "broken"
    observed = result.error if result.error is not None else result.observed
    sample = "<br>".join(f"<code>{escape(value)}</code>" for value in result.sample)
    return (
        f'<tr class="{escape(result.severity)}"><td>{escape(result.name)}{_arguments(expectation.arguments)}'
        f'<br><span class="dim">{escape(expectation.why)}</span></td><td>{escape(result.severity)}</td>'
        f'<td class="result {said}">{said}</td><td>{escape(observed)}</td><td>{sample}</td></tr>'
    )


def _arguments(arguments: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in arguments.items() if k not in ("column", "column_A", "column_B")}
    if not shown:
        return ""
    words = ", ".join(f"{key}: {_value(value)}" for key, value in shown.items())
    return f"<br><code>{escape(words)}</code>"


def _value(value: Any) -> str:
    if isinstance(value, datetime):
        return _stamp(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
