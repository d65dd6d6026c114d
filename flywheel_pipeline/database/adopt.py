"""Adopting a database that the old system made: the dry run, the adoption in one transaction, and its undo.

Belongs here: carrying a plan out and taking it back. Does not belong here: what has to change (`adopt_plan.py`), and
the upgrade of a database that is Flywheel's already (`migrate.py`).

Every change goes to `adoption_journal` with what its undo needs; what stays as the old system made it goes there too, so
that `flywheel db check` knows it. After the last step the live schema is compared with the declared one: a difference
that nobody planned to leave undoes everything.
"""

# ruff: noqa: S608 (identifiers come from tables.py and the catalog and are quoted; values are bound)
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import psycopg
import sqlalchemy as sa
from alembic import command
from sqlalchemy import Connection, Engine

from flywheel_pipeline.database import adopt_catalog as catalog
from flywheel_pipeline.database import declared, migrate, roles, seed
from flywheel_pipeline.database.adopt_plan import PRODUCTION, REQUIRED, Obstacle, Phase, Plan, Step, make_plan
from flywheel_pipeline.database.drift import differences, snapshots
from flywheel_pipeline.database.tables import adoption_journal, metadata
from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch, UsageError
from flywheel_pipeline.sql_models.relations import execute, quote

AS_IT_WAS: Final = "as the old system left it"
LOCK_TIMEOUT_SECONDS: Final = 30

# What an undo gives back to a rule; its state and content stay as decided since: a quarantine is not undone.
_NOT_RESTORED: Final = frozenset({"id", "rule_id", "incident_pattern", "runbook_id", "enabled", "created_at"})

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CounterLine:
    """A rule's counters as the old system left them, beside those recounted from the log. None: it had none."""

    rule_id: str
    state: str
    old_matches: int | None
    old_successes: int | None
    old_failures: int | None
    matches: int
    successes: int
    failures: int

    @property
    def differs(self) -> bool:
        """Whether the old counters were wrong."""
        return (self.old_matches, self.old_successes, self.old_failures) != (
            self.matches,
            self.successes,
            self.failures,
        )


@dataclass(frozen=True)
class Adoption:
    """What an adoption did, or would do. `changes` is empty where there was nothing to do.

    `counters` and `unresolved` (executions whose rule the registry does not know) are there once it is done.
    """

    applied: bool
    changes: tuple[dict[str, str], ...]
    left: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    obstacles: tuple[dict[str, str], ...]
    counters: tuple[CounterLine, ...] = ()
    unresolved: int = 0


@dataclass(frozen=True)
class Undo:
    """What an undo did. `kept` lists what no longer fitted and stays; `archive` is the schema that holds our tables."""

    archive: str
    restored: tuple[str, ...]
    kept: tuple[str, ...]
    executions_since: int


def dry_run(engine: Engine) -> Adoption:
    """List every change that an adoption would make. Nothing is changed: the transaction is rolled back.

    Raises SchemaMismatch at a revision newer than this release; UsageError where no table of the old system is.
    """
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(sa.text(f"SET LOCAL search_path = {declared.SCHEMA}"))
        report = _nothing() if _is_ours(connection) else _report(_plan(connection), applied=False)
        transaction.rollback()
    return report


def apply(engine: Engine, *, actor: str, reason: str, progress: Progress | None = None) -> Adoption:
    """Adopt the database: all of it or nothing, in one transaction. On an adopted one, change nothing.

    Writers of the old tables wait until it ends. `progress` receives each change as it is made.

    Raises UsageError without actor or reason, or where no table of the old system is; SchemaMismatch, naming all, where
    something stands in the way; DatabaseUnavailable where a writer does not let go of a table.
    """
    if not actor.strip() or not reason.strip():
        raise UsageError("An adoption needs an actor and a reason.", hint="Add --actor NAME --reason TEXT.")
    tell = progress or (lambda _: None)
    with _transaction(engine) as connection:
        if _is_ours(connection):
            return _nothing()
        _lock(connection)
        plan = _plan(connection)
        if plan.obstacles:
            raise SchemaMismatch(
                f"{len(plan.obstacles)} things stand in the way: "
                + "; ".join(f"{_subject(o.table, o.column)}: {o.why}" for o in plan.obstacles)
                + ".",
                hint="Nothing was changed. `flywheel adopt` without --apply lists them.",
            )
        return _Adopter(connection, plan, actor, reason, tell).run()


