"""What it takes to adopt the old system's tables: every change, what is left as it is, and what stands in the way.

Belongs here: comparing the old tables with the declared ones and deciding, object by object. Nothing is changed here.
Does not belong here: carrying a plan out or undoing it (`adopt.py`).

What Flywheel needs is changed, each change with the statements that undo it. What it does not need is left, and named:
`flywheel db check` accepts exactly that from then on. What can be neither stands in the way, and the adoption refuses.
"""

# ruff: noqa: S608 (identifiers come from tables.py and the catalog and are quoted; values are bound or literals)
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection

from flywheel_pipeline.database import adopt_catalog as catalog
from flywheel_pipeline.database import declared
from flywheel_pipeline.database.drift import CatalogObject, differences, snapshots
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.sql_models.relations import execute, quote

#: The tables of the old system, by their names there; in the order in which they are locked.
PRODUCTION: Final = (
    "execution_telemetry",
    "patterns",
    "l1_rules",
    "appliance_commands",
    "evidence_bundles",
    "runbooks",
    "sites",
    "appliances",
)
#: Without these two there is nothing to adopt.
REQUIRED: Final = ("execution_telemetry", "l1_rules")

# Columns that nothing of ours writes on an adopted database: any type and any expression will do there.
_UNUSED: Final[Mapping[str, frozenset[str]]] = {
    "patterns": frozenset(
        {"proposed_rule", "success_rate", "avg_resolution_time_ms", "total_resolution_time_ms", "example_incidents"}
    ),
    "evidence_bundles": frozenset(metadata.tables["evidence_bundles"].columns.keys()),
}
# Nothing of ours writes rows here on an adopted database: text may be as short as the old system had it.
_ONLY_READ: Final = frozenset({"sites", "appliances"})
# The longest value that Flywheel writes where it writes few.
_LONGEST: Final[Mapping[str, int]] = {"patterns.status": 8, "appliance_commands.status": 10}
# Filled by the import into the ledger, and NOT NULL from then on.
_LEDGER_COLUMNS: Final = ("state", "content_hash", "last_event_id")
# What stands for a missing value where ours may not be null, if not the column's default.
_FILLS: Final[Mapping[str, tuple[str, str]]] = {
    "execution_telemetry.created_at": (
        "coalesce(greatest(started_at, completed_at), max(created_at) OVER (ORDER BY id), now())",
        "its end, else its start, else the arrival of the row before it",
    ),
    "runbooks.name": ("runbook_id", "its id"),
}


class Phase(IntEnum):
    """The order in which steps are carried out."""

    RETIRE = 0
    TYPE = 1
    ADD = 2
    DEFAULT = 3
    FILL = 4
    NULLABILITY = 5
    GENERATION = 6
    CONSTRAINT = 7
    INSTALL = 8
    IMPORT = 9
    AFTER_IMPORT = 10
    BACKFILL = 11


@dataclass(frozen=True)
class Step:
    """One change. `do` and `undo` are SQL; both empty: the program does it (install, import, backfill).

    `aside`: columns whose views are dropped before and made again after, in both directions. `tolerant`: if the undo
    does not fit the rows of by then, the change stays. `fills`: `do` returns the ids of the rows it filled, for the undo.
    `added`: the undo drops the column, whose values are archived before.
    """

    phase: Phase
    table: str
    column: str
    what: str
    why: str
    do: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    tolerant: bool = False
    fills: bool = False
    added: bool = False


@dataclass(frozen=True)
class Left:
    """Something of the old system's that stays as it is, and why it may. `object` as `flywheel db check` names it."""

    object: str
    problem: str
    why: str


@dataclass(frozen=True)
class Obstacle:
    """Something that stands in the way of an adoption."""

    table: str
    column: str
    why: str


@dataclass
class Plan:
    """What an adoption would do, in order; what it would leave; what stands in its way; what people should know."""

    tables: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differing: frozenset[tuple[str, str]] = frozenset()

    def left_visibly(self) -> list[Left]:
        """Return what differs from the declared schema today and stays so."""
        return [left for left in self.left if (left.object, left.problem) in self.differing]


def make_plan(connection: Connection) -> Plan:
    """Compare the old tables with the declared ones and plan every change. Reads only; takes no lock that writers feel."""
    present = {
        row.name: row.kind
        for row in connection.execute(
            sa.text(
                "SELECT relname AS name, relkind::text AS kind FROM pg_class "
                "WHERE relnamespace = CAST(:schema AS regnamespace) AND relkind IN ('r', 'p', 'v', 'm', 'f')"
            ),
            {"schema": declared.SCHEMA},
        )
    }
    plan = Plan(tuple(name for name in PRODUCTION if name in present))
    _plan_names(plan, present)
    wanted, live = snapshots(connection)
    plan.differing = frozenset((found.object, found.problem) for found in differences(wanted, live))
    readable = [name for name in plan.tables if _readable(connection, plan, name, present[name])]
    for name in readable:
        _TablePlanner(connection, plan, name, wanted, live).plan_table()
    _plan_triggers(connection, plan, wanted)
    if "execution_telemetry" in readable:
        _plan_dates(connection, plan)
    _plan_installation(connection, plan, present, readable)
    plan.steps.sort(key=lambda step: step.phase)
    return plan


