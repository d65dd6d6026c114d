"""The question whether alerts arrive: a dead receiver must show where somebody looks."""

from __future__ import annotations

import sqlalchemy as sa

from flywheel_pipeline.quality import Finding

LATE_SECONDS = 300.0  # a notification that may leave and has not


def alerts_are_delivered(connection: sa.Connection) -> Finding:
    """No notification that may leave waits for longer than five minutes; those that do are shown by channel."""
    rows = connection.execute(
        sa.text(
            """
            SELECT channel, count(*) AS waiting, max(attempts) AS attempts,
                   extract(epoch FROM now() - min(greatest(created_at, not_before)))::float8 AS oldest_seconds,
                   (array_agg(error ORDER BY notification_id DESC) FILTER (WHERE error IS NOT NULL))[1] AS error
            FROM notifications WHERE sent_at IS NULL AND not_before <= now()
            GROUP BY channel ORDER BY oldest_seconds DESC, channel
            """
        )
    ).all()
    late = [row for row in rows if row.oldest_seconds > LATE_SECONDS]
    oldest = max((row.oldest_seconds for row in rows), default=0.0)
    if late:
        worst = late[0]
        sentence = (
            f"{sum(row.waiting for row in late):,} alert notifications were not delivered; the channel {worst.channel} has "
            f"waited {worst.oldest_seconds / 60:.0f} min, after {worst.attempts} attempts: {worst.error or 'no sender took it'}."
        )
    else:
        sentence = f"{sum(row.waiting for row in rows):,} alert notifications wait, none for long."
    return Finding(
        passed=not late,
        sentence=sentence,
        observed=f"oldest undelivered notification {oldest:.0f} s",
        required=f"none older than {LATE_SECONDS:.0f} s",
        offenders=sum(row.waiting for row in late),
        sample=[
            {"channel": row.channel, "waiting": row.waiting, "attempts": row.attempts, "error": row.error}
            for row in late
        ],
        figures={"undelivered": sum(row.waiting for row in rows), "oldest_undelivered_seconds": oldest},
    )