def undo(engine: Engine, *, actor: str = "", reason: str = "", progress: Progress | None = None) -> Undo:
    """Give the old tables back to the old system, in one transaction: its triggers, functions, columns and counters.

    Every row of the old tables stays, those that came since included, and so does every decision about a rule: a rule
    quarantined since stays disabled. Rows that the adoption added to catalogue and registry go. Flywheel's own tables, its
    ledger among them, and the values of the columns that go are kept in a schema of their own.

    Raises UsageError where nothing was adopted; SchemaMismatch where another system's object reads what has to go.
    """
    from flywheel_pipeline.aggregates.refresh import lock_refresh

    tell = progress or (lambda _: None)
    with _transaction(engine) as connection:
        if not _journal_entries(connection, "adopted"):
            raise UsageError("This database was not adopted, so there is nothing to undo.")
        lock_refresh(connection)
        _lock(connection)
        return _Undoer(connection, actor or "flywheel adopt --undo", reason or "undone", tell).run()


class _Adopter:
    """Carries a plan out on a connection whose transaction is open and whose tables are locked."""

    def __init__(self, connection: Connection, plan: Plan, actor: str, reason: str, tell: Progress) -> None:
        self.connection, self.plan, self.actor, self.reason, self.tell = connection, plan, actor, reason, tell

    def run(self) -> Adoption:
        from flywheel_pipeline.aggregates.refresh import refresh
        from flywheel_pipeline.candidates.patterns import key_adopted

        connection = self.connection
        before: list[dict[str, Any]] = list(
            connection.exec_driver_sql("SELECT to_jsonb(r) FROM l1_rules r ORDER BY rule_id").scalars()
        )
        last = connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one()
        had = [table.name for table in metadata.sorted_tables if table.name in self.plan.tables]
        metadata.create_all(
            connection, tables=[t for t in metadata.sorted_tables if t.name not in had], checkfirst=False
        )
        self.journal(
            "saved",
            "l1_rules",
            "rules as they were",
            "the undo gives their counters back",
            {"rules": before, "executions": last},
        )
        created = list(migrate.create_dagster_schema(connection))
        self.journal(
            "saved", "tables", "tables that were there", "the undo leaves these", {"tables": had, "created": created}
        )
        self.carry_out(Phase.RETIRE, Phase.RETIRE)
        staying = catalog.silence(connection, self.plan.tables)
        self.carry_out(Phase.TYPE, Phase.CONSTRAINT)
        execute(connection, "ANALYZE execution_telemetry")
        self.install(had)
        key_adopted(connection)
        self.tell("patterns have their keys")
        self.import_rules(before)
        self.carry_out(Phase.AFTER_IMPORT, Phase.AFTER_IMPORT)
        refresh(connection, progress=lambda model: self.tell(f"recounting {model}"))
        for statement in staying:
            execute(connection, statement)
        self.accept_what_is_left()
        self.journal(
            "adopted", "database", "adopted the old system's tables", self.reason, {"steps": len(self.plan.steps)}
        )
        self.tell("adopted")
        return _report(
            self.plan, applied=True, counters=_counters(connection, before), unresolved=_unresolved(connection)
        )

    def journal(self, kind: str, subject: str, what: str, why: str, details: dict[str, Any]) -> None:
        values = {"kind": kind, "subject": subject, "what": what, "why": why, "details": details, "actor": self.actor}
        self.connection.execute(sa.insert(adoption_journal).values(**values))

    def carry_out(self, first: Phase, last: Phase) -> None:
        for step in self.plan.steps:
            if not (first <= step.phase <= last and step.do):
                continue
            views = catalog.set_aside(self.connection, step.table, step.aside) if step.aside else []
            filled: list[str] = []
            for statement in step.do:
                result = execute(self.connection, statement)
                if step.fills:
                    filled = list(result.scalars())
            catalog.put_back(self.connection, views)
            self.journal(
                "changed",
                _subject(step.table, step.column),
                step.what,
                step.why,
                {
                    "table": step.table,
                    "column": step.column,
                    "undo": list(step.undo),
                    "aside": list(step.aside),
                    "tolerant": step.tolerant,
                    "added": step.added,
                    "ids": filled,
                },
            )
            self.tell(f"{_subject(step.table, step.column)}: {step.what}")

    def install(self, had: list[str]) -> None:
        config = declared.alembic_config()
        config.attributes.update(connection=self.connection)
        command.stamp(config, "head")
        known = {name: self.keys(name) for name in ("runbooks", "l1_rules") if name in had}
        for change in migrate.installation(self.connection):
            self.tell(change)
        for name, keys in known.items():
            seeded = sorted(self.keys(name) - keys)
            self.journal(
                "seeded", name, f"added {len(seeded)} rows", "every installation starts with them", {"keys": seeded}
            )

    def keys(self, table: str) -> set[str]:
        key = "rule_id" if table == "l1_rules" else "runbook_id"
        return set(self.connection.exec_driver_sql(f"SELECT {key} FROM {quote(table)}").scalars())

    def import_rules(self, before: list[dict[str, Any]]) -> None:
        from flywheel_pipeline.promotion.ledger import import_rules

        builtin = {row["rule_id"]: row for row in seed.read_seed(seed.BUILTIN_RULES)}
        origins = {
            row.rule_id: row
            for row in self.connection.execute(
                sa.text(
                    """
                    SELECT DISTINCT ON (r.rule_id) r.rule_id, r.incident_pattern, r.runbook_id, r.enabled, r.confidence,
                           r.promoted_from_l2, p.pattern_key, coalesce(nullif(lower(r.platform), ''), p.platform, b.platform) AS platform
                    FROM l1_rules AS r
                    LEFT JOIN patterns AS p ON p.promoted_to_rule_id = r.rule_id AND p.status = 'promoted'
                    LEFT JOIN runbooks AS b ON b.runbook_id = r.runbook_id
                    WHERE r.state IS NULL
                    ORDER BY r.rule_id, (p.runbook_id IS NOT DISTINCT FROM r.runbook_id) DESC, p.promoted_at, p.pattern_id
                    """
                )
            )
        }
        rules = []
        for old in before:
            row = origins[old["rule_id"]]
            ships = row.rule_id in builtin or str(old.get("source") or "").lower().replace("-", "") in (
                "builtin",
                "bundled",
            )
            rules.append(
                {
                    "rule_id": row.rule_id,
                    "incident_pattern": row.incident_pattern,
                    "runbook_id": row.runbook_id,
                    "enabled": row.enabled,
                    "confidence": row.confidence,
                    "promoted_from_l2": bool(row.promoted_from_l2),
                    "source": "builtin" if ships else "promoted",
                    "pattern_key": None if ships else row.pattern_key,
                    "platform": row.platform or builtin.get(row.rule_id, {}).get("platform"),
                }
            )
        count = import_rules(self.connection, rules, actor=self.actor, reason=AS_IT_WAS)
        self.tell(f"{count} rules entered in the ledger")

    def accept_what_is_left(self) -> None:
        unplanned = []
        reasons = {(left.object, left.problem): left.why for left in self.plan.left}
        for difference in differences(*snapshots(self.connection)):
            why = reasons.get((difference.object, difference.problem))
            if why is None:
                unplanned.append(
                    f"{difference.object}: {difference.problem} ({difference.found or difference.expected})"
                )
            else:
                self.journal(
                    "accepted", difference.object, f"{difference.problem}, left as it is", why, asdict(difference)
                )
        if unplanned:
            raise SchemaMismatch(
                f"After the adoption {len(unplanned)} differences would remain that nobody planned: {'; '.join(unplanned[:5])}.",
                hint="Nothing was changed. Please report this with the definition of that table.",
            )