def _plan_names(plan: Plan, present: Mapping[str, str]) -> None:
    from flywheel_pipeline.sql_models.loader import load_models

    ours = (set(metadata.tables) - set(PRODUCTION)) | {model.name for model in load_models()}
    for name in sorted(ours & present.keys()):
        plan.obstacles.append(
            Obstacle(name, "", "Flywheel needs this name for a relation of its own; rename the one that has it")
        )


def _readable(connection: Connection, plan: Plan, name: str, kind: str) -> bool:
    if kind != "r":
        plan.obstacles.append(Obstacle(name, "", "it is no ordinary table, so no trigger could see every row written"))
        return False
    row = connection.execute(
        sa.text(
            "SELECT row_security_active(c.oid) AS secured, EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhparent, i.inhrelid)) "
            "AS inherited, pg_has_role(c.relowner, 'USAGE') AS owned, pg_get_userbyid(c.relowner) AS owner "
            "FROM pg_class c WHERE c.oid = CAST(:table AS regclass)"
        ),
        {"table": f"{declared.SCHEMA}.{quote(name)}"},
    ).one()
    if row.secured:
        plan.obstacles.append(
            Obstacle(name, "", "row security hides rows from this role, so no count could be trusted")
        )
    if row.inherited:
        plan.obstacles.append(
            Obstacle(name, "", "tables inherit from it, and no trigger would see the rows written there")
        )
    if not row.owned:
        plan.obstacles.append(
            Obstacle(name, "", f"only its owner {row.owner} may change it; connect as that role or a member of it")
        )
    return bool(not row.secured and row.owned)


