"""What every asset's page in the Dagster UI says alike: how often it is made, how old it may be, by which code.

Belongs here: tempo, freshness windows, tags, code version and link to the source, put on all assets in one place. Does not
belong here: what an asset is (the rooms' `assets.py`) and what a model is (`sql_models/assets.py`).

Freshness is a badge, never a gate: the check `telemetry_freshness` decides whether anything may be promoted.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import dagster as dg

from flywheel_pipeline.sql_models.assets import code_reference
from flywheel_pipeline.telemetry.quality import FRESH_WITHIN

TEMPO_TAG: Final = "flywheel/tempo"


@dataclass(frozen=True)
class Tempo:
    """How often an asset is made anew, and after which age of its last materialization its badge warns and fails.

    `warn` and `fail` are None where nobody can say when the next one is due.
    """

    name: str
    meaning: str
    warn: dt.timedelta | None = None
    fail: dt.timedelta | None = None


def _hours(hours: float) -> dt.timedelta:
    return dt.timedelta(hours=hours)


#: Made within seconds of new telemetry; and at 03:17 whatever came: older than a day and two hours, a night was missed.
MINUTE = Tempo("minute", "made anew within seconds of new telemetry, and every night", _hours(6), _hours(26))
NIGHTLY = Tempo("nightly", "made anew every night", _hours(26), _hours(50))
#: Written by the appliances. It fails when the gate `telemetry_freshness` does.
REPORTED = Tempo(
    "reported", "written by appliances, and seen with each refresh that counts rows", _hours(6), FRESH_WITHIN
)
#: Written by the sensor `alerts`, which looks every ten seconds and says so here every hour.
WATCHED = Tempo("watched", "written by the watch, every ten seconds", _hours(2), _hours(3))
BY_HAND = Tempo("by_hand", "written or made when somebody wants it")

#: Assets of another tempo than `MINUTE`.
TEMPOS: Final[Mapping[str, Tempo]] = {
    "execution_telemetry": REPORTED,
    "alerts": WATCHED,
    "policy_backtest": NIGHTLY,
    "telemetry_archive": NIGHTLY,
    "runbooks": BY_HAND,
    "appliances": BY_HAND,
    "day_backfill": BY_HAND,
}


def with_asset_pages(
    assets: Iterable[dg.AssetsDefinition | dg.AssetSpec],
) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """Return the assets with tempo, freshness policy, code version and link to their source on each of their specs.

    A SQL model keeps the version and the link that its own file gives it.
    """
    return [
        asset.map_asset_specs(_completing(asset.op.compute_fn))
        if isinstance(asset, dg.AssetsDefinition)
        else _with_tempo(asset)
        for asset in assets
    ]


def _completing(compute: Any) -> Callable[[dg.AssetSpec], dg.AssetSpec]:
    function = inspect.unwrap(compute.decorated_fn)
    code = function.__code__
    version = code_version(str(Path(code.co_filename).parent))
    reference = code_reference(Path(code.co_filename), code.co_firstlineno, function.__qualname__.rpartition(".")[2])

    def complete(spec: dg.AssetSpec) -> dg.AssetSpec:
        spec = _with_tempo(spec)
        if spec.code_version is not None:
            return spec
        return spec.replace_attributes(
            code_version=version, metadata={**spec.metadata, "dagster/code_references": reference}
        )

    return complete


def _with_tempo(spec: dg.AssetSpec) -> dg.AssetSpec:
    tempo = TEMPOS.get(spec.key.to_user_string(), MINUTE)
    policy = None
    if tempo.fail is not None:
        policy = dg.FreshnessPolicy.time_window(fail_window=tempo.fail, warn_window=tempo.warn)
    return spec.replace_attributes(tags={**spec.tags, TEMPO_TAG: tempo.name}, freshness_policy=policy)


@cache
def code_version(room: str) -> str:
    """Return a hash over every Python and YAML file of a room's folder: the code that its assets are made by."""
    digest = hashlib.sha256()
    for path in sorted(Path(room).rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.relative_to(room).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
