"""Scenarios of the library lived in a database of their own.

Belongs here: living one and reading what became of it. Does not belong here: assertions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.simulation.fleet import lab
from flywheel_pipeline.simulation.fleet.scenario import Scenario, load_scenario
from flywheel_pipeline.simulation.fleet.score import score
from flywheel_pipeline.simulation.fleet.stream import FleetStream


@dataclass(frozen=True)
class Lived:
    """A scenario after its last day: what was planted, what happened day by day, and the score."""

    engine: sa.Engine
    truth: dict[str, Any]
    history: lab.History
    scored: dict[str, Any]

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """The figures that are off."""
        return [figure for figure in self.scored["figures"] if not figure["ok"]]

    def pattern(self, incident_type: str) -> dict[str, Any]:
        """The score of the first pattern of an incident type."""
        return next(p for p in self.scored["patterns"] if p["pattern_key"].startswith(f"{incident_type}~"))

    def planted(self, incident_type: str) -> dict[str, Any]:
        """The planted truth of the first pattern of an incident type."""
        return next(p for p in self.truth["patterns"] if p["incident_type"] == incident_type)

    def rule(self, rule_id: str) -> dict[str, Any]:
        """The score of a rule."""
        return next(r for r in self.scored["rules"] if r["rule_id"] == rule_id)

    def reasons(self, incident_type: str) -> list[str]:
        """Why the pattern did not move, day by day, where it did not."""
        return [
            reason
            for day in self.history.days
            for key, (_, reason) in day.held.items()
            if key.startswith(f"{incident_type}~")
        ]

    def rows(self, query: str, **values: Any) -> list[Any]:
        """The rows of a query."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(query), values).all())

    def value(self, query: str, **values: Any) -> Any:
        """The one value of a query."""
        return self.rows(query, **values)[0][0]


def live(engine: sa.Engine, scenario: str | Scenario, seed: int = 7) -> Lived:
    """Live a scenario in an empty database and score it."""
    chosen = load_scenario(scenario) if isinstance(scenario, str) else scenario
    stream = FleetStream(chosen, seed)
    history = lab.run_scenario(engine, stream)
    truth = stream.truth.document()
    return Lived(engine, truth, history, score(engine, truth, history=history.as_dict()))