class _Undoer:
    """Takes an adoption back on a connection whose transaction is open and whose tables are locked."""

    def __init__(self, connection: Connection, actor: str, reason: str, tell: Progress) -> None:
        self.connection, self.actor, self.reason, self.tell = connection, actor, reason, tell
        self.kept: list[str] = []
        self.restored: list[str] = []

    def run(self) -> Undo:
        connection = self.connection
        saved = {entry.subject: entry.details for entry in _journal_entries(connection, "saved")}
        seeded = {entry.subject: entry.details["keys"] for entry in _journal_entries(connection, "seeded")}
        changed = _journal_entries(connection, "changed")
        had = set(saved["tables"]["tables"])
        rows = connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one()
        archive = self.new_archive()
        self.journal_undone(archive)
        models = self.take_down_models()
        self.take_down_policies(had)
        self.take_down_triggers()
        staying = catalog.silence(connection, had)
        self.archive_added_columns(archive, changed)
        for table, keys in seeded.items():
            self.remove_seeded(archive, table, keys)
        for entry in reversed(changed):
            self.take_back(entry)
        back = catalog.silence(connection, ["l1_rules"])
        self.restore_rules(saved["l1_rules"]["rules"])
        for statement in [*back, *staying]:
            execute(connection, statement)
        for name in [*models, *(t.name for t in metadata.sorted_tables if t.name not in had), declared.VERSION_TABLE]:
            if name == declared.VERSION_TABLE:
                execute(connection, f"DROP TABLE {quote(name)}")
            else:
                execute(connection, f"ALTER TABLE {quote(name)} SET SCHEMA {archive}")
        if saved["tables"]["created"] and not sa.inspect(connection).get_table_names(migrate.DAGSTER_SCHEMA):
            connection.execute(sa.schema.DropSchema(migrate.DAGSTER_SCHEMA))
        self.tell(f"Flywheel's own tables stand in the schema {archive}")
        return Undo(archive, tuple(self.restored), tuple(self.kept), int(rows) - int(saved["l1_rules"]["executions"]))

    def new_archive(self) -> str:
        taken = set(sa.inspect(self.connection).get_schema_names())
        number = 1
        while f"flywheel_undone_{number}" in taken:
            number += 1
        self.connection.execute(sa.schema.CreateSchema(f"flywheel_undone_{number}"))
        return f"flywheel_undone_{number}"

    def journal_undone(self, archive: str) -> None:
        self.connection.execute(
            sa.insert(adoption_journal).values(
                kind="undone",
                subject="database",
                what="gave the tables back to the old system",
                why=self.reason,
                details={"archive": archive},
                actor=self.actor,
            )
        )

    def take_down_models(self) -> list[str]:
        """Drop the views of the SQL models; return the tables among them, which are kept."""
        rows = self.connection.exec_driver_sql(
            "SELECT c.relname AS name, c.relkind::text AS kind FROM schema_objects o "
            f"JOIN pg_class c ON c.relname = o.name AND c.relnamespace = '{declared.SCHEMA}'::regnamespace "
            "WHERE o.kind = 'model' ORDER BY c.relname"
        ).all()
        views = [quote(row.name) for row in rows if row.kind == "v"]
        if views:
            execute(self.connection, f"DROP VIEW {', '.join(views)}")
        return [row.name for row in rows if row.kind != "v"]

    def take_down_policies(self, had: set[str]) -> None:
        """Drop our row-level policies, and take the rights of our roles on the tables that stay."""
        policies = self.connection.execute(
            sa.text(
                "SELECT polname AS name, polrelid::regclass::text AS relation FROM pg_policy p "
                "JOIN pg_class c ON c.oid = p.polrelid AND c.relnamespace = CAST(:schema AS regnamespace) "
                "WHERE starts_with(polname, 'flywheel_')"
            ),
            {"schema": declared.SCHEMA},
        ).all()
        for policy in policies:
            execute(self.connection, f"DROP POLICY {quote(policy.name)} ON {policy.relation}")
        for relation in sorted({policy.relation for policy in policies}):
            others = self.connection.execute(
                sa.text("SELECT count(*) FROM pg_policy WHERE polrelid = CAST(:relation AS regclass)"),
                {"relation": relation},
            ).scalar_one()
            if not others:
                execute(self.connection, f"ALTER TABLE {relation} DISABLE ROW LEVEL SECURITY")
        for role in sorted(roles.existing(self.connection)):
            for table in sorted(had):
                execute(self.connection, f"REVOKE ALL ON {quote(table)} FROM {quote(role)}")

    def take_down_triggers(self) -> None:
        ours = {
            label.removeprefix("function ") for label in snapshots(self.connection)[0] if label.startswith("function ")
        }
        rows = execute(
            self.connection,
            "SELECT p.oid::bigint AS oid, p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' AS label, "
            "format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS signature "
            f"FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace AND n.nspname = '{declared.SCHEMA}'",
        ).all()
        mine = [row for row in rows if row.label in ours]
        triggers = self.connection.execute(
            sa.text(
                "SELECT tgname AS name, tgrelid::regclass::text AS relation FROM pg_trigger "
                "WHERE NOT tgisinternal AND tgfoid = ANY (CAST(:oids AS oid[]))"
            ),
            {"oids": [row.oid for row in mine]},
        ).all()
        for trigger in triggers:
            execute(self.connection, f"DROP TRIGGER {quote(trigger.name)} ON {trigger.relation}")
        statistics = self.connection.exec_driver_sql(
            "SELECT stxname FROM pg_statistic_ext "
            f"WHERE stxnamespace = '{declared.SCHEMA}'::regnamespace AND starts_with(stxname, 'flywheel_')"
        ).scalars()
        for name in statistics.all():  # they name our functions
            execute(self.connection, f"DROP STATISTICS {quote(name)}")
        if mine:
            execute(self.connection, f"DROP FUNCTION {', '.join(row.signature for row in mine)}")
        self.tell(f"{len(triggers)} triggers and {len(mine)} functions of Flywheel dropped")

    def archive_added_columns(self, archive: str, changed: list[sa.Row[Any]]) -> None:
        added: dict[str, list[str]] = {}
        for entry in changed:
            if entry.details["added"]:
                added.setdefault(entry.details["table"], []).append(entry.details["column"])
        for table, columns in added.items():
            listed = ", ".join(quote(column) for column in columns)
            keys = [index.columns for index in catalog.indexes(self.connection, table) if index.unique and index.plain]
            named = ", ".join(quote(c) for c in dict.fromkeys(c for key in keys for c in key if c not in columns))
            execute(
                self.connection,
                f"CREATE TABLE {archive}.{quote(f'{table}_columns')} AS SELECT {named + ', ' if named else ''}{listed} "
                f"FROM {quote(table)} WHERE num_nonnulls({listed}) > 0",
            )

    def remove_seeded(self, archive: str, table: str, keys: list[str]) -> None:
        key = "rule_id" if table == "l1_rules" else "runbook_id"
        condition = f"FROM {quote(table)} WHERE {key} = ANY (:keys)"
        copy = f"{archive}.{quote(f'{table}_seeded')}"
        execute(self.connection, f"CREATE TABLE {copy} AS SELECT * FROM {quote(table)} WITH NO DATA")
        self.connection.execute(sa.text(f"INSERT INTO {copy} SELECT * {condition}"), {"keys": keys})
        try:
            with self.connection.begin_nested():
                self.connection.execute(sa.text(f"DELETE {condition}"), {"keys": keys})
        except sa.exc.IntegrityError as error:
            self.kept.append(
                f"{table}: {len(keys)} rows that the adoption added, since others refer to them: {_first_line(error)}"
            )

    def take_back(self, entry: sa.Row[Any]) -> None:
        details = entry.details
        try:
            with self.connection.begin_nested():
                views = (
                    catalog.set_aside(self.connection, details["table"], details["aside"]) if details["aside"] else []
                )
                for statement in details["undo"]:
                    if details["ids"]:
                        self.connection.execute(sa.text(statement), {"ids": details["ids"]})
                    elif " VALIDATE CONSTRAINT " in statement:
                        self.validate(entry, statement)
                    else:
                        execute(self.connection, statement)
                catalog.put_back(self.connection, views)
        except (sa.exc.DataError, sa.exc.IntegrityError) as error:
            if not details["tolerant"]:
                raise
            self.kept.append(f"{entry.subject}: {entry.what} stays, since rows of now do not fit: {_first_line(error)}")
            return
        if details["undo"]:
            self.restored.append(f"{entry.subject}: {entry.what}")
            self.tell(f"took back {entry.subject}: {entry.what}")

    def validate(self, entry: sa.Row[Any], statement: str) -> None:
        try:
            with self.connection.begin_nested():
                execute(self.connection, statement)
        except sa.exc.IntegrityError as error:
            self.kept.append(
                f"{entry.subject}: checked for new rows only, since rows of now break it: {_first_line(error)}"
            )

    def restore_rules(self, rules: list[dict[str, Any]]) -> None:
        columns = self.connection.exec_driver_sql(
            f"SELECT attname FROM pg_attribute WHERE attrelid = '{declared.SCHEMA}.l1_rules'::regclass "
            "AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"
        ).scalars()
        names = [quote(name) for name in columns if name not in _NOT_RESTORED]
        self.connection.execute(
            sa.text(
                f"UPDATE l1_rules AS r SET {', '.join(f'{name} = o.{name}' for name in names)} "
                "FROM jsonb_populate_recordset(NULL::l1_rules, CAST(:rules AS jsonb)) AS o WHERE o.rule_id = r.rule_id"
            ).bindparams(sa.bindparam("rules", type_=adoption_journal.c.details.type)),
            {"rules": rules},
        )


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    """Open the one transaction; turn what PostgreSQL refuses into a sentence."""
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"SET LOCAL search_path = {declared.SCHEMA}"))
            connection.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"))
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('flywheel:upgrade'))"))
            yield connection
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
            raise DatabaseUnavailable(
                "A writer did not let go of the old tables, so nothing was changed.",
                hint="Stop the old system's workers, or try again in a quieter moment.",
            ) from error
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise DatabaseUnavailable(
                f"The role {engine.url.username} may not do this: {_first_line(error)}.",
                hint="Nothing was changed. Connect as the owner of the old tables.",
            ) from error
        if isinstance(
            error.orig,
            psycopg.errors.DependentObjectsStillExist
            | psycopg.errors.FeatureNotSupported
            | psycopg.errors.InvalidObjectDefinition,
        ):
            raise SchemaMismatch(
                f"PostgreSQL refuses, since another object depends on it: {' '.join(str(error.orig).split())}.",
                hint="Nothing was changed. Drop that object, run this again, and create it anew.",
            ) from error
        raise