class _TablePlanner:
    """Plans one table."""

    def __init__(
        self,
        connection: Connection,
        plan: Plan,
        table: str,
        wanted: Mapping[str, CatalogObject],
        live: Mapping[str, CatalogObject],
    ) -> None:
        self.connection, self.plan, self.table = connection, plan, table
        self.q = quote(table)
        self.declared = metadata.tables[table]
        self.wanted = {label: found.facts for label, found in wanted.items() if found.table == table}
        self.live = {label: found.facts for label, found in live.items() if found.table == table}
        self.columns = {
            label.removeprefix(f"column {table}."): facts
            for label, facts in self.live.items()
            if label.startswith("column ")
        }
        self.indexes = catalog.indexes(connection, table)
        self.keys = {column for index in self.indexes if index.primary for column in index.columns}
        self.foreign = catalog.foreign_key_columns(connection, table)
        self.rows = self.count("true")
        self.written = table not in _ONLY_READ and table != "evidence_bundles"
        self.unused = _UNUSED.get(table, frozenset())

    def count(self, condition: str) -> int:
        return int(execute(self.connection, f"SELECT count(*) FROM {self.q} WHERE {condition}").scalar_one())

    def step(self, phase: Phase, column: str, what: str, why: str, do: str, *undo: str, **more: object) -> None:
        self.plan.steps.append(Step(phase, self.table, column, what, why, (do,), undo, **more))  # type: ignore[arg-type]

    def leave(self, label: str, problem: str, why: str) -> None:
        self.plan.left.append(Left(label, problem, why))

    def refuse(self, column: str, why: str) -> None:
        self.plan.obstacles.append(Obstacle(self.table, column, why))

    def plan_table(self) -> None:
        for column in self.declared.columns:
            facts = self.wanted[f"column {self.table}.{column.name}"]
            if column.name not in self.columns:
                self.add_column(column.name, facts)
            else:
                self.judge_column(column, facts, self.columns[column.name])
        for name, facts in self.columns.items():
            if name not in self.declared.columns:
                self.judge_extra(name, facts)
        self.judge_constraints()
        self.judge_indexes()
        for label in self.live.keys() - self.wanted.keys():
            if label.startswith("statistics "):
                self.leave(label, "not declared", "the planner's statistics of the old system do no harm")

    # Columns

    def add_column(self, name: str, facts: Mapping[str, str]) -> None:
        late = self.table == "l1_rules" and name in _LEDGER_COLUMNS
        needs = facts["nullability"] == "NOT NULL" and not (facts["default"] or facts["identity"])
        if needs and self.rows and not late:
            return self.refuse(name, f"it is missing and nothing tells its value for {self.rows:,} rows")
        parts = [facts["type"], facts["generation"], f"DEFAULT {facts['default']}" if facts["default"] else ""]
        if facts["identity"]:
            parts.append(f"GENERATED {facts['identity']} AS IDENTITY")
        if facts["nullability"] == "NOT NULL" and not late:
            parts.append("NOT NULL")
        definition = " ".join(part for part in parts if part)
        why = {"generation": "computed from its row"}.get(
            "generation" if facts["generation"] else "", "Flywheel keeps it here"
        )
        if self.table == "execution_telemetry" and not facts["generation"]:
            why = "newer agents send it, and nothing of the old rows is rewritten"
        self.step(
            Phase.ADD,
            name,
            f"add {definition}",
            why,
            f"ALTER TABLE {self.q} ADD COLUMN {quote(name)} {definition}",
            f"ALTER TABLE {self.q} DROP COLUMN {quote(name)}",
            added=True,
        )
        if late and facts["nullability"] == "NOT NULL":
            self.step(
                Phase.AFTER_IMPORT,
                name,
                "set NOT NULL",
                "every rule is in the ledger by then",
                f"ALTER TABLE {self.q} ALTER COLUMN {quote(name)} SET NOT NULL",
                f"ALTER TABLE {self.q} ALTER COLUMN {quote(name)} DROP NOT NULL",
            )
        return None

    def judge_column(self, column: sa.Column[object], want: Mapping[str, str], found: Mapping[str, str]) -> None:
        name, label = column.name, f"column {self.table}.{column.name}"
        if name in self.unused and (name != "id" or found["default"] or found["identity"]):
            why = "nothing of Flywheel's writes it"
            for problem in ("another type", "another nullability", "another default", "another identity"):
                self.leave(label, problem, why)
            for problem in ("not generated", "generated", "another generation"):
                self.leave(label, problem, why)
            return
        if (want["generation"], want["generation"] and want["type"]) != (
            found["generation"],
            found["generation"] and found["type"],
        ):
            self.judge_generation(name, want, found)
        elif want["type"] != found["type"]:
            self.judge_type(name, want["type"], found)
        if not want["generation"]:
            self.judge_default(name, label, want, found)
            self.judge_nullability(name, label, want, found)

    def judge_generation(self, name: str, want: Mapping[str, str], found: Mapping[str, str]) -> None:
        if not want["generation"]:
            return self.refuse(name, f"it is {found['generation']}, and Flywheel has to write it")
        if name == "event_at":
            return self.refuse(name, "Flywheel computes a column of this name; rename the one that has it")
        old = f"{found['type']} {found['generation']}" if found["generation"] else found["type"]
        formula = " ".join(_expression(found["generation"]).split()) or "storing it"
        what = f"compute it as {' '.join(_expression(want['generation']).split())} instead of {formula}"
        why = "a rate is a fraction here, computed from the counters, and null over nothing"
        version = int(self.connection.exec_driver_sql("SHOW server_version_num").scalar_one())
        if found["generation"].endswith("STORED") and found["type"] == want["type"] and version >= 170000:
            alter = f"ALTER TABLE {self.q} ALTER COLUMN {quote(name)} SET EXPRESSION AS "
            self.step(
                Phase.GENERATION,
                name,
                what,
                why,
                alter + _expression(want["generation"]),
                alter + _expression(found["generation"]),
            )
            return None
        if not self.set_aside_works(name):
            return None
        if name in self.foreign:
            return self.refuse(name, f"the foreign key {self.foreign[name]} stands on it")
        constrained, restore = catalog.standing_on(self.connection, self.table, name)
        if constrained:
            return self.refuse(name, f"it must be made anew, and the constraint {constrained} stands on it")
        drop, add = (f"ALTER TABLE {self.q} {act} COLUMN {quote(name)}" for act in ("DROP", "ADD"))
        self.plan.steps.append(
            Step(
                Phase.GENERATION,
                self.table,
                name,
                what,
                why,
                (drop, f"{add} {want['type']} {want['generation']}", *restore),
                (drop, f"{add} {old}", *restore),
                (name,),
            )
        )
        return None

    def judge_type(self, name: str, want: str, found: Mapping[str, str]) -> None:
        label, live = f"column {self.table}.{name}", found["type"]
        exact = (
            self.table == "execution_telemetry"
        )  # COPY writes it in binary form, and a repeated row must equal itself
        judged = judge_type(want, live, is_id=name == "id", exact=exact)
        needed = _LONGEST.get(f"{self.table}.{name}", 1_000_000 if self.written else 1)
        if isinstance(judged, TypeChange) and not judged.family and (_length(live) or 0) >= needed:
            judged = "it holds all that is written there"
        if isinstance(judged, str):
            return self.leave(label, "another type", judged)
        if judged is None:
            return self.refuse(
                name, f"it is {live}, Flywheel needs {want}, and there is no sound way from one to the other"
            )
        if name in self.foreign and judged.family:
            return self.refuse(
                name, f"it is {live}, Flywheel needs {want}, and the foreign key {self.foreign[name]} stands on it"
            )
        if not self.set_aside_works(name):
            return None
        column_q = quote(name)
        alter = f"ALTER TABLE {self.q} ALTER COLUMN {column_q} "
        do, undo = [], []
        if judged.family and found["default"]:
            do.append(alter + "DROP DEFAULT")
            undo.append(alter + f"SET DEFAULT {found['default']}")
        do.append(alter + f"TYPE {want}" + (f" USING {judged.using.format(column_q)}" if judged.using else ""))
        undo.insert(0, alter + f"TYPE {live}" + (f" USING {judged.back.format(column_q)}" if judged.back else ""))
        if judged.family and found["default"]:
            undo.insert(0, alter + "DROP DEFAULT")
        if "flywheel_texts" in judged.back:
            undo.insert(0, _TEXTS)
        if judged.family and self.wanted[label]["default"]:
            do.append(alter + f"SET DEFAULT {self.wanted[label]['default']}")
        self.plan.steps.append(
            Step(
                Phase.TYPE,
                self.table,
                name,
                f"{live} becomes {want}",
                judged.why,
                tuple(do),
                tuple(undo),
                (name,),
                tolerant=True,
            )
        )
        return None

    def set_aside_works(self, name: str) -> bool:
        works = True
        for view in catalog.views_on(self.connection, self.table, [name]):
            if view.obstacle:
                self.refuse(
                    name, f"the view {view.name} reads it and cannot be made again after the change: {view.obstacle}"
                )
                works = False
        return works

    def judge_default(self, name: str, label: str, want: Mapping[str, str], found: Mapping[str, str]) -> None:
        alter = f"ALTER TABLE {self.q} ALTER COLUMN {quote(name)} "
        if name == "id" and not (found["default"] or found["identity"]):
            if found["type"] not in ("integer", "bigint") or found["nullability"] != "NOT NULL":
                return self.refuse(
                    name, f"it is {found['type']} without a default, so no row of Flywheel's would have one"
                )
            last = self.connection.exec_driver_sql(f"SELECT coalesce(max(id), 0) + 1 FROM {self.q}").scalar_one()
            self.step(
                Phase.DEFAULT,
                name,
                f"count ids on from {last}",
                "Flywheel inserts rows without an id",
                alter + f"ADD GENERATED BY DEFAULT AS IDENTITY (START WITH {last})",
                alter + "DROP IDENTITY",
            )
            return None
        if want["default"] and not found["default"] and not found["identity"]:
            self.step(
                Phase.DEFAULT,
                name,
                f"set DEFAULT {want['default']}",
                "Flywheel inserts rows without it",
                alter + f"SET DEFAULT {want['default']}",
                alter + "DROP DEFAULT",
            )
        elif want["default"] != found["default"]:
            self.leave(label, "another default", "rows without this value get the old system's")
        if want["identity"] != found["identity"]:
            self.leave(label, "another identity", "ids go on from the old sequence")
            if found["identity"] == "ALWAYS":
                self.plan.notes.append(f"{self.table}.{name} is GENERATED ALWAYS: ids cannot be given.")
        return None

    def judge_nullability(self, name: str, label: str, want: Mapping[str, str], found: Mapping[str, str]) -> None:
        alter = f"ALTER TABLE {self.q} ALTER COLUMN {quote(name)} "
        if want["nullability"] == found["nullability"]:
            return None
        if found["nullability"] == "NOT NULL":
            if not self.written:
                return self.leave(label, "another nullability", "nothing of Flywheel's writes it")
            if name in self.keys:
                return self.refuse(name, "it is part of the primary key, and Flywheel may leave it empty")
            self.step(
                Phase.NULLABILITY,
                name,
                "drop NOT NULL",
                "agents may leave it out",
                alter + "DROP NOT NULL",
                alter + "SET NOT NULL",
                tolerant=True,
            )
            return None
        missing = self.count(f"{quote(name)} IS NULL")
        if missing:
            key = f"{self.table}.{name}"
            value, spoken = _FILLS.get(key, (want["default"], f"the default {want['default']}"))
            if not value:
                return self.refuse(name, f"{missing:,} rows have none, and nothing tells it")
            self.step(
                Phase.FILL,
                name,
                f"fill {missing:,} of {self.rows:,} rows that have none: {spoken}",
                "every row needs it to be counted; the undo empties these again",
                f"UPDATE {self.q} AS t SET {quote(name)} = f.filled FROM (SELECT id, {quote(name)} AS had, {value} AS filled "
                f"FROM {self.q}) AS f WHERE f.id = t.id AND f.had IS NULL RETURNING t.id::text",
                f"UPDATE {self.q} SET {quote(name)} = NULL WHERE id::text = ANY (:ids)"
                + (" AND NOT enabled" if name == "enabled" else ""),
                fills=True,
            )
        self.step(
            Phase.NULLABILITY,
            name,
            "set NOT NULL",
            "every row needs it to be counted",
            alter + "SET NOT NULL",
            alter + "DROP NOT NULL",
        )
        return None

    def judge_extra(self, name: str, facts: Mapping[str, str]) -> None:
        self.leave(
            f"column {self.table}.{name}", "not declared", "a column of the old system's that Flywheel does not read"
        )
        fills_itself = facts["default"] or facts["identity"] or facts["generation"]
        if facts["nullability"] == "NOT NULL" and not fills_itself and self.written:
            if name in self.keys:
                return self.refuse(name, "it is part of the primary key, and Flywheel does not know it")
            alter = f"ALTER TABLE {self.q} ALTER COLUMN {quote(name)} "
            self.step(
                Phase.NULLABILITY,
                name,
                "drop NOT NULL",
                "Flywheel inserts rows without it",
                alter + "DROP NOT NULL",
                alter + "SET NOT NULL",
                tolerant=True,
            )
        return None

    # Constraints and indexes

    def judge_constraints(self) -> None:
        retired: set[str] = set()
        for label, facts in self.wanted.items():
            if not label.startswith("constraint "):
                continue
            name = label.removeprefix("constraint ").removesuffix(f" on {self.table}")
            definition = facts["definition"]
            if definition.startswith("CHECK"):
                self.judge_check(label, name, definition, retired)
            elif self.live.get(label, {}).get("definition") != definition:
                self.judge_key(label, name, definition)
        for label in sorted(self.live.keys() - self.wanted.keys() - retired):
            if label.startswith("constraint "):
                kind = self.live[label]["definition"].partition(" (")[0]
                why = {
                    "FOREIGN KEY": "foreign keys stay as they are",
                    "UNIQUE": "what is unique there is unique here",
                    "PRIMARY KEY": "the primary key stays as it is",
                }.get(kind, "a rule of the old system's; the intake rejects, with the reason, a row that breaks it")
                self.leave(label, "not declared", why)

    def judge_key(self, label: str, name: str, definition: str) -> None:
        columns = tuple(part.strip().strip('"') for part in definition[definition.index("(") + 1 : -1].split(","))
        for index in self.indexes:
            if index.unique and index.plain and set(index.columns) == set(columns):
                for problem in ("missing", "another definition"):
                    self.leave(label, problem, f"{index.name} keeps {', '.join(columns)} unique")
                return None
        primary = definition.startswith("PRIMARY KEY")
        if primary and self.keys:
            for problem in ("missing", "another definition"):
                self.leave(label, problem, f"its primary key is ({', '.join(sorted(self.keys))})")
            if self.table != "execution_telemetry":
                return None
            name, definition = f"{self.table}_id_key", "UNIQUE (id)"
            self.leave(f"constraint {name} on {self.table}", "not declared", "corrections are found by id")
        elif label in self.live:
            return self.refuse("", f"its constraint {name} is {self.live[label]['definition']}; rename it")
        if set(columns) <= self.columns.keys():
            listed = ", ".join(map(quote, columns))
            twice = self.connection.exec_driver_sql(
                f"SELECT count(*) FROM (SELECT {listed} FROM {self.q} WHERE num_nulls({listed}) = 0 GROUP BY {listed} "
                "HAVING count(*) > 1) AS d"
            ).scalar_one()
            if twice:
                return self.refuse(
                    ", ".join(columns), f"{twice:,} values stand there more than once; Flywheel needs them unique"
                )
        self.step(
            Phase.CONSTRAINT,
            ", ".join(columns),
            f"add {definition}",
            "Flywheel writes each only once and relies on it",
            f"ALTER TABLE {self.q} ADD CONSTRAINT {quote(name)} {definition}",
            f"ALTER TABLE {self.q} DROP CONSTRAINT {quote(name)}",
        )
        return None

    def judge_check(self, label: str, name: str, definition: str, retired: set[str]) -> None:
        columns = frozenset(c.name for c in self.declared.columns if re.search(rf"\b{c.name}\b", definition))
        old = [check for check in catalog.checks(self.connection, self.table) if check.columns == columns]
        if any(check.definition == definition for check in old):
            return self.leave(label, "missing", f"{old[0].name} says the same")
        for check in old:
            retired.add(f"constraint {check.name} on {self.table}")
            written = catalog.as_written(self.connection, self.table, check.definition)
            restore = f"ALTER TABLE {self.q} ADD CONSTRAINT {quote(check.name)} {written}"
            self.plan.steps.append(
                Step(
                    Phase.RETIRE,
                    self.table,
                    ", ".join(sorted(columns)),
                    f"drop {check.name}: {check.definition}",
                    "Flywheel writes other values too; the undo puts it back, for new rows at least",
                    (f"ALTER TABLE {self.q} DROP CONSTRAINT {quote(check.name)}",),
                    # Rows that Flywheel wrote may break it by then.
                    (
                        restore if check.definition.endswith("NOT VALID") else f"{restore} NOT VALID",
                        f"ALTER TABLE {self.q} VALIDATE CONSTRAINT {quote(check.name)}",
                    ),
                    tolerant=True,
                )
            )
        # As tables.py has it: what PostgreSQL prints, it would print in another way once read again.
        expression = next(
            f"({check.sqltext})"
            for check in self.declared.constraints
            if isinstance(check, sa.CheckConstraint) and check.name == name
        )
        breaking = self.count(f"NOT {expression}") if columns <= self.columns.keys() else 0
        if breaking:
            self.leave(label, "missing", f"{breaking:,} rows of the old system's hold other values")
            self.leave(label, "another definition", f"{breaking:,} rows of the old system's hold other values")
            return None
        self.step(
            Phase.CONSTRAINT,
            ", ".join(sorted(columns)),
            f"add CHECK {expression}",
            "no other value has a meaning",
            f"ALTER TABLE {self.q} ADD CONSTRAINT {quote(name)} CHECK {expression}",
            f"ALTER TABLE {self.q} DROP CONSTRAINT {quote(name)}",
        )
        return None

    def judge_indexes(self) -> None:
        for label, facts in self.wanted.items():
            if not label.startswith("index "):
                continue
            name = label.removeprefix("index ").removesuffix(f" on {self.table}")
            definition = facts["definition"]
            if self.live.get(label, {}).get("definition") == definition:
                continue
            columns = tuple(part.strip() for part in definition[definition.index("(") + 1 :].split(")")[0].split(","))
            serving = [i for i in self.indexes if i.plain and i.columns[: len(columns)] == columns]
            if serving and not definition.startswith("CREATE UNIQUE"):
                for problem in ("missing", "another definition"):
                    self.leave(label, problem, f"{serving[0].name} serves as well")
                continue
            if any(index.name == name for index in self.indexes):
                self.refuse("", f"its index {name} is another one than Flywheel's; rename it")
                continue
            self.step(
                Phase.CONSTRAINT,
                ", ".join(columns),
                f"create {'a unique' if definition.startswith('CREATE UNIQUE') else 'an'} index {name}",
                "a refresh reads by it" if self.table == "execution_telemetry" else "Flywheel reads by it",
                definition,
                f"DROP INDEX {quote(name)}",
            )
        for label in self.live.keys() - self.wanted.keys():
            if label.startswith("index "):
                self.leave(label, "not declared", "an index of the old system's; it may serve others")


