"""A batch: one Dagster run's pass over the pipeline, with the policy and the clock it ran under.

Belongs here: opening a batch and reading it. Does not belong here: what a batch computes.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa

from flywheel_pipeline.promotion import policy as policies


@dataclass(frozen=True)
class Batch:
    """One pass over the pipeline.

    `as_of` is the clock of a replay, or None for real time; `now` is the clock to judge by.
    """

    batch_id: int
    run_id: str
    policy_name: str
    policy_hash: str
    as_of: dt.datetime | None
    refreshed: bool

    @property
    def now(self) -> dt.datetime:
        """The time this batch judges by: the replay's, or the present (UTC)."""
        return self.as_of or dt.datetime.now(dt.UTC)


@dataclass(frozen=True)
class Activation:
    """The policy in force and who put it in force; None for the default."""

    policy_name: str
    as_of: dt.datetime | None
    actor: str | None
    reason: str | None


def policy_in_force(connection: sa.Connection) -> Activation:
    """Return the last activation; `standard` in real time where there was none."""
    row = connection.execute(
        sa.text("SELECT policy_name, as_of, actor, reason FROM policy_activations ORDER BY id DESC LIMIT 1")
    ).one_or_none()
    if row is None:
        return Activation("standard", None, None, None)
    return Activation(row.policy_name, row.as_of, row.actor, row.reason)


def activate_policy(
    connection: sa.Connection, name: str, *, actor: str, reason: str, as_of: dt.datetime | None = None
) -> bool:
    """Put policy `name` in force, from the next batch on; return whether that changed anything.

    Raises:
        PolicyError: no policy has that name, or its file is not valid.
    """
    record_policy(connection, policies.load_policy(name))
    current = policy_in_force(connection)
    if (current.policy_name, current.as_of) == (name, as_of) and current.actor is not None:
        return False
    connection.execute(
        sa.text(
            "INSERT INTO policy_activations (policy_name, as_of, actor, reason) VALUES (:name, :as_of, :actor, :reason)"
        ),
        {"name": name, "as_of": as_of, "actor": actor, "reason": reason},
    )
    return True


def record_policy(connection: sa.Connection, policy: policies.Policy) -> None:
    """Write down what this policy's hash stands for, once."""
    connection.execute(
        sa.text(
            "INSERT INTO policy_documents (policy_hash, policy_name, document) "
            "VALUES (:hash, :name, CAST(:document AS jsonb)) ON CONFLICT (policy_hash) DO NOTHING"
        ),
        {
            "hash": policy.policy_hash,
            "name": policy.name,
            "document": policies.canonical(policy.model_dump(mode="json")),
        },
    )


def open_batch(connection: sa.Connection, run_id: str) -> Batch:
    """Return the batch of this run, opened on first call with the policy then in force."""
    opened = sa.text("SELECT * FROM refresh_batches WHERE run_id = :run_id")
    row = connection.execute(opened, {"run_id": run_id}).one_or_none()
    if row is None:
        activation = policy_in_force(connection)
        record_policy(connection, policies.load_policy(activation.policy_name))
        connection.execute(
            sa.text(
                "INSERT INTO refresh_batches (run_id, policy_name, policy_hash, as_of) "
                "VALUES (:run_id, :name, :hash, :as_of) ON CONFLICT (run_id) DO NOTHING"
            ),
            {
                "run_id": run_id,
                "name": activation.policy_name,
                "hash": policies.load_policy(activation.policy_name).policy_hash,
                "as_of": activation.as_of,
            },
        )
        row = connection.execute(opened, {"run_id": run_id}).one()
    return Batch(
        batch_id=row.batch_id,
        run_id=row.run_id,
        policy_name=row.policy_name,
        policy_hash=row.policy_hash,
        as_of=row.as_of,
        refreshed=row.refreshed_at is not None,
    )