def _lock(connection: Connection) -> None:
    present = set(sa.inspect(connection).get_table_names(declared.SCHEMA))
    for name in PRODUCTION:
        if name in present:
            execute(connection, f"LOCK TABLE {quote(name)} IN ACCESS EXCLUSIVE MODE")


def _is_ours(connection: Connection) -> bool:
    return declared.revision(connection) is not None


def _plan(connection: Connection) -> Plan:
    names = set(sa.inspect(connection).get_table_names(declared.SCHEMA))
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise UsageError(
            f"The database holds no {' and no '.join(missing)}, so there is nothing to adopt.",
            hint="`flywheel db upgrade` makes a new database.",
        )
    return make_plan(connection)


def _journal_entries(connection: Connection, kind: str) -> list[sa.Row[Any]]:
    if not sa.inspect(connection).has_table(adoption_journal.name, schema=declared.SCHEMA):
        return []
    statement = sa.select(adoption_journal).where(adoption_journal.c.kind == kind).order_by(adoption_journal.c.entry_id)
    return cast("list[sa.Row[Any]]", list(connection.execute(statement).all()))


def _counters(connection: Connection, before: list[dict[str, Any]]) -> tuple[CounterLine, ...]:
    old = {row["rule_id"]: row for row in before}
    rows = connection.exec_driver_sql(
        "SELECT rule_id, state, match_count, success_count, failure_count FROM l1_rules ORDER BY match_count DESC, rule_id"
    )
    return tuple(
        CounterLine(
            rule_id=row.rule_id,
            state=row.state,
            old_matches=old.get(row.rule_id, {}).get("match_count"),
            old_successes=old.get(row.rule_id, {}).get("success_count"),
            old_failures=old.get(row.rule_id, {}).get("failure_count"),
            matches=row.match_count,
            successes=row.success_count,
            failures=row.failure_count,
        )
        for row in rows
        if row.rule_id in old or row.match_count
    )