@dataclass(frozen=True)
class TypeChange:
    """How a column changes its type and back. `family`: the new type is of another kind, so keys onto it would break.

    `using` and `back` are expressions over the column `{}`. Without one PostgreSQL casts as it does on assignment, which
    refuses a value that does not fit; an explicit cast to a shorter type would cut it off in silence.
    """

    why: str
    using: str = ""
    back: str = ""
    family: bool = False


# A list of text from JSON, for the way back: USING takes no subquery, but a function.
_TEXTS: Final = (
    "CREATE OR REPLACE FUNCTION pg_temp.flywheel_texts(list jsonb) RETURNS text[] LANGUAGE sql AS "
    "$$ SELECT CASE WHEN jsonb_typeof(list) = 'array' THEN ARRAY(SELECT jsonb_array_elements_text(list)) END $$"
)
_INTEGERS: Final = ("smallint", "integer", "bigint")


def judge_type(want: str, live: str, *, is_id: bool, exact: bool) -> TypeChange | str | None:
    """Judge a column's type: how to change it, or why it may stay, or None where neither is sound.

    A type may stay if it holds, unaltered, every value that is written as the declared type. `want` and `live` are types
    as PostgreSQL prints them; `is_id`: an id that nothing computes with; `exact`: COPY writes it in binary form.
    """
    if is_id and live in (*_INTEGERS, "uuid") and want in _INTEGERS:
        return "ids go on from the old sequence"
    if want == "text" or want.startswith("character varying"):
        return _judge_text(want, live)
    if want in _INTEGERS and live in _INTEGERS:
        if not exact and (want == "bigint" or live == "bigint") and live != "smallint":
            return "it holds every number that is counted here, up to 2,147,483,647 at least"
        return TypeChange(f"it is written as {want}")
    if want == "double precision" and (live in ("real", *_INTEGERS) or live.startswith("numeric")):
        # By its text, since 0.95 as a REAL is 0.949999988079071 as a double.
        using = "{}::text::double precision" if live == "real" else ""
        return TypeChange(f"a value written to {live} would not read back as itself", using)
    if want.startswith("numeric"):
        return _judge_numeric(want, live)
    if want == "timestamp with time zone":
        if live.startswith("timestamp without time zone") or re.fullmatch(r"timestamp\(\d\) without time zone", live):
            zone = "{} AT TIME ZONE 'UTC'"
            return TypeChange("its times carry no zone; they are read as UTC", zone, zone, family=True)
        if re.fullmatch(r"timestamp\(\d\) with time zone", live):
            return TypeChange("it would round times off")
    if want == "jsonb" and live == "json":
        return TypeChange("it is searched, and compared with what is sent again", "{}::jsonb", "{}::json", family=True)
    if want == "jsonb" and live.endswith("[]"):
        cast = "" if live.startswith(("text", "character")) else f"::{live}"
        return TypeChange("lists are JSON here", "to_jsonb({})", f"pg_temp.flywheel_texts({{}}){cast}", family=True)
    return None


