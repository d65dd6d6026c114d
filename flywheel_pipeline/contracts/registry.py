"""Every contract of the house, in flow order."""

from __future__ import annotations

from flywheel_pipeline.candidates.suite import CANDIDATES
from flywheel_pipeline.contracts.declared import Contract
from flywheel_pipeline.promotion.suite import RULES
from flywheel_pipeline.telemetry.suite import CATALOGUE, TELEMETRY

CONTRACTS: tuple[Contract, ...] = (TELEMETRY, CATALOGUE, CANDIDATES, RULES)