def _unresolved(connection: Connection) -> int:
    return int(
        connection.exec_driver_sql("SELECT coalesce(sum(executions), 0)::bigint FROM unresolved_rule_ids").scalar_one()
    )


def _subject(table: str, column: str) -> str:
    return f"{table}.{column}" if table and column else table or "database"


def _shown(step: Step) -> dict[str, str]:
    return {"table": step.table, "column": step.column, "what": step.what, "why": step.why}


def _blocked(obstacle: Obstacle) -> dict[str, str]:
    return asdict(obstacle)


def _nothing() -> Adoption:
    return Adoption(applied=False, changes=(), left=(), notes=(), obstacles=())


def _report(plan: Plan, *, applied: bool, counters: tuple[CounterLine, ...] = (), unresolved: int = 0) -> Adoption:
    return Adoption(
        applied=applied,
        changes=tuple(map(_shown, plan.steps)),
        left=tuple(
            {"object": object_, "why": why}
            for object_, why in dict.fromkeys((x.object, x.why) for x in plan.left_visibly())
        ),
        notes=tuple(plan.notes),
        obstacles=tuple(map(_blocked, plan.obstacles)),
        counters=counters,
        unresolved=unresolved,
    )


def _first_line(error: sa.exc.DBAPIError) -> str:
    return str(error.orig).splitlines()[0]


__all__ = ["AS_IT_WAS", "Adoption", "CounterLine", "Undo", "apply", "dry_run", "undo"]