def _length(kind: str) -> int | None:
    found = re.fullmatch(r"character(?: varying)?\((\d+)\)", kind)
    return int(found[1]) if found else None


def _judge_text(want: str, live: str) -> TypeChange | str | None:
    needed, given = _length(want), _length(live)
    if live in ("text", "character varying"):
        return "it holds any text"
    if live.startswith("character varying("):
        if needed is not None and given is not None and given >= needed:
            return f"it holds {given} characters, more than the {needed} needed"
        return TypeChange(f"a value may be longer than {given} characters")
    back = "" if live.startswith("character(") else f"{{}}::{live}"
    return TypeChange(f"text comes in, and {live} would refuse it or alter it", f"{{}}::{want}", back, family=True)


def _judge_numeric(want: str, live: str) -> TypeChange | str | None:
    if live == "numeric":
        return "it holds any number"
    needed = re.fullmatch(r"numeric\((\d+),(\d+)\)", want)
    given = re.fullmatch(r"numeric\((\d+),(\d+)\)", live)
    if needed and given:
        (p, s), (q, t) = (tuple(map(int, found.groups())) for found in (needed, given))
        if t >= s and q - t >= p - s:
            return "it holds every number of the declared type"
    if given or live in ("real", "double precision", *_INTEGERS):
        return TypeChange(f"a value written to {live} would not read back as itself")
    return None


def _expression(generation: str) -> str:
    return generation.removeprefix("GENERATED ALWAYS AS ").removesuffix(" STORED").removesuffix(" VIRTUAL")


def _plan_triggers(connection: Connection, plan: Plan, wanted: Mapping[str, CatalogObject]) -> None:
    known = catalog.functions(connection)
    found = catalog.triggers(connection)
    retired: list[catalog.OldTrigger] = []
    for trigger in found:
        label = f"trigger {trigger.name} on {trigger.table}"
        if label in wanted:
            continue
        code = catalog.code_of(trigger.function, known)
        writes, sets = catalog.writes_counted_tables(code), catalog.sets_counted_columns(code)
        if trigger.table not in plan.tables:
            if writes:
                plan.notes.append(
                    f"The trigger {trigger.name} on {trigger.table}, which stays, writes {' and '.join(writes)}: counters are "
                    "set right by each refresh, and changes of rules are refused by the ledger. Have its owner drop it."
                )
            continue
        if not writes and not (sets and trigger.table in ("l1_rules", "patterns")):
            plan.left.append(Left(label, "not declared", "a trigger that writes no counter"))
            continue
        does = f"writes {' and '.join(writes)}" if writes else f"sets {', '.join(sets)}"
        retired.append(trigger)
        plan.steps.append(
            Step(
                Phase.RETIRE,
                trigger.table,
                "",
                f"drop the trigger {trigger.name}",
                f"it {does}: counters come from a recount now, and rules change by the ledger only; its definition is saved",
                (f"DROP TRIGGER {quote(trigger.name)} ON {declared.SCHEMA}.{quote(trigger.table)}",),
                trigger.restore,
            )
        )
    staying = {trigger.function for trigger in found if trigger not in retired}
    for oid in dict.fromkeys(trigger.function for trigger in retired):
        if oid in known and oid not in staying:
            function = known[oid]
            plan.steps.append(
                Step(
                    Phase.RETIRE,
                    "",
                    "",
                    f"drop the function {function.signature}",
                    "only dropped triggers call it; its definition is saved",
                    (f"DROP FUNCTION {function.signature}",),
                    function.restore,
                )
            )
    gone = {trigger.function for trigger in retired} - staying
    for function in known.values():
        if function.oid not in gone and not function.is_trigger and not function.name.startswith("flywheel_"):
            writes = catalog.writes_counted_tables(catalog.code_of(function.oid, known))
            if writes:
                plan.notes.append(
                    f"The function {function.signature} writes {' and '.join(writes)}; it stays. Nobody should call it."
                )
    rules = connection.execute(
        sa.text(
            "SELECT rulename AS name, tablename AS table, definition FROM pg_rules WHERE schemaname = :schema AND tablename = ANY (:tables)"
        ),
        {"schema": declared.SCHEMA, "tables": list(plan.tables)},
    )
    for rule in rules:
        if catalog.writes_counted_tables(rule.definition.partition(" DO ")[2]) or " INSTEAD " in rule.definition:
            plan.steps.append(
                Step(
                    Phase.RETIRE,
                    rule.table,
                    "",
                    f"drop the rule {rule.name}",
                    "it changes what a write does; its definition is saved",
                    (f"DROP RULE {quote(rule.name)} ON {declared.SCHEMA}.{quote(rule.table)}",),
                    (rule.definition,),
                )
            )


def _plan_dates(connection: Connection, plan: Plan) -> None:
    columns = [
        name
        for name in ("started_at", "completed_at", "created_at")
        if _has_column(connection, "execution_telemetry", name)
    ]
    if columns:
        beyond = execute(
            connection,
            f"SELECT count(*) FROM execution_telemetry WHERE coalesce({', '.join(columns)}) < '0001-01-02' "
            f"OR coalesce({', '.join(columns)}) > '9999-12-30'",
        ).scalar_one()
        if beyond:
            plan.obstacles.append(
                Obstacle("execution_telemetry", columns[0], f"{beyond:,} rows are dated on no day of this calendar")
            )


def _plan_installation(connection: Connection, plan: Plan, present: Mapping[str, str], readable: list[str]) -> None:
    from flywheel_pipeline.sql_models.loader import load_models

    def program(phase: Phase, table: str, what: str, why: str) -> None:
        plan.steps.append(Step(phase, table, "", what, why))

    for table in metadata.sorted_tables:
        if table.name not in present:
            program(
                Phase.INSTALL,
                table.name,
                "create the table",
                "Flywheel's own" if table.name not in PRODUCTION else "it is missing",
            )
    for routine in declared.routines():
        program(
            Phase.INSTALL, "", f"install the functions and triggers of {routine.name}", "identity, outbox and ledger"
        )
    for model in load_models():
        program(
            Phase.INSTALL,
            model.name,
            f"create the {'view' if model.materialized == 'view' else 'table'}",
            "an SQL model",
        )
    program(
        Phase.INSTALL,
        "",
        "add catalogue rows, outcome classes and built-in rules that are missing",
        "rows already there stay",
    )
    if "patterns" in readable:
        known = connection.exec_driver_sql("SELECT count(*) FROM patterns").scalar_one()
        program(
            Phase.IMPORT,
            "patterns",
            f"give {known:,} patterns their platform and key where telemetry or catalogue tell it",
            "evidence is found by key",
        )
    if "l1_rules" in readable:
        enabled = "coalesce(enabled, false)" if _has_column(connection, "l1_rules", "enabled") else "false"
        row = connection.exec_driver_sql(
            f"SELECT count(*) FILTER (WHERE {enabled}) AS fleet, count(*) FILTER (WHERE NOT {enabled}) AS quarantined FROM l1_rules"
        ).one()
        program(
            Phase.IMPORT,
            "l1_rules",
            f"enter {row.fleet:,} enabled rules in the ledger as fleet and {row.quarantined:,} disabled ones as quarantined",
            "from then on a rule changes by the ledger only",
        )
    if "execution_telemetry" in readable:
        rows = connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one()
        program(
            Phase.BACKFILL,
            "l1_rules",
            f"recount every counter from {rows:,} executions",
            "a counter equals a recount; the old ones are saved",
        )


def _has_column(connection: Connection, table: str, column: str) -> bool:
    return bool(
        connection.execute(
            sa.text(
                "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = CAST(:table AS regclass) AND attname = :column AND NOT attisdropped)"
            ),
            {"table": f"{declared.SCHEMA}.{table}", "column": column},
        ).scalar_one()
    )


__all__ = [
    "PRODUCTION",
    "REQUIRED",
    "Left",
    "Obstacle",
    "Phase",
    "Plan",
    "Step",
    "TypeChange",
    "judge_type",
    "make_plan",
]
